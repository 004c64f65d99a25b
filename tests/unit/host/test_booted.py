"""Which deployment runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hostimaged.boot.esp import Mount, parse_mountinfo
from hostimaged.errors import BootLoaderError
from hostimaged.host.booted import Booted, booted_from, read_booted
from hostimaged.ids import DeploymentId
from hostimaged.system.paths import HostPaths

ONE = DeploymentId("1a" * 64)
TWO = DeploymentId("2b" * 64)


def root(source: str) -> Mount:
    (mount,) = parse_mountinfo(f"36 1 0:31 / / ro shared:1 master:2 - overlay {source} ro\n".encode())
    return mount


@pytest.mark.parametrize(
    ("cmdline", "source", "expected"),
    [
        (f"root=UUID=1 composefs={ONE} rw", f"composefs:{ONE}", Booted(ONE, cmdline_id=ONE)),
        (f"composefs=?{ONE}", f"composefs:{ONE}", Booted(ONE, optional=True, cmdline_id=ONE)),
        (
            f"composefs={ONE}",
            f"transient:composefs={ONE}",
            Booted(ONE, transient=True, cmdline_id=ONE),
        ),
        # After a soft reboot the mount is right, and the ? of the command line still holds.
        (f"composefs=?{ONE}", f"composefs:{TWO}", Booted(TWO, optional=True, cmdline_id=ONE)),
        (
            f"composefs.digest=?v1-sha512-12:{ONE}",
            f"composefs:{ONE}",
            Booted(ONE, optional=True, cmdline_id=ONE),
        ),
        ("quiet", f"composefs:{ONE}", None),
        ("", "/dev/vda1", None),
        ('"a b" composefs', "/dev/vda1", None),
    ],
)
def test_what_runs(cmdline: str, source: str, expected: Booted | None) -> None:
    assert booted_from(cmdline, root(source)) == expected
    assert expected is None or expected.soft_rebooted == (expected.id == TWO)


@pytest.mark.parametrize("mount", [None, root("/dev/vda1"), root("composefs:abc"), root(f"x:{ONE}")])
def test_a_root_that_is_none_is_said_and_not_guessed(mount: Mount | None) -> None:
    with pytest.raises(BootLoaderError, match="not mounted from one"):
        booted_from(f"composefs={ONE}", mount)


def test_a_malformed_argument_is_said() -> None:
    with pytest.raises(BootLoaderError, match="128 hex digits"):
        booted_from("composefs=abc", root(f"composefs:{ONE}"))


def test_facts_that_are_missing_mean_that_nothing_runs(tmp_path: Path) -> None:
    paths = HostPaths.scratch(tmp_path)
    assert read_booted(paths, []) is None
    assert read_booted(dataclasses.replace(paths, cmdline=None), []) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cmdline").write_text(f"composefs={ONE}\n")
    table = [root(f"composefs:{TWO}"), root(f"composefs:{ONE}")]
    assert read_booted(paths, table) == Booted(ONE, cmdline_id=ONE)
