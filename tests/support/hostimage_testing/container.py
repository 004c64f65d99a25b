"""A booted Debian 13 with the project installed in it: its own systemd, bus, logind and polkit.

The root is made once (or once per ``HOSTIMAGE_TEST_CACHE``); nothing of the machine is bound into it, it has
no network but its own loopback, and it runs below cgroups of its own. Programs get in through the namespaces
of the container's init; people are services with a login session (``hostimage_testing.person``).
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing.debian_root import ENVIRONMENT, add_people, bootstrap, install_wheel, unpack
from hostimage_testing.processes import Process, descendants
from hostimage_testing.tools import Finished, absent, require

PACKAGES = (
    *("systemd", "systemd-sysv", "libpam-systemd", "dbus", "dbus-broker", "polkitd", "pkexec", "login"),
    *("passwd", "util-linux", "python3", "python3-pip", "python3-zstandard", "python3-pydantic"),
    *("python3-structlog", "python3-dbus-next", "skopeo", "podman", "crun"),
)
#: Implementations of the bus.
BUSES = ("dbus-daemon", "dbus-broker")
#: Where the programs of the tests are inside.
PROGRAMS = "/opt/hostimage-testing"
BOOT_LIMIT = 120.0
#: Seconds for an orderly shutdown; then the container is killed. Within it systemd kills units that do not
#: end in their time: ours, which says so itself, and all others in ``UNIT_LIMIT``.
STOP_LIMIT = 60.0
UNIT_LIMIT = 10
#: Seconds until what was killed is gone.
KILL_LIMIT = 10.0
#: Seconds in which polkitd says its version.
POLKIT_LIMIT = 10
_DROP_INS = {
    # Tests stop and start it more often than five times in ten seconds.
    "system/hostimaged.service.d/test.conf": "[Unit]\nStartLimitIntervalSec=0\n",
    # Whatever misses its signal to end may keep a shutdown for 90 s, the manager of a user for 120 s.
    "system.conf.d/test.conf": f"[Manager]\nDefaultTimeoutStopSec={UNIT_LIMIT}s\n",
    "user.conf.d/test.conf": f"[Manager]\nDefaultTimeoutStopSec={UNIT_LIMIT}s\n",
    "system/user@.service.d/test.conf": f"[Service]\nTimeoutStopSec={UNIT_LIMIT}s\n",
}
_JOIN_AND_EXEC = 'for group in $1; do echo $$ >"$group/cgroup.procs"; done; shift; exec "$@"'


def prepare(directory: Path, cache: Path) -> Path:
    """Make a root with the project installed, below ``directory``; its base is kept in ``cache``."""
    base = cache / "container.tar"
    if not base.exists():
        bootstrap(base, PACKAGES)
    root = directory / "root"
    unpack(base, root)
    install_wheel(root, directory)
    add_people(root)
    programs = root / PROGRAMS.lstrip("/")
    programs.mkdir()
    for name in ("person_inside.py", "session_client.py"):
        shutil.copy(Path(__file__).with_name(name), programs)
    for name, text in _DROP_INS.items():
        drop_in = root / "etc/systemd" / name
        drop_in.parent.mkdir()
        drop_in.write_text(text)
    return root


@dataclass
class Container:
    """A running container; ``leader`` is its init as this machine numbers it."""

    root: Path
    bus: str
    leader: int

    def command(self, *argv: str) -> list[str]:
        """What to execute here for ``argv`` to run inside as root."""
        enter = [
            "nsenter",
            f"--target={self.leader}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--root",
            "--wd",
        ]
        return [*enter, *ENVIRONMENT, *argv]

    def run(self, *argv: str, check: bool = True, limit: float = 60) -> Finished:
        """Run a program inside as root to its end."""
        done = subprocess.run(
            self.command(*argv),
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=limit,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(argv)} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return Finished(done.returncode, done.stdout, done.stderr)

    def service(self, user: str, *argv: str, limit: float = 60) -> Finished:
        """Run a program inside as a service of ``user``, in no session."""
        start = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--uid={user}", "--", *argv]
        return self.run(*start, check=False, limit=limit)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).out.strip()

    def journal(self, unit: str = "hostimaged.service", since: str = "") -> str:
        """What a unit has logged, after the position ``since`` (see ``cursor``)."""
        after = [f"--after-cursor={since}"] if since else []
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}", *after).out

    def polkit_answers(self) -> bool:
        """Whether polkitd, which is asked by one thread of its own at a time, is not stuck."""
        where = ("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority")
        read = ["busctl", f"--timeout={POLKIT_LIMIT}", "get-property", *where]
        return self.run(*read, f"{where[0]}.Authority", "BackendVersion", check=False).code == 0

    def threads(self, unit: str) -> str:
        """What each thread of a service is doing, as far as the kernel tells."""
        shown = "for t in /proc/$1/task/*; do head -n 20 $t/comm $t/wchan $t/syscall $t/stack; done 2>&1"
        return self.run("sh", "-c", shown, "sh", self.show(unit, "MainPID"), check=False).out

    def cursor(self) -> str:
        """The journal's present position."""
        self.run("journalctl", "--sync")
        shown = self.run("journalctl", "--no-pager", "--lines=1", "--show-cursor", "--output=cat").out
        return shown.rpartition("-- cursor: ")[2].strip()


