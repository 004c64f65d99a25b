"""A private bus, the daemon on it, and a client that records every signal."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import BusError, Connection, Variant
from hostimage_testing.logind_double import POLICY as LOGIND
from hostimage_testing.polkit_double import POLICY as POLKIT
from hostimage_testing.private_bus import DEFAULT_POLICY, dbus_daemon
from hostimage_testing.property_double import POLICY as CONDITIONS
from hostimage_testing.tools import REPOSITORY_ROOT

HERE = Path(__file__).parent
PROPERTIES = "org.freedesktop.DBus.Properties"
POLICY = REPOSITORY_ROOT / "dbus/org.hostimage1.conf"
#: The longest any test waits for something that comes at once.
PATIENCE = 20.0

_MONITOR = """<policy user="{uid}">
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Monitoring"/>
  </policy>"""
# An unprivileged developer's daemon owns the name on the private bus.
_OWN_USER = '<policy user="{uid}"><allow own="org.hostimage1"/></policy>'


@dataclass
class Bus:
    """A running dbus-daemon. ``abstract`` is its address for users who cannot enter our directories."""

    process: subprocess.Popen[bytes]
    address: str
    abstract: str

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_bus(directory: Path) -> Iterator[Bus]:
    """A bus with our own policy, as installed, and with doubles of the services that the daemon asks."""
    abstract = f"unix:abstract=hostimage-test-{secrets.token_hex(8)}"
    uid = os.getuid()
    policies = [DEFAULT_POLICY, _MONITOR.format(uid=uid), POLKIT + LOGIND + CONDITIONS]
    policies += [f"<include>{POLICY}</include>", *([_OWN_USER.format(uid=uid)] if uid else [])]
    listen = [f"unix:path={directory / 'bus'}", abstract]
    with dbus_daemon(directory / "bus", listen, policies) as (process, address):
        yield Bus(process, address, abstract)


class Daemon:
    """A daemon process on ``bus`` for a root of its own.

    ``scripted``: with scripted workers; ``program``: started by these arguments of the interpreter.
    """

    def __init__(
        self, bus: Bus, root: Path, *, scripted: bool = True, program: Sequence[str] | None = None
    ) -> None:
        self.bus = bus
        self.root = root
        self.log = root.parent / f"{root.name}.log"
        shipped = [str(HERE / "scripted_daemon.py")] if scripted else ["-m", "hostimaged"]
        self._program = shipped if program is None else program
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What it finds its bus and its code by."""
        return {
            "DBUS_SYSTEM_BUS_ADDRESS": self.bus.address,
            "PYTHONPATH": os.pathsep.join(str(REPOSITORY_ROOT / part) for part in ("daemon", "dbus")),
        }

    def spawn(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it; at once its exec is done."""
        self.root.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._program, "--root", str(self.root)],
                env=os.environ | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.process

    async def start(self) -> None:
        """Start it and wait until it owns its name."""
        async with connected(self.bus) as client:
            owned = client.owner_appears()
            self.spawn()
            await owned

    async def kill(self) -> None:
        """As a crash ends it."""
        await self.end(signal.SIGKILL)

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        # Blocks the test's loop: nothing the daemon does in its last moments needs an answer of ours.
        return self.process.wait(PATIENCE)

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def descriptors(self) -> int:
        """How many are open, but for the one that watches files, which comes some time after the start."""
        assert self.process is not None
        directory = Path(f"/proc/{self.process.pid}/fd")
        return sum(_target(link) not in {"", "anon_inode:inotify"} for link in directory.iterdir())

    async def gives_back(self, descriptors: int) -> None:
        """Wait until no more than that are open: a scan or a job that is ending still holds some.

        Raises ``TimeoutError`` when that does not come about in ``PATIENCE`` seconds.
        """
        await eventually(lambda: self.descriptors() <= descriptors)

    def resident(self) -> int:
        """Resident memory in bytes."""
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def cpu(self) -> float:
        """Seconds of a processor used so far, by the daemon alone."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settings(self, text: str) -> None:
        """Write the settings file."""
        (self.root / "etc").mkdir(parents=True, exist_ok=True)
        (self.root / "etc/hostimaged.toml").write_text(text)

    def findings(self, **found: Any) -> None:
        """What the next scan of a scripted worker finds."""
        (self.root / "sysroot").mkdir(parents=True, exist_ok=True)
        nothing = {"repository": None, "images": [], "problems": []}
        (self.root / "sysroot/findings.json").write_text(json.dumps(nothing | found))

    def script(self, name: str, *steps: dict[str, Any]) -> str:
        """A reference whose pull does ``steps``."""
        path = self.root.parent / name
        path.write_text(json.dumps(steps))
        return f"dir:{path}"


@dataclass
class Signal:
    path: str
    interface: str
    member: str
    body: list[Any]


class Client:
    """A client of the daemon. ``signals`` are all that came since it connected."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.signals: list[Signal] = []
        self._news = asyncio.Event()
        connection.on_signal(self._record)

    def _record(self, path: str, interface: str, member: str, body: list[Any], sender: str) -> None:
        del sender
        self.signals.append(Signal(path, interface, member, body))
        self._news.set()

    async def subscribe(self) -> None:
        await self.connection.add_match("type='signal',sender='org.hostimage1'")
        await self.connection.add_match(f"type='signal',member='NameOwnerChanged',arg0='{BUS_NAME}'")

    async def forget(self) -> None:
        """Drop all signals that were sent so far, those too that are still on their way."""
        # The bus keeps the order of what it sends to one connection.
        bus = "org.freedesktop.DBus"
        await self.connection.call(bus, "/org/freedesktop/DBus", bus, "GetId")
        self.signals.clear()

    async def until(self, condition: Any, timeout: float = PATIENCE) -> Any:  # noqa: ASYNC109
        """Wait for a signal after which ``condition()`` is true; gives its value."""
        async with asyncio.timeout(timeout):
            while not (value := condition()):
                self._news.clear()
                await self._news.wait()
        return value

    async def owner(self) -> str:
        """The unique name of the daemon."""
        (owner,) = await self.connection.call(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetNameOwner",
            "s",
            [BUS_NAME],
        )
        assert isinstance(owner, str)
        return owner

    def owner_appears(self) -> Any:
        mark = len(self.signals)
        return self.until(
            lambda: any(s.member == "NameOwnerChanged" and s.body[2] for s in self.signals[mark:])
        )

    def named(self, member: str, path: str | None = None) -> list[Signal]:
        return [s for s in self.signals if s.member == member and path in (None, s.path)]

    async def manager(self, member: str, signature: str = "", *body: Any, interactive: bool = False) -> Any:
        reply = await self.connection.call(
            BUS_NAME,
            ROOT_PATH,
            MANAGER_INTERFACE,
            member,
            signature,
            body,
            timeout=PATIENCE,
            interactive=interactive,
        )
        return reply[0] if len(reply) == 1 else reply

    async def pull(self, image: str, **options: Any) -> str:
        path = await self.manager("Pull", "sa{sv}", image, variants(options))
        assert isinstance(path, str)
        return path

    async def check(self, image: str = "", **options: Any) -> str:
        path = await self.manager("Check", "sa{sv}", image, variants(options))
        assert isinstance(path, str)
        return path

    async def status(self) -> dict[str, Any]:
        document = json.loads(await self.manager("GetStatus", "sa{sv}", "native", {}))
        assert isinstance(document, dict)
        return document

    async def cancel(self, path: str) -> None:
        await self.connection.call(BUS_NAME, path, JOB_INTERFACE, "Cancel", "a{sv}", [{}])

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        (values,) = await self.connection.call(BUS_NAME, path, PROPERTIES, "GetAll", "s", [interface])
        return {key: plain(value) for key, value in values.items()}

    async def job(self, path: str) -> dict[str, Any]:
        return await self.properties(path, JOB_INTERFACE)

    async def removed(self, path: str) -> list[Any]:
        """The body of JobRemoved of the job at ``path``."""
        found = await self.until(lambda: [s.body for s in self.named("JobRemoved") if s.body[1] == path])
        assert len(found) == 1
        body = found[0]
        assert isinstance(body, list)
        return body

    def changes(self, path: str, interface: str, name: str) -> list[Any]:
        """All values that PropertiesChanged told for a property, in order."""
        return [
            plain(s.body[1][name])
            for s in self.named("PropertiesChanged", path)
            if s.body[0] == interface and name in s.body[1]
        ]

    async def changed(self, path: str, interface: str, name: str, value: Any) -> None:
        await self.until(lambda: value in self.changes(path, interface, name))


def variants(options: dict[str, Any]) -> dict[str, Variant]:
    """Keyword arguments as an option dictionary."""
    types = {str: "s", bool: "b"}
    return {key.replace("_", "-"): Variant(types[type(v)], v) for key, v in options.items()}


def plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@asynccontextmanager
async def connected(bus: Bus) -> AsyncIterator[Client]:
    client = Client(await Connection.connect(bus.address))
    try:
        await client.subscribe()
        yield client
    finally:
        await client.connection.close()


async def error_of(awaitable: Any) -> BusError:
    try:
        result = await awaitable
    except BusError as error:
        return error
    raise AssertionError(f"no error but {result!r}")


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until that holds of another process or thread; ``TimeoutError`` after ``PATIENCE`` seconds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (another's doing)
            await asyncio.sleep(0.005)


def _target(link: Path) -> str:
    """What an open descriptor is of; "" where it was closed meanwhile."""
    try:
        return str(link.readlink())
    except FileNotFoundError:
        return ""


def ended(pid: int, patience: float = PATIENCE) -> bool:
    """Whether the process ``pid`` ends within ``patience`` seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        import select

        return bool(select.select([descriptor], [], [], patience)[0])
    finally:
        os.close(descriptor)


def steps_until(
    path: Path, *first: dict[str, Any], result: dict[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    """Steps that end with a result once ``path`` exists."""
    return [*first, {"wait": str(path)}, {"result": result or {}}]


def now() -> float:
    return time.monotonic()
