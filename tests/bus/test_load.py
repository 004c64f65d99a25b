"""Many clients at once while a job runs: nobody waits long, nothing is lost, nothing grows.

``HOSTIMAGE_SOAK=1`` runs it in full: 200 clients, 500 calls a second, a minute.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_dbus.transport import Connection
from hostimage_testing.bus import Bus, Client, Daemon

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
CLIENTS, RATE, SECONDS = (200, 500, 60) if SOAK else (50, 100, 4)
#: Seconds within which 99 of 100 answers come, on a quiet machine; the short variant runs beside other tests.
BUDGET = 0.05 if SOAK else 0.25
#: What a call may cost the daemon, in seconds of a processor: twice the rate must fit into one.
COST = 0.001
#: What the daemon may grow by: the allocator's slack, not what 30,000 calls would leave if each left a byte.
GROWTH = 4 << 20


@dataclass
class Figures:
    """What was measured; times in seconds, ``cpu`` is the daemon's, ``grown`` in bytes."""

    times: list[float]
    cpu: float
    grown: int

    def percentile(self, share: float) -> float:
        return sorted(self.times)[min(int(len(self.times) * share), len(self.times) - 1)]

    def __str__(self) -> str:
        return (
            f"{len(self.times)} calls: median {self.percentile(0.5) * 1000:.1f} ms, "
            f"99 % {self.percentile(0.99) * 1000:.1f} ms, longest {max(self.times) * 1000:.1f} ms; "
            f"daemon {self.cpu / len(self.times) * 1000:.2f} ms CPU per call, "
            f"memory {self.grown / 1024:+.0f} KiB"
        )


async def _call_at_rate(clients: list[Client], seconds: float) -> list[float]:
    """Read the status ``RATE`` times a second, by turns; every call has to be answered."""
    times: list[float] = []

    async def ask(client: Client) -> None:
        started = time.perf_counter()
        await client.manager("GetStatus", "sa{sv}", "native", {})
        times.append(time.perf_counter() - started)

    async with asyncio.TaskGroup() as group:
        started = time.perf_counter()
        for number in range(int(RATE * seconds)):
            delay = started + number / RATE - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(ask(clients[number % len(clients)]))
    return times


@asynccontextmanager
async def _reader(bus: Bus) -> AsyncIterator[Client]:
    """A client that only asks: 200 that take in every signal would measure this process, not the daemon."""
    connection = await Connection.connect(bus.address)
    try:
        yield Client(connection)
    finally:
        await connection.close()


@pytest.mark.timeout(300)
async def test_status_while_a_pull_runs(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"tag": f"image-{n}", "manifest-digest": "sha256:" + f"{n:064x}"} for n in range(20)]
    daemon.findings(images=images)
    await daemon.start()
    go = tmp_path / "go"
    # A pull tells of bytes all the time; a tick of the scripted worker is 5 ms.
    steps: list[dict[str, object]] = [{"totals": [100_000_000, 0]}]
    for _ in range(int(SECONDS * 40)):
        steps += [{"advance": 1000}, {"pause": 0.025}]
    path = await client.pull(daemon.script("large", *steps, {"wait": str(go)}, {"result": {}}))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_reader(bus)) for _ in range(CLIENTS)]
        await _call_at_rate(clients, min(SECONDS / 4, 5))
        before, cpu = daemon.resident(), daemon.cpu()
        times = await _call_at_rate(clients, SECONDS)
        figures = Figures(times, daemon.cpu() - cpu, daemon.resident() - before)
        assert (await client.job(path))["State"] == "running"
    go.touch()
    assert (await client.removed(path))[3] == "done"
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {figures}")
    assert len(times) == RATE * SECONDS, "every call was answered"
    assert figures.percentile(0.99) < BUDGET, figures
    assert figures.cpu / len(times) < COST, figures
    assert figures.grown < GROWTH, figures
