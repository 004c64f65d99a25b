"""The daemon's side of a worker, where there is none to speak with."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimaged.jobs.job import Failure
from hostimaged.jobs.operations import Scan
from hostimaged.jobs.process import Worker, WorkerSettings


@pytest.mark.parametrize("missing", ["descriptors", "program"])
async def test_a_worker_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def none_left() -> tuple[socket.socket, socket.socket]:
        raise OSError(errno.EMFILE, "Too many open files")

    if missing == "descriptors":
        monkeypatch.setattr("hostimaged.jobs.process.socket.socketpair", none_left)
    worker = Worker(WorkerSettings(root=tmp_path, command=[str(tmp_path / "nothing")]), Scan())
    outcome = await worker.run(lambda _: None)
    assert outcome.failure == Failure(ErrorName.INTERNAL, "the worker process could not be started")
