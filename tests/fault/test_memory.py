"""Memory of the processes of a pull, skopeo aside: bounded, whatever the size of a layer.

Counted is the sum of the peaks of the worker and of each of its children, which is more than they ever take
together. 2 GiB with HOSTIMAGE_SOAK=1.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from hostimage_testing import tars
from hostimage_testing.bus import Client, Daemon, connected, running_bus
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.processes import descendants
from hostimage_testing.registry import Registry
from hostimage_testing.tools import run

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MIB = 1 << 20
SIZE = (2048 if os.environ.get("HOSTIMAGE_SOAK") == "1" else 192) * MIB
LIMIT = 250 * MIB
#: Time for a pull on a busy machine.
PATIENCE = 600.0


def compressible(size: int) -> Iterator[bytes]:
    """A tar of two large files that are mostly zeros, no two blocks of them alike, and many small ones."""
    yield tars.directory(b"usr")
    for number in range(2):
        yield tars.header(b"usr/large%d" % number, size // 2)
        for block in range(size // 2 // MIB):
            yield (b"%d %d " % (number, block)).ljust(MIB, b"\0")
    for number in range(2000):
        yield tars.file(b"usr/small%d" % number, b"%05000d" % number)
    yield tars.END


@contextmanager
def peaks(daemon: Daemon) -> Iterator[dict[int, int]]:
    """Peak resident bytes of each process that works for ``daemon``, by pid, while this lasts."""
    found: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        assert daemon.process is not None
        while not done.wait(0.02):
            for process in descendants(daemon.process.pid):
                with suppress(OSError, KeyError):
                    if process.name != "skopeo":
                        peak = int(process.status()["VmHWM"].split()[0]) * 1024
                        found[process.pid] = max(found.get(process.pid, 0), peak)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest_asyncio.fixture
async def daemon(tmp_path: Path, registry: Registry) -> AsyncIterator[tuple[Daemon, Client]]:
    with running_bus(tmp_path) as bus:
        made = Daemon(bus, tmp_path / "root", scripted=False)
        scratch_host(made.root, registries=registry.registries_conf)
        try:
            async with connected(bus) as client:
                await made.start()
                # The scan at the start is over once a job is.
                await client.removed(await client.pull("oci:/nonexistent"))
                yield made, client
        finally:
            made.clean_up()


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("kind", ["oci", "docker"])
async def test_memory_is_bounded(
    daemon: tuple[Daemon, Client],
    registry: Registry,
    skopeo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    compression: str,
) -> None:
    server, client = daemon
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(compressible(SIZE), compression, 1)])
    image = f"oci:{layout.path}:v1"
    if kind == "docker":
        image = f"docker://{registry.host}/memory-{compression}:v1"
        run(skopeo, "copy", "-q", "--insecure-policy", "--dest-tls-verify=false", "--preserve-digests",
            f"oci:{layout.path}:v1", image)  # fmt: skip
    begin = time.monotonic()
    with peaks(server) as found:
        path = await client.pull(image)
        await client.until(lambda: client.named("JobRemoved")[1:], PATIENCE)
        assert (await client.removed(path))[3] == "done"
    seconds, total = time.monotonic() - begin, sum(found.values())
    with capsys.disabled():
        print(f" [{SIZE // MIB} MiB, {seconds:.0f} s: {total // MIB} MiB, {len(found)} processes]", end="")
    assert 10 * MIB < total < LIMIT
