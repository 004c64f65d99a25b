"""The service as systemd and the bus run it: started by a call, confined, ended and started again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.names import BUS_NAME, ROOT_PATH
from hostimage_testing.container import Container
from hostimage_testing.debian_root import USER
from hostimage_testing.judge import Judge
from hostimage_testing.person import Person

UNIT = "hostimaged.service"
#: The capabilities that the unit leaves, by their numbers (capabilities(7)): all others are gone for good.
CAPABILITIES = {0, 1, 2, 3, 4, 8, 9, 18, 19, 21, 27, 31}
OTHER = "oci:/srv/other:latest"
#: What takes half a second on a quiet machine may take five times as long where tests run side by side.
STARTUP = 5.0


@pytest.fixture(autouse=True)
def no_traceback(container: Container) -> Iterator[None]:
    """Whatever a test does, the journal has no traceback and no mistake of the unit afterwards."""
    since = container.cursor()
    yield
    logged = container.journal(since=since)
    assert "Traceback" not in logged
    assert "Unknown key" not in logged


def stopped(container: Container) -> None:
    container.run("systemctl", "stop", UNIT)
    assert container.show(UNIT, "ActiveState") == "inactive"


@pytest.mark.parametrize("who", ["nobody", USER])
def test_the_first_status_of_a_user_starts_it(container: Container, who: str) -> None:
    stopped(container)
    started = time.monotonic()
    status = container.service(who, "hostimagectl", "--json", "status")
    elapsed = time.monotonic() - started
    assert status.code == 0, status.err
    document = json.loads(status.out)
    assert document["daemon"]["version"]
    assert container.show(UNIT, "ActiveState") == "active"
    assert container.show(UNIT, "User") in ("", "root")
    assert elapsed < STARTUP
    assert container.service(who, "hostimagectl", "status").code == 0


def test_the_first_status_in_a_session_starts_it(container: Container, user: Person) -> None:
    stopped(container)
    status = user.run("hostimagectl", "status")
    assert status.code == 0, status.err
    assert container.show(UNIT, "ActiveState") == "active"


def test_nobody_else_can_take_the_name(container: Container) -> None:
    script = (
        "import asyncio, sys\n"
        "from hostimage_dbus.transport import BusError, Connection\n"
        "async def main():\n"
        "    connection = await Connection.connect()\n"
        "    try:\n"
        f"        await connection.request_name({BUS_NAME!r})\n"
        "    except BusError as error:\n"
        "        print(error.name)\n"
        "    await connection.close()\n"
        "asyncio.run(main())\n"
    )
    stopped(container)
    assert container.service(USER, "python3", "-c", script).out == f"{ErrorName.ACCESS_DENIED}\n"


def test_the_log_is_set_by_root_only(container: Container) -> None:
    call = ["busctl", "--system", "set-property", BUS_NAME, "/org/freedesktop/LogControl1"]
    call += ["org.freedesktop.LogControl1", "LogLevel", "s", "debug"]
    refused = container.service(USER, *call)
    assert refused.code != 0
    assert "denied" in refused.err.lower() or "only root" in refused.err.lower()
    assert container.run("systemctl", "service-log-level", UNIT).out == "info\n"
    container.run("systemctl", "service-log-level", UNIT, "debug")
    assert container.run("systemctl", "service-log-level", UNIT).out == "debug\n"
    container.run("systemctl", "service-log-level", UNIT, "info")


def test_a_user_without_a_session_may_look_only(container: Container) -> None:
    for command in (["pull"], ["pull", OTHER], ["check"], ["hold", "1h"], ["reload"], ["gc"], ["rollback"]):
        done = container.service("nobody", "hostimagectl", *command)
        assert done.code == EXIT_CODES[ErrorName.AUTHORIZATION_REQUIRED], (command, done.err)
    for command in (["status"], ["images"], ["jobs"]):
        assert container.service("nobody", "hostimagectl", *command).code == 0


def process(container: Container, field: str) -> str:
    """A field of the daemon's /proc/PID/status."""
    text = container.run("cat", f"/proc/{container.show(UNIT, 'MainPID')}/status").out
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{field}:"))


