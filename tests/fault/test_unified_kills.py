"""Random kills in both stages of unified pulls: podman, worker, daemon.

After each kill: no image is in the store or the repository but whole ones, nothing runs or is mounted any
more, and the next pull succeeds. At the end what is left is collected to the last layer. Five kills by
default, fifty with HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives another course of events.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.bus import Client, Daemon, connected, running_bus
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.processes import Process, descendants
from hostimage_testing.pulling import check_whole
from hostimage_testing.registry import Registry
from hostimage_testing.samples import copy
from hostimage_testing.tools import require
from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.host.tags import stream_ref
from hostimaged.oci.images import tags
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.leftovers import leftovers, sweep
from hostimaged.system.paths import HostPaths
from hostimaged.system.workdir import private_directory

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="podman needs root"),
]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20261201"))
KILLS = 50 if SOAK else 5
#: Images in the registry; each shares a layer with the one before.
IMAGES = 4
VICTIMS = ("podman", "worker", "daemon")
PATIENCE = 30.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, registry: Registry, skopeo: str) -> list[str]:
    require("podman")
    noise = random.Random(SEED)
    layout = Layout(tmp_path_factory.mktemp("kills") / "layout")
    layers = [
        layout.layer(
            tars.directory(b"usr")
            + b"".join(
                tars.file(b"usr/%d-%d" % (number, at), noise.randbytes(noise.randrange(50, 200_000)))
                for at in range(150)
            )
            + tars.END,
            ("gzip", "none", "zstd")[number % 3],
        )
        for number in range(IMAGES + 2)
    ]
    found = []
    for number in range(IMAGES):
        layout.image(f"v{number}", layers[number : number + 3])
        found.append(f"{registry.host}/unified-kills:v{number}")
        copy(skopeo, f"oci:{layout.path}:v{number}", f"docker://{found[-1]}", "--preserve-digests")
    return found


class Campaign:
    """One daemon, one host, and what is done to them."""

    def __init__(self, daemon: Daemon, client: Client, host: HostPaths, cfsctl: str) -> None:
        self.cfsctl = cfsctl
        self.daemon = daemon
        self.client = client
        self.host = host
        self.random = random.Random(SEED)
        self.killed: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        #: When each victim was there in pulls that nobody disturbed: first and last, in seconds.
        self.spans: dict[str, list[tuple[float, float]]] = {}

    async def run(self, work: Path, images: list[str]) -> int:
        """Kill often enough; gives how often there was nobody to kill."""
        assert await self.pull(images[0]) == ("done", "")
        for name in images[1:]:
            await self.watch(name)
        missed = number = 0
        while (kills := sum(self.killed.values())) < KILLS:
            number += 1
            name = images[number % IMAGES]
            # Not there any more: each pull fetches something.
            _in_process(_forget, self.cfsctl, self.host, work, images, name)
            missed += not await self.strike(name, VICTIMS[kills % len(VICTIMS)])
            _in_process(check_both, self.host)
            assert await self.pull(name) == ("done", ""), "the next pull succeeds"
            _in_process(check_both, self.host)
        return missed

    async def pull(self, name: str) -> tuple[str, str]:
        path = await self.client.pull(f"docker://{name}", unified=True)
        state, error = (await self.client.removed(path))[3:5]
        return state, error

    async def watch(self, name: str) -> None:
        """Pull, and see when victims come and go."""
        begun = time.monotonic()
        pulling = asyncio.create_task(self.pull(name))
        seen: dict[str, list[float]] = {"daemon": [0.0]}
        while not pulling.done():
            for victim in VICTIMS:
                if self._find(victim) is not None:
                    seen.setdefault(victim, []).append(time.monotonic() - begun)
            await asyncio.sleep(0.005)
        assert pulling.result() == ("done", "")
        for victim, times in seen.items():
            self.spans.setdefault(victim, []).append((times[0], times[-1]))

    async def strike(self, name: str, victim: str) -> bool:
        """Kill in the middle of a pull; False if there was nobody to kill (any more)."""
        path = await self.client.pull(f"docker://{name}", unified=True)
        await asyncio.sleep(self.random.uniform(*self.random.choice(self.spans[victim])))
        pid = self._find(victim)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.killed[victim] = self.killed.get(victim, 0) + 1
            if victim == "daemon":
                await self.daemon.end(signal.SIGKILL)
                await self.daemon.start()
        state, error = (await self.client.removed(path))[3:5]
        end = f"{victim}: {state} {error.rpartition('.')[2]}".rstrip()
        if pid is not None:
            self.ends[end] = self.ends.get(end, 0) + 1
        await self.settled()
        return pid is not None

    def _family(self) -> list[Process]:
        assert self.daemon.process is not None
        return descendants(self.daemon.process.pid)

    def _find(self, victim: str) -> int | None:
        assert self.daemon.process is not None
        if victim == "daemon":
            return self.daemon.process.pid
        for process in self._family():
            with suppress(OSError):
                if victim == "podman" and process.name == "podman":
                    return process.pid
                worker = "--profile store" in process.command or "--profile pull-storage" in process.command
                if victim == "worker" and worker and process.name.startswith("python"):
                    return process.pid
        return None

    async def settled(self) -> None:
        """Nothing of a pull is left running."""
        deadline = time.monotonic() + PATIENCE
        root = str(self.host.physical_root)
        while left := [process for process in _all() if _is_of(process, root)]:
            assert time.monotonic() < deadline, [process.command for process in left]
            await asyncio.sleep(0.05)


def _all() -> Iterator[Process]:
    return (Process(int(name)) for name in os.listdir("/proc") if name.isdecimal())


def _is_of(process: Process, root: str) -> bool:
    """Whether it is a podman, or what one starts, that has the store of ``root`` mounted."""
    with suppress(OSError):
        if process.state != "Z" and process.name in ("podman", "skopeo", "exe", "conmon"):
            return root.split("/host/")[0] in Path(f"/proc/{process.pid}/mountinfo").read_text()
    return False


def check_both(host: HostPaths) -> None:
    """No name leads to half an image, in the store and in the repository."""
    store = owned.open_store(host)
    if store is not None:
        with store:
            assert all(image.complete for image in store.images() if image.names)
    with suppress(RepositoryMissing), Repository.open(host.repository, lock_timeout=10) as repository:
        check_whole(repository)
    assert str(host.physical_root) not in Path("/proc/self/mountinfo").read_text()


def collect_all(host: HostPaths, tmp_path: Path) -> None:
    """Remove everything from the store, leftovers too, and see that nothing stays."""
    with private_directory(tmp_path / "work", "x-") as work_dir:
        store = owned.open_store(host)
        assert store is not None
        with store, owned.podman(host, work_dir, lambda: None) as podman:
            podman.initialize()
            print(f"chains of layers that nobody had: {len(leftovers(store))}")
            sweep(store, podman)
            assert leftovers(store) == []
            podman.remove([name for image in store.images() for name in image.names])
            assert store.images() == ()
            assert store.layer_facts() == {}
    layers = [path.name for path in (host.store / "overlay").iterdir() if len(path.name) == 64]
    assert layers == []
    assert list((host.store / "overlay/l").iterdir()) == []
    splits = [path.name for path in (host.store / "overlay-layers").iterdir() if "tar-split" in path.name]
    assert splits == []


@pytest.mark.timeout(3000 if SOAK else 600)
async def test_r24_random_kills_in_both_stages(
    tmp_path: Path, cfsctl: str, registry: Registry, images: list[str]
) -> None:
    host = scratch_host(tmp_path / "host", registries=registry.registries_conf)
    judge = Judge(cfsctl, host.repository)
    async with AsyncExitStack() as stack:
        bus = stack.enter_context(running_bus(tmp_path))
        daemon = Daemon(bus, tmp_path / "host", scripted=False)
        stack.callback(daemon.clean_up)
        client = await stack.enter_async_context(connected(bus))
        await daemon.start()
        campaign = Campaign(daemon, client, host, cfsctl)
        missed = await campaign.run(tmp_path, images)
        await daemon.end()
    judge.check()
    _in_process(collect_all, host, tmp_path)
    print(f"seed {SEED}: killed {campaign.killed}, missed {missed}, ends {campaign.ends}")


def _forget(cfsctl: str, host: HostPaths, tmp_path: Path, images: list[str], name: str) -> None:
    """Take the image and its neighbours out of the store, and all images out of the repository."""
    store = owned.open_store(host)
    assert store is not None
    with private_directory(tmp_path / "work", "x-") as work_dir, store:
        wanted = set(images) - {images[0]} | {name}
        there = [each for image in store.images() for each in image.names if each in wanted]
        if there:
            with owned.podman(host, work_dir, lambda: None) as podman:
                podman.remove(there)
    with Repository.open(host.repository, lock_timeout=10) as repository:
        for tag in tags(repository):
            repository.remove_stream_ref(stream_ref(tag))
    Judge(cfsctl, host.repository)("gc")


def _in_process(function: object, *arguments: object) -> None:
    """Run what blocks in a process of its own, so that it is no business of the loop."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)  # type: ignore[arg-type]
    child.start()
    child.join()
    assert child.exitcode == 0
