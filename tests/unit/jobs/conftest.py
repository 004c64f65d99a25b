"""Fixtures of the tests of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from hostimage_testing.queue_bench import Bench


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "jobs.json")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(made.queue.run())
        yield made
        await made.queue.stop()
    await asyncio.get_running_loop().shutdown_default_executor()
