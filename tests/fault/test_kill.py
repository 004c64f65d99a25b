"""Random kills in the middle of pulls, from a layout and a real registry: worker, helper, daemon, skopeo.

After each kill: whoever waits is told, no process is left, the repository is sound in the eyes of cfsctl, and
the next pull succeeds. All the while a watcher looks at whatever has a name. Six kills by default, fifty
with HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives another course of events.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_testing import tars
from hostimage_testing.bus import Bus, Client, Daemon, connected, running_bus
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layer, Layout
from hostimage_testing.processes import Process, descendants, members, processes
from hostimage_testing.registry import Registry
from hostimage_testing.tools import run
from hostimage_testing.watcher import Report, watching

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20240612"))
KILLS = 50 if SOAK else 6
#: Images of one repository, before a new one is begun.
IMAGES = 6
#: Who is killed while pulling from where.
VICTIMS = [
    ("worker", "oci"),
    ("worker", "docker"),
    ("helper", "oci"),
    ("daemon", "oci"),
    ("daemon", "docker"),
    ("skopeo", "docker"),
]
if len(os.sched_getaffinity(0)) < 2:
    # There are helpers for further processors only.
    VICTIMS.remove(("helper", "oci"))
#: What may come of it. A skopeo that dies is started again; some are killed when all is done but the telling.
ENDS = {
    "worker": {("failed", ErrorName.INTERNAL), ("done", "")},
    "helper": {("failed", ErrorName.INTERNAL), ("done", "")},
    "daemon": {("failed", ErrorName.INTERNAL), ("done", "")},
    "skopeo": {("failed", ErrorName.NETWORK), ("done", "")},
}
#: How long a client waits to be told, and a process may take to be gone.
PATIENCE = 30.0


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Images of 40 MB in a thousand files and a few large ones; each shares a layer with the one before."""
    noise = random.Random(SEED)
    layout = Layout(tmp_path_factory.mktemp("kills") / "layout")

    def layer(number: int) -> Layer:
        entries = [tars.directory(b"usr"), tars.directory(b"usr/%d" % number)]
        sizes = [noise.randrange(30, 20_000) for _ in range(500)]
        entries += [
            tars.file(b"usr/%d/%d" % (number, n), noise.randbytes(size)) for n, size in enumerate(sizes)
        ]
        entries += [tars.file(b"usr/%d/big%d" % (number, n), noise.randbytes(5_000_000)) for n in range(3)]
        return layout.layer(b"".join(entries) + tars.END, ("gzip", "zstd", "none")[number % 3], 1)

    layers = [layer(number) for number in range(IMAGES + 1)]
    for number in range(IMAGES):
        layout.image(f"v{number}", layers[number : number + 2])
    return layout


@pytest.fixture(scope="module")
def sources(layout: Layout, registry: Registry, skopeo: str) -> dict[str, str]:
    """What comes before the tag of an image, by kind of source."""
    for number in range(IMAGES):
        source, target = f"oci:{layout.path}:v{number}", f"docker://{registry.host}/kills:v{number}"
        run(skopeo, "copy", "-q", "--insecure-policy", "--dest-tls-verify=false",
            "--preserve-digests", source, target)  # fmt: skip
    return {"oci": f"oci:{layout.path}:", "docker": f"docker://{registry.host}/kills:"}


@dataclass
class Figures:
    """What happened."""

    killed: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    told: dict[str, int] = field(default_factory=dict)
    looks: int = 0
    names: int = 0

    def count(self, which: dict[str, int], what: str) -> None:
        which[what] = which.get(what, 0) + 1

    def take(self, report: Report) -> None:
        self.looks += report.rounds
        self.names += report.names


class Life:
    """One daemon with one repository, from nothing to a few images."""

    def __init__(self, bus: Bus, daemon: Daemon, clients: list[Client], judge: Judge) -> None:
        self._bus = bus
        self.daemon = daemon
        self.clients = clients
        self.judge = judge
        self.sessions: set[int] = set()

    async def pull(self, image: str) -> str:
        return await self.clients[0].pull(image)

    async def told(self, path: str) -> tuple[str, str]:
        """What all who wait are told of the end of a job: state and error."""
        ends = [(await client.removed(path))[3:5] for client in self.clients]
        assert ends[0] == ends[1]
        state, error = ends[0]
        return state, error

    def family(self) -> list[Process]:
        """Everything the daemon started; its sessions are remembered."""
        assert self.daemon.process is not None
        found = descendants(self.daemon.process.pid)
        for process in found:
            with suppress(OSError):
                self.sessions.add(process.session)
        # The daemon itself was started in the session of the tests.
        self.sessions.discard(os.getsid(0))
        return found

    def find(self, victim: str) -> int | None:
        """The pid to kill, if it lives; a worker that only scans is not meant."""
        assert self.daemon.process is not None
        if victim == "daemon":
            self.family()
            return self.daemon.process.pid
        for process in self.family():
            with suppress(OSError):
                command = process.command
                if victim == "skopeo" and process.name == "skopeo":
                    return process.pid
                if victim == "helper" and "store_helper" in command:
                    return process.pid
                if victim == "worker" and "--profile pull" in command and process.name != "skopeo":
                    return process.pid
        return None

    async def revive(self) -> None:
        """Start the daemon again if it is dead."""
        assert self.daemon.process is not None
        if self.daemon.process.poll() is not None:
            await self.daemon.start()

    async def settled(self) -> None:
        """Nothing of what was started is left: neither by parent, nor by session, nor by command line."""
        deadline = time.monotonic() + PATIENCE
        while left := self._left():
            assert time.monotonic() < deadline, [(p.pid, p.command) for p in left]
            await asyncio.sleep(0.05)

    def _left(self) -> list[Process]:
        assert self.daemon.process is not None
        own = {self.daemon.process.pid, os.getpid(), self._bus.process.pid}
        root = str(self.daemon.root)
        named = []
        for process in processes():
            # The watcher of the repository and the daemon have the directory in their command lines.
            with suppress(OSError):
                command = process.command
                if root in command and "watcher.py" not in command and process.state != "Z":
                    named.append(process)
        found = [*self.family(), *members(self.sessions), *named]
        return [process for process in found if process.pid not in own]


