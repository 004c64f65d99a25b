"""The demo's host: its boot menu, and what a start of it leaves."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "demo"
OLD, NEW = "a" * 128, "b" * 128


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The scripts import each other by their bare names, as the interpreter finds them beside ``run.py``."""
    names = ("report", "scratch")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    try:
        load("report")
        yield load("scratch")
    finally:
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def host(modules: ModuleType) -> Iterator[Any]:
    scratch = modules.Scratch()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch.path)


def deploy(host: Any, identifier: str, order: int) -> None:
    (host.repository / "images").mkdir(parents=True, exist_ok=True)
    (host.repository / "images" / identifier).touch()
    (host.root / "sysroot/state/deploy" / identifier / "etc").mkdir(parents=True)
    entries = host.root / "efi/loader/entries"
    entries.mkdir(parents=True, exist_ok=True)
    lines = [
        f"title OS {identifier[0]}",
        f"options rw composefs=?{identifier} quiet",
        f"sort-key bootc-x-{order}",
    ]
    (entries / f"bootc_x-{9 - order}.conf").write_text("\n".join(lines))


def test_the_first_entry_is_started(host: Any) -> None:
    deploy(host, OLD, 1)
    deploy(host, NEW, 0)
    assert [entry.deployment for entry in host.menu()] == [NEW, OLD]
    (host.root / "run/composefs").mkdir()
    before = (host.root / "proc/sys/kernel/random/boot_id").read_text()
    assert host.power_on().title == "OS b"
    assert NEW in (host.root / "proc/cmdline").read_text()
    assert f"composefs:{NEW} " in (host.root / "proc/self/mountinfo").read_text()
    assert list((host.root / "run").iterdir()) == []
    assert host.etc.resolve() == host.root / "sysroot/state/deploy" / NEW / "etc"
    assert (host.root / "proc/sys/kernel/random/boot_id").read_text() != before


def test_the_hosts_own_configuration_goes_along(host: Any) -> None:
    deploy(host, OLD, 0)
    host.configure()
    host.power_on()
    assert "opportunistic" in (host.etc / "hostimaged.toml").read_text()
    assert (host.etc / "containers/policy.json").is_file()


def test_what_is_not_there_does_not_start(host: Any, modules: ModuleType) -> None:
    deploy(host, OLD, 0)
    (host.repository / "images" / OLD).unlink()
    with pytest.raises(modules.DemoFailed, match="does not come up"):
        host.power_on()
