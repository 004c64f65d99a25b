"""Which entry a boot loader would start: the loaders' own rules, read from their documentation.

GRUB's ``blscfg`` splits a file name as name-version-release and compares each part as RPM does, the highest
first; systemd-boot sorts as the Boot Loader Specification says; ``user.cfg`` is a menu in its own order.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path


@dataclass(frozen=True)
class MenuLine:
    """One line of the boot menu; ``name`` is the file it comes from, or the title in ``user.cfg``."""

    name: str
    fields: tuple[tuple[str, str], ...]

    def get(self, key: str) -> str | None:
        """The value of ``key``, or None."""
        return next((value for name, value in self.fields if name == key), None)

    @property
    def text(self) -> str:
        """All values in one line, to look for an id."""
        return " ".join(value for _, value in self.fields)


def bls_menu(entries: Path, *, grub: bool) -> list[MenuLine]:
    """The menu made of the ``.conf`` files in ``entries``."""
    files = [_read(path) for path in entries.glob("*.conf")]
    return sorted(files, key=functools.cmp_to_key(_grub_order if grub else _systemd_order))


def grub_menu(user_cfg: Path) -> list[MenuLine]:
    """The menu entries of ``user.cfg``."""
    pattern = re.compile(r'^menuentry "((?:[^"\\]|\\.)*)" \{\n(.*?)^\}$', re.MULTILINE | re.DOTALL)
    found = pattern.findall(user_cfg.read_text())
    return [MenuLine(title, _fields(body)) for title, body in found]


def rpm_compare(left: str, right: str) -> int:
    """RPM's comparison of versions (rpmvercmp(3)): below, at or above 0."""
    if left == right:
        return 0
    parts = re.compile(r"[0-9]+|[A-Za-z]+|~|\^")
    for a, b in zip_longest(parts.findall(left), parts.findall(right), fillvalue=""):
        if a == b:
            continue
        if "~" in (a, b):
            return -1 if a == "~" else 1
        if "^" in (a, b):
            # A caret is newer than the end and older than anything else.
            other = b if a == "^" else a
            return (1 if other == "" else -1) * (1 if a == "^" else -1)
        if not a or not b:
            return 1 if a else -1
        if a.isdigit() != b.isdigit():
            return 1 if a.isdigit() else -1
        if a.isdigit() and int(a) == int(b):
            continue
        ordered = int(a) > int(b) if a.isdigit() else a > b
        return 1 if ordered else -1
    return 0


def uapi_compare(left: str, right: str) -> int:
    """The comparison of the UAPI group's version format (UAPI.10): below, at or above 0."""
    ignored = re.compile(r"[^A-Za-z0-9~^.-]+")
    a, b = left, right
    while True:
        a, b = (text[len(_run(ignored, text)) :] for text in (a, b))
        if (order := _sign(a, b, "~")) or not (a and b):
            # A tilde is older even than the end; what goes on is otherwise newer than what ends.
            return order or (1 if a else -1 if b else 0)
        for sign in "~-^.":
            if order := _sign(a, b, sign):
                return order
            if a.startswith(sign):
                a, b = a[1:], b[1:]
                break
        else:
            digits = a[0].isdigit() or b[0].isdigit()
            x, y = (_run(r"[0-9]*" if digits else r"[A-Za-z]*", text) for text in (a, b))
            a, b = a[len(x) :], b[len(y) :]
            if bool(x) != bool(y):
                return 1 if x else -1
            if digits and int(x) != int(y):
                return 1 if int(x) > int(y) else -1
            if not digits and x != y:
                return 1 if x > y else -1


def _sign(a: str, b: str, sign: str) -> int:
    """Which of two strings is older for beginning with ``sign`` alone."""
    return b.startswith(sign) - a.startswith(sign)


def _run(pattern: str | re.Pattern[str], text: str) -> str:
    found = re.match(pattern, text)
    return found.group() if found else ""


def _read(path: Path) -> MenuLine:
    return MenuLine(path.name, _fields(path.read_text()))


def _fields(text: str) -> tuple[tuple[str, str], ...]:
    split = (line.split(None, 1) for line in text.splitlines() if line.strip() and line[0] != "#")
    return tuple((pair[0], pair[1].strip()) for pair in split if len(pair) == 2)


def _systemd_order(left: MenuLine, right: MenuLine) -> int:
    keys = left.get("sort-key"), right.get("sort-key")
    if (keys[0] is None) != (keys[1] is None):
        return -1 if keys[0] else 1
    if keys[0] is not None and keys[1] is not None:
        for a, b in (keys, (left.get("machine-id") or "", right.get("machine-id") or "")):
            if a != b:
                return -1 if str(a) < str(b) else 1
        if order := uapi_compare(left.get("version") or "", right.get("version") or ""):
            return -order
    return -uapi_compare(left.name.removesuffix(".conf"), right.name.removesuffix(".conf"))


def _grub_order(left: MenuLine, right: MenuLine) -> int:
    for a, b in zip(_nevra(left.name), _nevra(right.name), strict=True):
        if order := rpm_compare(a, b):
            return -order
    return 0


def _nevra(name: str) -> tuple[str, str, str]:
    stem = name.removesuffix(".conf")
    head, _, release = stem.rpartition("-")
    name_part, _, version = head.rpartition("-")
    return name_part, version, release
