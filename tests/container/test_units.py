"""The units that a host lives with: finalizing at shutdown, the check after the boot, the daily update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostimage_testing.container import Container

UNITS = (
    "hostimaged.service",
    "hostimaged-finalize.service",
    "hostimaged-boot-check.service",
    "hostimaged-update.service",
    "hostimaged-update.timer",
)
#: Kernel command lines are the host's here: without the conditions, which are looked at on their own.
_ANYWHERE = "[Unit]\nConditionKernelCommandLine=\n"
PATIENCE = 60.0


@contextmanager
def drop_in(container: Container, unit: str, text: str) -> Iterator[None]:
    path = container.root / f"etc/systemd/system/{unit}.d/test.conf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    container.run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        container.run("systemctl", "stop", unit, check=False)
        path.unlink()
        container.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_it(container: Container, unit: str) -> None:
    assert container.show(unit, "FragmentPath") == f"/usr/lib/systemd/system/{unit}"
    verified = container.run("systemd-analyze", "verify", "--man=no", unit)
    assert (verified.out, verified.err) == ("", "")


@pytest.mark.parametrize("unit", [unit for unit in UNITS[1:] if unit != "hostimaged-update.timer"])
def test_it_is_confined(container: Container, unit: str) -> None:
    exposure = container.run("systemd-analyze", "security", "--threshold=60", unit, check=False)
    assert exposure.code == 0, exposure.out


@pytest.mark.parametrize("unit", UNITS[1:])
def test_it_does_not_run_on_other_hosts(container: Container, unit: str) -> None:
    container.run("systemctl", "start", unit)
    assert container.show(unit, "LoadState") == "loaded"
    assert container.show(unit, "ConditionResult") == "no"
    assert container.show(unit, "ActiveState") == "inactive"


def test_it_finalizes_when_it_is_stopped(container: Container) -> None:
    unit = "hostimaged-finalize.service"
    with drop_in(container, unit, _ANYWHERE):
        container.run("systemctl", "start", unit)
        assert container.show(unit, "ActiveState") == "active"
        since = container.cursor()
        container.run("systemctl", "stop", unit)
        assert container.show(unit, "Result") == "success"
        assert container.journal(unit, since).splitlines()[-4:].count("nothing-staged") == 1


def test_the_finalizer_goes_before_that_of_bootc_and_after_the_daemon(container: Container) -> None:
    """Units stop in the reverse order of their start."""
    unit = "hostimaged-finalize.service"
    assert "bootc-finalize-staged.service" in container.show(unit, "After").split()
    assert unit in container.show("hostimaged.service", "After").split()
    before = container.show(unit, "Before").split()
    assert {"basic.target", "shutdown.target", "final.target"} <= set(before)


def test_it_stays_when_a_boot_directory_goes(container: Container) -> None:
    """An automount stops the mount of what is idle; a unit that requires it would end hours too early."""
    unit = "hostimaged-finalize.service"
    mount = container.root / "etc/systemd/system/efi.mount"
    mount.write_text("[Mount]\nWhat=tmpfs\nWhere=/efi\nType=tmpfs\n")
    try:
        with drop_in(container, unit, _ANYWHERE):
            container.run("systemctl", "start", "efi.mount", unit)
            assert "efi.mount" in container.show(unit, "After").split()
            container.run("systemctl", "stop", "efi.mount")
            assert container.show("efi.mount", "ActiveState") == "inactive"
            assert container.show(unit, "ActiveState") == "active"
            # Nor does the way to rescue.target.
            assert container.show(unit, "IgnoreOnIsolate") == "yes"
    finally:
        mount.unlink()
        container.run("systemctl", "daemon-reload")


def test_the_boot_is_checked(container: Container) -> None:
    unit = "hostimaged-boot-check.service"
    with drop_in(container, unit, _ANYWHERE):
        since = container.cursor()
        container.run("systemctl", "start", unit)
        assert container.show(unit, "Result") == "success"
        assert container.show(unit, "ActiveState") == "active"
        assert "as-expected" in container.journal(unit, since)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("none", "the update policy is none"),
        ("check", "oci:/srv/os:latest"),
        ("download", "oci:/srv/os:latest"),
    ],
)
def test_the_timer_fires(container: Container, policy: str, said: str) -> None:
    service, timer = "hostimaged-update.service", "hostimaged-update.timer"
    soon = f"{_ANYWHERE}[Timer]\nOnCalendar=\nOnActiveSec=1\nRandomizedDelaySec=0\nAccuracySec=1\n"
    container.run("hostimagectl", "policy", policy)
    try:
        with drop_in(container, service, _ANYWHERE), drop_in(container, timer, soon):
            since = container.cursor()
            container.run("systemctl", "start", timer)
            end = time.monotonic() + PATIENCE
            while said not in (logged := container.journal(service, since)):
                assert time.monotonic() < end, logged
                time.sleep(0.5)
            while container.show(service, "ActiveState") != "inactive":
                assert time.monotonic() < end
                time.sleep(0.2)
            assert container.show(service, "Result") == "success", logged
    finally:
        container.run("hostimagectl", "policy", "none")


def test_the_daemon_tells_when_the_timer_is_due(container: Container) -> None:
    timer = "hostimaged-update.timer"
    next_check = (
        "busctl",
        "get-property",
        "org.hostimage1",
        "/org/hostimage1",
        "org.hostimage1.Manager",
        "NextCheck",
    )
    assert container.run(*next_check).out == "t 0\n"
    container.run("hostimagectl", "policy", "check")
    try:
        with drop_in(container, timer, _ANYWHERE):
            container.run("systemctl", "start", timer)
            end = time.monotonic() + PATIENCE
            while (due := int(container.run(*next_check).out.split()[1])) == 0:
                assert time.monotonic() < end
                time.sleep(0.2)
            # Some time until the end of tomorrow, and its delay.
            assert 0 < due / 1_000_000 - time.time() < 30 * 3600
            shown = container.show(timer, "NextElapseUSecRealtime")
            assert shown, "systemd says so too"
            container.run("systemctl", "stop", timer)
            while container.run(*next_check).out != "t 0\n":
                assert time.monotonic() < end
                time.sleep(0.2)
    finally:
        container.run("hostimagectl", "policy", "none")


def test_the_run_directories_are_there(container: Container) -> None:
    container.run("systemd-tmpfiles", "--create", "hostimaged.conf")
    shown = container.run("stat", "--format=%a %U %F", "/run/hostimaged", "/run/composefs").out.splitlines()
    assert shown == ["755 root directory"] * 2
