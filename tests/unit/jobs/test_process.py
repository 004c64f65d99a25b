"""The daemon's side of a worker, where there is none to speak with."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimaged.jobs.job import Failure
from hostimaged.jobs.operations import Check, Operation, Pull, Scan, Unstage
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


@pytest.mark.parametrize(
    ("operation", "root", "expected"),
    [
        (Scan(), None, ["--esp"]),
        (Scan(), "/scratch", []),
        (Check(reference="oci:/x"), None, []),
        (Pull(reference="oci:/x"), None, ["--writable"]),
        (Unstage(), None, ["--writable"] * 4),
        (Unstage(), "/scratch", []),
    ],
)
async def test_what_a_worker_does_before_it_gives_up_its_privileges(
    tmp_path: Path, operation: Operation, root: str | None, expected: list[str]
) -> None:
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path / "arguments"}\n')
    program.chmod(0o755)
    settings = WorkerSettings(root=None if root is None else Path(root), command=[str(program)])
    await Worker(settings, operation).run(lambda _: None)
    # Blocks the test's loop, which has nothing else to do.
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert [each for each in arguments if each in ("--esp", "--writable")] == expected