@asynccontextmanager
async def new_life(root: Path, cfsctl: str, registry: Registry) -> AsyncIterator[Life]:
    os.mkdir(root)
    host = scratch_host(root / "root", registries=registry.registries_conf)
    async with AsyncExitStack() as stack:
        bus = stack.enter_context(running_bus(root))
        daemon = Daemon(bus, root / "root", scripted=False)
        stack.callback(daemon.clean_up)
        clients = [await stack.enter_async_context(connected(bus)) for _ in range(2)]
        await daemon.start()
        yield Life(bus, daemon, clients, Judge(cfsctl, host.repository))


async def measure(life: Life, image: str) -> float:
    """Seconds that a whole pull takes."""
    begin = time.monotonic()
    assert (await life.told(await life.pull(image)))[0] == "done"
    return time.monotonic() - begin


class Campaign:
    """A seeded course of pulls and kills."""

    def __init__(self, sources: dict[str, str], durations: dict[str, float]) -> None:
        self._random = random.Random(SEED)
        self._sources = sources
        self._durations = durations
        self._victims = self._shuffled()
        self._next = next(self._victims)
        self.figures = Figures()

    def _shuffled(self) -> Iterator[tuple[str, str]]:
        """Everyone gets the turn equally often, in no order."""
        while True:
            yield from self._random.sample(VICTIMS, len(VICTIMS))

    @property
    def kills(self) -> int:
        return sum(self.figures.killed.values())

    async def live(self, life: Life) -> None:
        """Pull image after image, each killed on the way once or more."""
        for number in range(IMAGES):
            while self.kills < KILLS:
                hit = await self.strike(life, *self._next, number)
                if hit:
                    self._next = next(self._victims)
                else:
                    self.figures.missed += 1
                # One that was missed is complete, and quickly pulled again.
                if not hit or self._random.random() < 0.6:
                    break
            source = self._random.choice(["oci", "docker"])
            state, error = await life.told(await life.pull(f"{self._sources[source]}v{number}"))
            assert (state, error) == ("done", ""), "the next pull succeeds"
            life.judge.check(images=number + 1)
            if self.kills >= KILLS:
                return

    async def strike(self, life: Life, victim: str, source: str, number: int) -> bool:
        """Kill in the middle of a pull; False if there was nobody to kill any more, or not yet."""
        path = await life.pull(f"{self._sources[source]}v{number}")
        await asyncio.sleep(self._random.uniform(0, 0.8 * self._durations[source]))
        running = not any(s.body[1] == path for s in life.clients[0].named("JobRemoved"))
        pid = life.find(victim) if running else None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.figures.count(self.figures.killed, f"{victim} ({source})")
            if victim == "daemon":
                await life.daemon.end(signal.SIGKILL)
        await life.revive()
        state, error = await life.told(path)
        await life.settled()
        if (life.judge.repository / "meta.json").exists():
            life.judge.check()
        if pid is not None:
            self.figures.count(self.figures.told, f"{victim}: {state} {error.rpartition('.')[2]}".rstrip())
            assert (state, error) in ENDS[victim]
        return pid is not None


@pytest.mark.timeout(3000 if SOAK else 300)
async def test_random_kills(
    tmp_path: Path,
    cfsctl: str,
    sources: dict[str, str],
    registry: Registry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    durations = {}
    async with new_life(tmp_path / "measure", cfsctl, registry) as life:
        for number, (kind, prefix) in enumerate(sources.items()):
            # Layers that the other has not.
            durations[kind] = await measure(life, f"{prefix}v{2 * number}")
    campaign = Campaign(sources, durations)
    lives = 0
    while campaign.kills < KILLS:
        lives += 1
        root = tmp_path / f"life{lives}"
        with watching(root / "root/sysroot/composefs") as report:
            async with new_life(root, cfsctl, registry) as life:
                await campaign.live(life)
        campaign.figures.take(report)
        assert report.findings == [], f"seed {SEED}"
        assert report.rounds > 0
    told: dict[str, Any] = vars(campaign.figures)
    with capsys.disabled():
        print(f" [seed {SEED}, {lives} repositories, {told}]", end="")
