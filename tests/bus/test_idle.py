"""A daemon that has nothing to do: how little it takes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.bus import PATIENCE, Client, Daemon
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.processes import Process, descendants

#: Resident bytes of an idle daemon, shared libraries and all: 45 MB, a MB being 10^6 bytes.
LIMIT = 45_000_000
SECONDS = 2.0


def resident(daemon: Daemon) -> int:
    """VmRSS in bytes."""
    assert daemon.process is not None
    value, unit = Process(daemon.process.pid).status()["VmRSS"].split()
    assert unit == "kB"
    return int(value) * 1024


async def idle(daemon: Daemon) -> None:
    """No worker is left."""
    assert daemon.process is not None
    deadline = time.monotonic() + PATIENCE
    while descendants(daemon.process.pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_memory_of_an_idle_daemon(
    real_daemon: Daemon, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its first scan; and once it has been through a pull, it is not much more."""
    scratch_host(real_daemon.root)
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(tars.directory(b"usr") + tars.file(b"usr/f", b"x" * 100) + tars.END)])
    await real_daemon.start()
    await client.status()
    await idle(real_daemon)
    fresh = resident(real_daemon)
    for _ in range(3):
        assert (await client.removed(await client.pull(f"oci:{layout.path}:v1")))[3] == "done"
    await client.status()
    await idle(real_daemon)
    used = resident(real_daemon)
    with capsys.disabled():
        print(f" [{fresh / 1e6:.1f} MB, after pulls {used / 1e6:.1f} MB]", end="")
    assert 10_000_000 < fresh < LIMIT
    assert used < LIMIT + 2_000_000


async def test_an_idle_daemon_does_nothing(real_daemon: Daemon, client: Client) -> None:
    """It sleeps: next to no processor time, and no more than a few wake-ups."""
    scratch_host(real_daemon.root)
    await real_daemon.start()
    await client.status()
    await idle(real_daemon)
    cpu, wakeups = real_daemon.cpu(), _switches(real_daemon)
    await asyncio.sleep(SECONDS)
    assert real_daemon.cpu() - cpu <= 2 / os.sysconf("SC_CLK_TCK")
    assert _switches(real_daemon) - wakeups <= 5 * SECONDS


def _switches(daemon: Daemon) -> int:
    """How often the daemon went to sleep so far."""
    assert daemon.process is not None
    return int(Process(daemon.process.pid).status()["voluntary_ctxt_switches"])
