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

from hostimage_testing.tools import Finished, absent, require
from hostimage_testing.wheel import build_wheel

PACKAGES = (
    "systemd,systemd-sysv,libpam-systemd,dbus,dbus-broker,polkitd,pkexec,login,passwd,util-linux,"
    "python3,python3-pip,python3-zstandard,python3-pydantic,python3-structlog,python3-dbus-next,skopeo"
)
#: Implementations of the bus.
BUSES = ("dbus-daemon", "dbus-broker")
#: Who knows a password that polkit accepts, and who knows none.
ADMINISTRATOR, USER = "alice", "bob"
PASSWORD = "correct horse"
#: Where the programs of the tests are inside.
PROGRAMS = "/opt/hostimage-testing"
BOOT_LIMIT = 120.0
#: Seconds for an orderly shutdown; then the container is killed.
STOP_LIMIT = 60.0
_ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")
_JOIN_AND_EXEC = 'for group in $1; do echo $$ >"$group/cgroup.procs"; done; shift; exec "$@"'


def prepare(directory: Path, cache: Path) -> Path:
    """Make a root with the project installed, below ``directory``; its base is kept in ``cache``."""
    base = cache / "container.tar"
    if not base.exists():
        _bootstrap(base)
    root = directory / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", root, "--numeric-owner", "-xpf", base], check=True)
    _install(root, build_wheel(directory))
    _add_people(root)
    programs = root / PROGRAMS.lstrip("/")
    programs.mkdir()
    for name in ("person_inside.py", "session_client.py"):
        shutil.copy(Path(__file__).with_name(name), programs)
    # Tests stop and start it more often than five times in ten seconds.
    drop_in = root / "etc/systemd/system/hostimaged.service.d/test.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Unit]\nStartLimitIntervalSec=0\n")
    return root


def _bootstrap(base: Path) -> None:
    program = require("mmdebstrap")
    base.parent.mkdir(parents=True, exist_ok=True)
    partial = base.with_suffix(".partial.tar")
    argv = [
        program,
        "--variant=minbase",
        "--mode=root",
        f"--include={PACKAGES}",
        "--quiet",
        "trixie",
        partial,
    ]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        absent(f"mmdebstrap failed: {done.stderr[-500:]}")
    partial.rename(base)


def _in_root(root: Path, *argv: str, feed: str = "") -> None:
    done = subprocess.run(
        ["chroot", root, *_ENVIRONMENT, *argv], check=False, capture_output=True, text=True, input=feed
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed in the root: {done.stdout}\n{done.stderr}")


def _install(root: Path, wheel: Path) -> None:
    """As a package would: below /usr, where bus, polkit and systemd look, without fetching anything."""
    copy = Path(shutil.copy(wheel, root))
    pip = [
        "pip",
        "install",
        "--quiet",
        "--break-system-packages",
        "--prefix",
        "/usr",
        "--no-deps",
        "--no-index",
    ]
    pip += ["--root-user-action=ignore", "--disable-pip-version-check"]
    _in_root(root, "env", "DEB_PYTHON_INSTALL_LAYOUT=deb", *pip, f"/{wheel.name}")
    copy.unlink()


def _add_people(root: Path) -> None:
    _in_root(root, "useradd", "--create-home", "--groups", "sudo", ADMINISTRATOR)
    _in_root(root, "useradd", "--create-home", USER)
    _in_root(root, "chpasswd", feed=f"{ADMINISTRATOR}:{PASSWORD}\n")


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
        return [*enter, *_ENVIRONMENT, *argv]

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
    argv = [
        nspawn, "--quiet", f"--directory={root}", f"--machine={root.parent.name[-50:]}", "--boot",
        "--register=no", "--keep-unit", "--private-network", "--resolv-conf=off", "--timezone=off",
        "--link-journal=no", "--notify-ready=yes", "--console=read-only",
    ]  # fmt: skip
    console = root.parent / "console"
    with _cgroups() as groups, _notifications() as (path, listener), console.open("wb") as output:
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
        leader = None
        try:
            container = Container(root, bus, _wait_until_ready(process, listener, console))
            leader = os.pidfd_open(container.leader)
            container.run("systemctl", "is-system-running", "--wait", limit=BOOT_LIMIT)
            yield container
        finally:
            _stop(process, leader)


@contextmanager
def _notifications() -> Iterator[tuple[str, socket.socket]]:
    """A socket that systemd-nspawn tells of the container's start (sd_notify(3))."""
    with tempfile.TemporaryDirectory(prefix="hostimage-") as directory:
        path = f"{directory}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(path)
            yield path, listener


def _wait_until_ready(process: subprocess.Popen[bytes], listener: socket.socket, console: Path) -> int:
    """Wait for the container's init to be ready; gives its process id."""
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
        os.close(ended)
    raise RuntimeError(f"the container did not start:\n{console.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes], leader: int | None) -> None:
    """Shut the container down, or kill it; ``leader``: pidfd of its init, which is closed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if leader is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(leader, signal.SIGKILL)
            pytest.fail("the container did not shut down")
    if leader is not None:
        os.close(leader)


@contextmanager
def _cgroups() -> Iterator[Sequence[str]]:
    """Empty cgroups below our own in every hierarchy that systemd uses.

    The container's systemd manages the cgroup it finds itself in; two of them in one would kill each other's
    processes.
    """
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, below = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            parent = _mount_point(controllers) / below.lstrip("/")
            made.append(parent / f"hostimage-test-{os.getpid()}-{time.monotonic_ns()}")
    for group in made:
        group.mkdir()
    try:
        yield [str(group) for group in made]
    finally:
        for group in made:
            for directory, _, _ in os.walk(group, topdown=False):
                os.rmdir(directory)


def _mount_point(controllers: str) -> Path:
    """Where a hierarchy of cgroups is mounted: the unified one (""), or that of systemd."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and not controllers:
            return Path(where)
        if kind == "cgroup" and controllers and controllers in options.split(","):
            return Path(where)
    pytest.skip("no hierarchy of cgroups is mounted")