@contextmanager
def booted(root: Path, bus: str) -> Iterator[Container]:
    """Boot ``root`` with one of ``BUSES``; shut down, and nothing left behind, at the end of the block."""
    nspawn = require("systemd-nspawn")
    require("nsenter")
    if os.geteuid() != 0:
        absent("a container needs root")
    alias = root / "etc/systemd/system/dbus.service"
    alias.unlink(missing_ok=True)
    # Without the alias, dbus.service is dbus-daemon's own unit.
    if bus == "dbus-broker":
        alias.symlink_to("/usr/lib/systemd/system/dbus-broker.service")
    # No two at a time share a name: systemd-nspawn, and the hierarchies of cgroups, know it by that.
    name = f"hostimage-test-{os.getpid()}-{time.monotonic_ns()}"
    argv = [
        nspawn, "--quiet", f"--directory={root}", f"--machine={name}", "--boot",
        "--register=no", "--keep-unit", "--private-network", "--resolv-conf=off", "--timezone=off",
        "--link-journal=no", "--notify-ready=yes", "--console=read-only",
    ]  # fmt: skip
    console = root.parent / "console"
    with _cgroups(name) as groups, _notifications() as (path, listener), console.open("wb") as output:
        # Its parent's end is its own: nothing of a test run that was killed stays.
        wrapped = [
            "setpriv",
            "--pdeathsig",
            "TERM",
            "sh",
            "-ec",
            _JOIN_AND_EXEC,
            "sh",
            " ".join(groups),
            *argv,
        ]
        process = subprocess.Popen(
            wrapped,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": path},
        )
        leader = container = None
        try:
            container = Container(root, bus, _wait_until_ready(process, listener, console))
            leader = os.pidfd_open(container.leader)
            container.run("systemctl", "is-system-running", "--wait", limit=BOOT_LIMIT)
            yield container
        finally:
            try:
                _stop(process, leader, container)
            finally:
                # It removes that itself only where /run is in memory.
                shutil.rmtree(f"/run/systemd/nspawn/propagate/{name}", ignore_errors=True)


@contextmanager
def _notifications() -> Iterator[tuple[str, socket.socket]]:
    """A socket that systemd-nspawn tells of the container's start (sd_notify(3))."""
    with tempfile.TemporaryDirectory(prefix="hostimage-") as directory:
        path = f"{directory}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(path)
            yield path, listener