def test_what_the_unit_takes_away_is_gone(container: Container) -> None:
    container.run("hostimagectl", "status")
    bounding = int(process(container, "CapBnd"), 16)
    assert {number for number in range(64) if bounding >> number & 1} == CAPABILITIES
    assert process(container, "NoNewPrivs") == "1"
    assert process(container, "Seccomp") == "2"
    inside = ["nsenter", "--mount", f"--target={container.show(UNIT, 'MainPID')}", "--"]
    for directory in ("/usr", "/etc", "/root", "/home", "/var/lib", "/srv"):
        attempt = container.run(*inside, "touch", f"{directory}/probe", check=False)
        assert "Read-only file system" in attempt.err, directory
    for directory in ("/sysroot", "/boot", "/var/tmp", "/run/hostimaged", "/run/composefs"):
        container.run(*inside, "touch", f"{directory}/probe")
        container.run(*inside, "rm", f"{directory}/probe")
    assert container.run("stat", "--format=%a %U", "/run/hostimaged").out == "755 root\n"


@pytest.mark.interop
@pytest.mark.parametrize("transport", ["oci", "dir", "oci-archive"])
def test_a_pull_within_the_sandbox(container: Container, cfsctl: str, transport: str) -> None:
    """By the direct reader, and by skopeo; the repository is the host's own, as composefs-rs sees it."""
    image = OTHER
    if transport != "oci":
        image = f"{transport}:/srv/other.{transport}"
        if not (container.root / f"srv/other.{transport}").exists():
            container.run("skopeo", "copy", "--quiet", OTHER, image)
    pulled = container.run("hostimagectl", "--json", "pull", image)
    document = json.loads(pulled.out)
    assert document["error"] is None
    images = json.loads(container.run("hostimagectl", "--json", "images").out)
    digests = {row["manifest-digest"] for row in images["images"]}
    assert document["result"]["manifest-digest"] in digests
    Judge(cfsctl, container.root / "sysroot/composefs").check()


@contextmanager
def read_only_sysroot(container: Container) -> Iterator[None]:
    """As bootc leaves it: workers of a pull make it writable, for themselves only."""
    stopped(container)
    container.run("mount", "--bind", "/sysroot", "/sysroot")
    try:
        container.run("mount", "-o", "remount,bind,ro", "/sysroot")
        yield
        stopped(container)
    finally:
        container.run("umount", "/sysroot")


def test_a_pull_where_sysroot_is_mounted_read_only(container: Container) -> None:
    with read_only_sysroot(container):
        assert container.run("touch", "/sysroot/probe", check=False).code != 0
        pulled = container.run("hostimagectl", "--json", "pull", "--no-join", OTHER)
        assert json.loads(pulled.out)["error"] is None
        assert container.run("touch", "/sysroot/probe", check=False).code != 0


def test_reload_reads_the_settings(container: Container) -> None:
    drop_in = container.root / "etc/hostimaged.d/test.toml"
    drop_in.parent.mkdir(exist_ok=True)
    tracked = ["busctl", "get-property", BUS_NAME, ROOT_PATH, f"{BUS_NAME}.Manager", "TrackedImage"]
    before = container.run(*tracked).out
    drop_in.write_text('tracked-image = "oci:/srv/reloaded:1"\n')
    try:
        container.run("systemctl", "reload", UNIT)
        assert container.run(*tracked).out == 's "oci:/srv/reloaded:1"\n'
    finally:
        drop_in.unlink()
        container.run("systemctl", "reload", UNIT)
    assert container.run(*tracked).out == before


def test_it_is_started_again_after_it_was_killed(container: Container) -> None:
    container.run("hostimagectl", "status")
    first = container.show(UNIT, "MainPID")
    container.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    assert container.service("nobody", "hostimagectl", "status").code == 0
    assert container.show(UNIT, "MainPID") not in (first, "0")


def test_it_stops_at_once_and_cleanly(container: Container) -> None:
    container.run("hostimagectl", "status")
    started = time.monotonic()
    stopped(container)
    assert time.monotonic() - started < STARTUP
    assert container.show(UNIT, "Result") == "success"
