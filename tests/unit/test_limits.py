"""The index of limits and the code say the same."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

import hostimaged
from hostimage_testing.tools import REPOSITORY_ROOT

ROW = re.compile(r"\| `([A-Za-z0-9_.]+)` \| ([^|]+) \| ([^|]+) \|\Z")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1}
#: What reads bytes from outside; the names by which limits are known there.
PACKAGES = ("oci", "composefs", "config")
NAME = re.compile(r"(?:^|_)(?:MAX|LIMIT)(?:_|$)")


def rows() -> list[tuple[str, str, str]]:
    lines = (REPOSITORY_ROOT / "daemon/limits.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("| `")]
    found = [ROW.match(line) for line in tables]
    assert all(found), [line for line, match in zip(tables, found, strict=True) if not match]
    return [(match[1], match[2].strip(), match[3].strip()) for match in found if match]


def number(text: str) -> float:
    """``4 MiB``, ``1,000``, ``2^63 - 1``, ``120 s``."""
    if power := re.match(r"2\^(\d+)(?: - (\d+))?\Z", text):
        return (1 << int(power[1])) - int(power[2] or 0)
    plain = re.match(r"([\d,]+)(?: ([A-Za-z]+))?\Z", text)
    assert plain, text
    return int(plain[1].replace(",", "")) * UNITS[plain[2] or ""]


def value(name: str) -> float:
    """The constant, which may be a field of one."""
    parts = name.split(".")
    modules = next(n for n in range(len(parts), 0, -1) if is_module(parts[:n]))
    module = importlib.import_module(".".join(["hostimaged", *parts[:modules]]))
    found = reduce(getattr, parts[modules:], module)
    assert isinstance(found, int | float), found
    return found


def is_module(parts: list[str]) -> bool:
    path = Path(hostimaged.__path__[0], *parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize(("name", "text", "why"), rows(), ids=lambda value: str(value)[:60])
def test_values_are_those_of_the_code(name: str, text: str, why: str) -> None:
    assert number(text) == value(name)
    assert len(why) > 5


def constants() -> Iterator[str]:
    """Numbers defined in modules under the name of a limit."""
    root = Path(hostimaged.__path__[0])
    for path in sorted(root.rglob("*.py")):
        dotted = ".".join(path.relative_to(root).with_suffix("").parts)
        if dotted.split(".")[0] not in PACKAGES:
            continue
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            name = f"{dotted}.{node.target.id}"
            if NAME.search(node.target.id) and isinstance(value(name), int):
                yield name


def test_every_limit_is_in_the_index() -> None:
    listed = [name for name, _, _ in rows()]
    assert len(listed) == len(set(listed))
    found = list(constants())
    assert len(found) > 40
    assert sorted(set(found) - set(listed)) == []
