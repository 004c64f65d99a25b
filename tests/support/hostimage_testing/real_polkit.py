"""The real polkitd on a private bus, with actions, rules, users and sessions of a test's own.

polkitd reads fixed directories. Here it sees others at these places: it runs in a mount namespace of its own,
in which directories of the test are bound over polkit's, a few files over the user database, and a text over
the /proc/PID/cgroup of each client, from which libsystemd learns the session of a process. So polkitd itself
decides between the columns "active", "inactive" and "any", without logind; the machine is left as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.transport import Connection, Variant
from hostimage_testing.tools import absent

NAME = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
#: The person of the tests: the bus lets in only users that the machine knows. polkitd is told another name.
UID = pwd.getpwnam("nobody").pw_uid
#: Groups that the person is in get numbers from here on.
_FIRST_GID = 65100
#: For the configuration of the bus.
POLICY = f"""
  <policy context="default">
    <allow own="{NAME}"/>
    <allow send_destination="{NAME}"/>
    <allow send_interface="{NAME}.AuthenticationAgent"/>
  </policy>
"""
_PROGRAMS = ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd", "/usr/libexec/polkit-1/polkitd")
_CLIENT = Path(__file__).with_name("session_client.py")
_PATIENCE = 20.0
# /run: whatever polkitd or libsystemd would find there is the machine's, not the test's.
_START = """
set -e
mount --bind "$1/share" /usr/share/polkit-1
mount --bind "$1/etc" /etc/polkit-1
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mount -t tmpfs tmpfs /run
mkdir /run/systemd
mount --bind "$1/systemd" /run/systemd
exec "$2"
"""


@dataclass(frozen=True)
class Session:
    """How logind would describe a session; no session at all is None in its place."""

    id: str = "c1"
    active: bool = True
    seat: str = "seat0"


ACTIVE = Session()
INACTIVE = Session(active=False)
SEATLESS = Session(seat="")


class Person:
    """A program of a user in a session, running on the bus."""

    def __init__(self, process: subprocess.Popen[bytes], session: Session | None) -> None:
        self.process = process
        self.session = session
        self.name = ""
        self._read = b""

    async def next(self) -> dict[str, Any]:
        """The next event it tells of."""
        async with asyncio.timeout(_PATIENCE):
            while b"\n" not in self._read:
                await self._more()
        line, _, self._read = self._read.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    async def _more(self) -> None:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(descriptor, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)
        data = os.read(descriptor, 1 << 16)
        assert data, "the person's program ended"
        self._read += data

    async def register_agent(self) -> None:
        """Become the authentication agent of the session."""
        self.tell("register")
        assert await self.next() == {"event": "registered", "ok": True}

    def tell(self, command: str) -> None:
        """Send it a command (session_client.py)."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def leave(self) -> None:
        """Leave the bus as a program that was killed."""
        self.process.kill()


class RealPolkit:
    """A polkitd to be started on the bus at ``address``; ``directory`` holds all that it reads."""

    def __init__(self, directory: Path, address: str, actions: Sequence[Path]) -> None:
        self.directory = directory
        self.address = address
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("share/actions", "share/rules.d", "etc/rules.d", "systemd/sessions", "systemd/users"):
            (directory / name).mkdir(parents=True, mode=0o755)
        for name in ("systemd/seats", "systemd/machines"):
            (directory / name).mkdir()
        for file in actions:
            shutil.copy(file, directory / "share/actions")
        self.user("person")

    def user(self, name: str, *groups: str) -> None:
        """Call the user ``UID`` so, and put it into ``groups``."""
        others = [line for line in _lines("passwd") if line.split(":")[2] != str(UID)]
        person = f"{name}:x:{UID}:{_FIRST_GID}::/nonexistent:/bin/false"
        (self.directory / "passwd").write_text("\n".join([*others, person, ""]))
        numbered = [f"{group}:x:{gid}:{name}" for gid, group in enumerate([name, *groups], _FIRST_GID)]
        (self.directory / "group").write_text("\n".join([*_lines("group"), *numbered, ""]))

    def rules(self, text: str, name: str = "50-test.rules") -> None:
        """Install an administrator's rules; before the start."""
        (self.directory / "etc/rules.d" / name).write_text(text)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run polkitd until the end of the block."""
        program = next((path for path in _PROGRAMS if os.access(path, os.X_OK)), None)
        if program is None:
            absent("polkitd is not installed")
        _check_namespaces()
        connection = await Connection.connect(self.address)
        try:
            with self._started(str(program)):
                await self._owned(connection)
                yield
        finally:
            await connection.close()

    @contextmanager
    def person(self, session: Session | None) -> Iterator[Person]:
        """A program of the user in ``session``, while polkitd runs; not connected yet."""
        argv = [sys.executable, str(_CLIENT), self.address, str(UID), session.id if session else ""]
        with subprocess.Popen(
            argv,
            env={"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                if session is not None:
                    self._place(process.pid, session)
                yield Person(process, session)
            finally:
                process.kill()

    def stop(self, number: int) -> None:
        """Send polkitd a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    @contextmanager
    def _started(self, program: str) -> Iterator[None]:
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _START, "sh"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, str(self.directory), program],
                env={"DBUS_SYSTEM_BUS_ADDRESS": self.address, "PATH": os.environ["PATH"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    async def _owned(self, connection: Connection) -> None:
        """Wait until polkitd has its name."""
        assert self.process is not None
        owned = asyncio.Event()
        connection.on_signal(lambda *signal: owned.set() if signal[3][0] == NAME else None)
        await connection.add_match(f"type='signal',member='NameOwnerChanged',arg0='{NAME}'")
        try:
            async with asyncio.timeout(_PATIENCE):
                await owned.wait()
        except TimeoutError:
            pytest.fail(f"polkitd did not start:\n{(self.directory / 'log').read_text()}")

    def _place(self, pid: int, session: Session) -> None:
        """Let polkitd see the process ``pid`` in ``session``."""
        state = "active" if session.active else "online"
        described = f"UID={UID}\nUSER=person\nACTIVE={int(session.active)}\nSTATE={state}\nCLASS=user\n"
        if session.seat:
            described += f"SEAT={session.seat}\n"
        (self.directory / "systemd/sessions" / session.id).write_text(described)
        (self.directory / "systemd/users" / str(UID)).write_text(f"NAME=person\nSTATE={state}\n")
        unit = f"/user.slice/user-{UID}.slice/session-{session.id}.scope"
        cgroup = self.directory / f"cgroup-{pid}"
        cgroup.write_text(f"1:name=systemd:{unit}\n0::{unit}\n")
        assert self.process is not None
        enter = ["nsenter", "--mount", "--target", str(self.process.pid), "mount", "--bind"]
        subprocess.run([*enter, str(cgroup), f"/proc/{pid}/cgroup"], check=True)


def _check_namespaces() -> None:
    probe = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "true"], check=False, capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip("mount namespaces are not permitted here")


def _lines(database: str) -> list[str]:
    return [line for line in Path("/etc", database).read_text().splitlines() if line.count(":") >= 3]


async def enter_password(connection: Connection, dialog: dict[str, Any]) -> None:
    """Tell polkitd what its helper tells it after the right password; ``connection`` is root's."""
    identity = ["unix-user", {"uid": Variant("u", dialog["uids"][0])}]
    await connection.call(
        NAME,
        PATH,
        f"{NAME}.Authority",
        "AuthenticationAgentResponse2",
        "us(sa{sv})",
        [UID, dialog["cookie"], identity],
    )
