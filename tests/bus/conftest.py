"""Fixtures: a private bus with the shipped policy, and daemons on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hostimage_testing.bus import Bus, Client, Daemon, connected, running_bus


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A private system bus."""
    with running_bus(tmp_path) as running:
        yield running


@pytest.fixture
def daemon(bus: Bus, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with scripted workers, not yet started."""
    made = Daemon(bus, tmp_path / "root")
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture
def real_daemon(bus: Bus, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon as it is shipped, not yet started."""
    made = Daemon(bus, tmp_path / "root", scripted=False)
    try:
        yield made
    finally:
        made.clean_up()


@pytest_asyncio.fixture
async def client(bus: Bus) -> AsyncIterator[Client]:
    """A client that listens before the daemon is there."""
    async with connected(bus) as made:
        yield made