def _wait_until_ready(process: subprocess.Popen[bytes], listener: socket.socket, console: Path) -> int:
    """Wait for the container's init to be ready; gives its process id. Closes ``listener``.

    It is told of units and jobs until the end. Nobody reads that, and a socket that is open and full stops
    systemd-nspawn, then the init that tells it, in the middle of the shutdown.
    """
    end = time.monotonic() + BOOT_LIMIT
    leader = -1
    ended = os.pidfd_open(process.pid)
    try:
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([listener, ended], [], [], left)
            if listener not in ready:
                break
            for line in listener.recv(4096).decode().splitlines():
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    leader = int(line.partition("=")[2])
                if line == "READY=1" and leader > 0:
                    return leader
    finally:
        listener.close()
        os.close(ended)
    raise RuntimeError(f"the container did not start:\n{console.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes], leader: int | None, running: Container | None) -> None:
    """Shut the container down, or kill it and say what kept it; ``leader``: its init's pidfd, closed here."""
    try:
        process.send_signal(signal.SIGTERM)
        if _ends(process, STOP_LIMIT):
            return
        kept = "" if running is None else _what_keeps(running)
        # The second one makes systemd-nspawn kill what runs in the container, and clean up after it.
        process.send_signal(signal.SIGTERM)
        if not _ends(process, KILL_LIMIT):
            if leader is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(leader, signal.SIGKILL)
            if not _ends(process, KILL_LIMIT):
                process.kill()
                process.wait()
        pytest.fail(f"the container did not shut down in {STOP_LIMIT:.0f} s:\n{kept}")
    finally:
        if leader is not None:
            select.select([leader], [], [], KILL_LIMIT)
            os.close(leader)


def _ends(process: subprocess.Popen[bytes], limit: float) -> bool:
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        return False
    return True


def _what_keeps(container: Container) -> str:
    """What a container that shuts down still does: jobs of its systemd, processes, the end of its console."""
    shown = []
    with suppress(subprocess.TimeoutExpired):
        jobs = container.run("systemctl", "--no-pager", "list-jobs", check=False, limit=10)
        shown.append(jobs.out or jobs.err)
    for process in [Process(container.leader), *descendants(container.leader)]:
        with suppress(OSError):
            shown.append(f"{process.pid} {process.parent} {process.state} {process.command or process.name}")
    console = container.root.parent / "console"
    return "\n".join([*shown, console.read_text(errors="replace")[-2000:]])


@contextmanager
def _cgroups(name: str) -> Iterator[Sequence[str]]:
    """Empty cgroups below our own in every hierarchy that systemd uses, of one name in all.

    The container's systemd manages the cgroup it finds itself in; two of them in one would kill each other's
    processes.
    """
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, below = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            parent = _mount_point(controllers) / below.lstrip("/")
            _remove_stale(parent)
            made.append(parent / name)
    for group in made:
        group.mkdir()
    try:
        yield [str(group) for group in made]
    finally:
        for group in made:
            _remove(group)


def _remove_stale(parent: Path) -> None:
    """Remove what runs of the tests left that were killed."""
    for left in parent.glob("hostimage-test-*"):
        if not Path(f"/proc/{left.name.split('-')[2]}").exists():
            with suppress(OSError):
                _remove(left)


def _remove(group: Path) -> None:
    """Remove a cgroup with all below it; what still runs there is killed."""
    end = time.monotonic() + KILL_LIMIT
    # Another hierarchy's may have been removed along with this one.
    while group.exists():
        try:
            for directory, _, _ in os.walk(group, topdown=False):
                os.rmdir(directory)
        except OSError:
            # A process counts until it is gone for good, which may be after its parent was told.
            if time.monotonic() > end:
                raise
            for procs in group.rglob("cgroup.procs"):
                for pid in procs.read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)


def _mount_point(controllers: str) -> Path:
    """Where a hierarchy of cgroups is mounted: the unified one (""), or that of systemd."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and not controllers:
            return Path(where)
        if kind == "cgroup" and controllers and controllers in options.split(","):
            return Path(where)
    pytest.skip("no hierarchy of cgroups is mounted")
