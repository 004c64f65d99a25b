"""Many clients at once while a job runs: nobody waits long, nothing is lost, nothing grows.

``HOSTIMAGE_SOAK=1`` runs it in full: 200 clients, 500 calls a second, a minute, and a Debian image that
is pulled again and again into empty repositories by the workers that are shipped. The short form has scripted
ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import hostimage_testing
from hostimage_testing.bus import PATIENCE, Client, Daemon
from hostimage_testing.debian import Debian
from hostimage_testing.host import scratch_host

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
#: Calls a second, and for how many seconds nothing is counted and how many are.
CLIENTS, RATE, WARM, SECONDS = (200, 500, 15, 60) if SOAK else (50, 100, 1, 4)
#: Seconds within which 99 of 100 answers come, on a quiet machine; the short variant runs beside other tests.
BUDGET = 0.05 if SOAK else 0.25
#: What a call may cost the daemon, in seconds of a processor: twice the rate must fit into one.
COST = 0.001
#: What the daemon may grow by: the allocator's slack, not what 30,000 calls would leave if each left a byte.
GROWTH = 4 << 20
PROGRAM = Path(hostimage_testing.__file__).with_name("status_load.py")


@dataclass
class Figures:
    """What was measured; times in seconds, ``cpu`` is the daemon's, ``grown`` in bytes."""

    times: list[float]
    sent: int
    errors: int
    late: float
    cpu: float
    grown: int

    def percentile(self, share: float) -> float:
        return sorted(self.times)[min(int(len(self.times) * share), len(self.times) - 1)]

    def __str__(self) -> str:
        load = " ".join(f"{part:.1f}" for part in os.getloadavg())
        return (
            f"{len(self.times)} of {self.sent} calls answered: median {self.percentile(0.5) * 1000:.1f} ms, "
            f"99 % {self.percentile(0.99) * 1000:.1f} ms, longest {max(self.times) * 1000:.1f} ms "
            f"(clients late by up to {self.late * 1000:.1f} ms); "
            f"daemon {self.cpu / len(self.times) * 1000:.2f} ms CPU per call, "
            f"memory {self.grown / 1024:+.0f} KiB; load average {load}"
        )


async def _measure(daemon: Daemon) -> Figures:
    """Have the clients read the status, in a process of their own, and wait for the end of it."""
    argv = [str(PROGRAM), daemon.bus.address, *map(str, (CLIENTS, RATE, WARM, SECONDS))]
    program = await asyncio.create_subprocess_exec(sys.executable, *argv, stdout=PIPE, limit=8 << 20)
    assert program.stdout is not None
    try:
        async with asyncio.timeout(WARM + SECONDS + 3 * PATIENCE):
            assert await program.stdout.readline() == b"begin\n"
            memory, cpu = daemon.resident(), daemon.cpu()
            seen = json.loads(await program.stdout.readline())
            return Figures(**seen, cpu=daemon.cpu() - cpu, grown=daemon.resident() - memory)
    finally:
        with suppress(ProcessLookupError):
            program.kill()
        await program.communicate()


def _check(figures: Figures) -> None:
    assert figures.sent == RATE * SECONDS
    assert len(figures.times) == figures.sent, "every call was answered"
    assert figures.errors == 0
    assert figures.percentile(0.99) < BUDGET, figures
    assert figures.cpu / len(figures.times) < COST, figures
    assert figures.grown < GROWTH, figures


@pytest.mark.timeout(300)
@pytest.mark.skipif(SOAK, reason="runs with a real pull instead")
async def test_status_while_a_pull_runs(
    daemon: Daemon, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"tag": f"image-{n}", "manifest-digest": "sha256:" + f"{n:064x}"} for n in range(20)]
    daemon.findings(images=images)
    await daemon.start()
    go = tmp_path / "go"
    # A pull tells of bytes all the time; a tick of the scripted worker is 5 ms.
    steps: list[dict[str, object]] = [{"totals": [100_000_000, 0]}]
    for _ in range(int((WARM + SECONDS) * 40)):
        steps += [{"advance": 1000}, {"pause": 0.025}]
    path = await client.pull(daemon.script("large", *steps, {"wait": str(go)}, {"result": {}}))
    figures = await _measure(daemon)
    assert (await client.job(path))["State"] == "running"
    go.touch()
    assert (await client.removed(path))[3] == "done"
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {figures}")
    _check(figures)


def _over(client: Client, path: str) -> bool:
    return any(signal.body[1] == path for signal in client.named("JobRemoved"))


@pytest.mark.interop
@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.skipif(not SOAK, reason="takes more than a minute: make soak")
async def test_status_while_a_large_image_is_pulled(
    real_daemon: Daemon, client: Client, debian: Debian, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All the while one job pulls: as one ends, its repository is put aside, and the next begins."""
    paths = scratch_host(real_daemon.root)
    await real_daemon.start()
    image = f"oci:{debian.layout}:eight-gzip"
    pulls, enough = 0, asyncio.Event()

    async def pull_on() -> None:
        nonlocal pulls
        while not enough.is_set():
            path = await client.pull(image, no_join=True)
            await client.until(partial(_over, client, path), WARM + SECONDS)
            job = await client.job(path)
            assert (job["State"], job["Result"]["changed"]) == ("done", True)
            aside = paths.repository.rename(tmp_path / f"done-{pulls}")
            pulls += 1
            # By a program: what this process does beside is little.
            await (await asyncio.create_subprocess_exec("nice", "rm", "-rf", aside)).wait()

    pulling = asyncio.create_task(pull_on())
    figures = await _measure(real_daemon)
    counted = pulls
    enough.set()
    await pulling
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {counted} pulls, {figures}")
    _check(figures)
