"""The unit of a process."""

from __future__ import annotations

import os
import subprocess

import pytest

from hostimaged.system import units
from hostimaged.system.units import unit_of_cgroup, unit_of_process


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/cron.service\n", "cron.service"),
        ("0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", "session-2.scope"),
        # What a user's own manager, or a container, does below is their business.
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/evil.service\n", "user@1000.service"),
        ("0::/system.slice/a.service/system.slice/cron.service\n", "a.service"),
        ("0::/machine.slice/libpod-0a.scope/container/init.scope\n", "libpod-0a.scope"),
        (r"0::/system.slice/dev-disk-by\x2dlabel.service", r"dev-disk-by\x2dlabel.service"),
        ("0::/system.slice/_cpu.service\n", "cpu.service"),
        ("0::/init.scope\n", "init.scope"),
        # Controllers with hierarchies of their own.
        (
            "12:pids:/x.service\n1:name=systemd:/system.slice/a.service\n0::/system.slice/a.service",
            "a.service",
        ),
        ("1:name=systemd:/system.slice/a.service\n0::/\n", "a.service"),
        ("12:pids:/x.service\n", ""),
        ("0::/\n", ""),
        ("", ""),
        ("0:", ""),
        ("nonsense", ""),
        ("0::relative.service", ""),
        # Another namespace than ours.
        ("0::/../../system.slice/a.service\n", ""),
        ("0::/kubepods/a.service\n", ""),
        # Hostile names.
        ("0::/system.slice/a b.service\n", ""),
        ("0::/system.slice/\x1b[2J.service\n", ""),
        ("0::/system.slice/\u202e.service\n", ""),
        ("0::/system.slice/caf\u00e9.service\n", ""),
        ("0::/system.slice/.service\n", ""),
        ("0::/system.slice/" + "a" * 248 + ".service\n", ""),
        ("0::/system.slice/" + "a" * 247 + ".service\n", "a" * 247 + ".service"),
        ("0::/" + "a.slice/" * 10_000, ""),
        ("0::/system.slice/a.service (deleted)\n", ""),
    ],
)
def test_unit_in_a_path(text: str, unit: str) -> None:
    assert unit_of_cgroup(text) == unit


def test_a_process_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = units._read
    content = "0::/system.slice/cron.service\n"
    monkeypatch.setattr(
        units, "_read", lambda path, limit: content if path.endswith("cgroup") else real(path, limit)
    )
    assert unit_of_process(os.getpid(), os.getuid()) == "cron.service"
    assert unit_of_process(os.getpid(), os.getuid() + 1) == "", "the number of another user's process"


def test_a_process_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    real = units._read

    def read(path: str, limit: int) -> str:
        text = real(path, limit)
        if path.endswith("cgroup"):
            process.kill()
            process.wait()
            return "0::/system.slice/cron.service\n"
        return text

    monkeypatch.setattr(units, "_read", read)
    assert unit_of_process(process.pid, os.getuid()) == ""
    assert unit_of_process(process.pid, os.getuid()) == ""


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 70])
def test_no_process(pid: int) -> None:
    assert unit_of_process(pid, 0) == ""


def test_this_process_has_what_it_has() -> None:
    """Whatever this machine's answer is, it is a unit or nothing."""
    unit = unit_of_process(os.getpid(), os.getuid())
    assert unit == "" or unit.endswith((".service", ".scope"))
