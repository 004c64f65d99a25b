"""Every file is where the bus, polkit, systemd and the shells look for it, and they take it."""

from __future__ import annotations

import csv
import stat
from pathlib import Path, PurePosixPath

from hostimage_dbus.names import BUS_NAME
from hostimage_testing.container import Container
from hostimage_testing.debian_root import USER
from hostimage_testing.wheel import SCRIPTS, SHARED_DATA

PROGRAMS = {"bin/hostimaged", "bin/hostimagectl"}
PACKAGES = "lib/python3/dist-packages"
ACTIONS = {
    "check": ("auth_admin", "auth_admin", "yes"),
    "update": ("auth_admin", "auth_admin", "yes"),
    "cancel": ("auth_admin", "auth_admin", "yes"),
    "switch-image": ("auth_admin", "auth_admin", "auth_admin"),
    "rollback": ("auth_admin", "auth_admin", "auth_admin_keep"),
    "cleanup": ("auth_admin", "auth_admin", "auth_admin_keep"),
    "configure": ("auth_admin", "auth_admin", "auth_admin_keep"),
}


def test_every_file_is_at_its_place(root: Path) -> None:
    (record,) = (root / "usr" / PACKAGES).glob("hostimaged-*.dist-info/RECORD")
    with record.open(newline="") as rows:
        listed = {row[0] for row in csv.reader(rows)}
    outside = {_normal(f"{PACKAGES}/{name}") for name in listed if name.startswith("..")}
    assert outside == SHARED_DATA | PROGRAMS
    assert not list((root / "usr/local").rglob("*hostimage*"))
    for name in outside:
        status = (root / "usr" / name).lstat()
        assert stat.S_ISREG(status.st_mode), name
        assert (status.st_uid, status.st_gid) == (0, 0), name
        assert stat.S_IMODE(status.st_mode) == (0o755 if name in PROGRAMS | SCRIPTS else 0o644), name


def _normal(name: str) -> str:
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def test_the_bus_can_start_it(container: Container) -> None:
    rows = container.run("busctl", "--no-legend", "list", "--activatable", "--acquired").out.splitlines()
    assert BUS_NAME in {row.split()[0] for row in rows}


def test_polkit_knows_the_actions(container: Container) -> None:
    shown = container.run("pkaction").out.split()
    assert {name for name in shown if name.startswith(BUS_NAME)} == {f"{BUS_NAME}.{name}" for name in ACTIONS}
    for name, columns in ACTIONS.items():
        text = container.run("pkaction", "--verbose", "--action-id", f"{BUS_NAME}.{name}").out
        values = dict(line.strip().split(":", 1) for line in text.splitlines()[1:] if ":" in line)
        found = tuple(values[f"implicit {column}"].strip() for column in ("any", "inactive", "active"))
        assert found == columns, name


def test_systemd_takes_the_unit(container: Container) -> None:
    assert (
        container.show("hostimaged.service", "FragmentPath") == "/usr/lib/systemd/system/hostimaged.service"
    )
    verified = container.run("systemd-analyze", "verify", "hostimaged.service")
    assert (verified.out, verified.err) == ("", "")
    exposure = container.run(
        "systemd-analyze", "security", "--threshold=60", "hostimaged.service", check=False
    )
    assert exposure.code == 0, exposure.out


def test_the_second_name_of_the_unit(container: Container) -> None:
    """An administrator's ``systemctl enable`` gives the unit the name that services of the bus have."""
    container.run("systemctl", "enable", "hostimaged.service")
    try:
        assert container.show("dbus-org.hostimage1.service", "Id") == "hostimaged.service"
    finally:
        container.run("systemctl", "disable", "hostimaged.service")
    assert container.show("dbus-org.hostimage1.service", "LoadState") == "not-found"


def test_programs_and_completion_work_for_a_user(container: Container) -> None:
    assert container.service(USER, "hostimagectl", "--version").out.startswith("hostimagectl ")
    assert container.service(USER, "hostimaged", "--version").out.startswith("hostimaged ")
    script = "/usr/share/bash-completion/completions/hostimagectl"
    loaded = container.service(USER, "bash", "-c", f"source {script} && complete -p hostimagectl")
    assert loaded.code == 0, loaded.err
    assert loaded.out.endswith("hostimagectl\n")
