"""Helpers that store objects: the same objects, typed errors, and no process or descriptor left behind."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostimage_testing.processes import Process, descendants, python_environment
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity, store_helper, store_pool
from hostimaged.composefs.repository.store_pool import Slot, StorePool
from hostimaged.errors import HostimageError, StorageError

NOISE = random.Random(2).randbytes(5_000_000)


@pytest.fixture(params=list(Algorithm), ids=lambda algorithm: algorithm.label)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(tmp_path / "repo", algorithm=request.param, verity=Verity.OPPORTUNISTIC)
    with made:
        yield made


def free_slot(pool: StorePool) -> Slot:
    slot = pool.slot()
    assert slot is not None
    return slot


def children() -> list[int]:
    return [process.pid for process in descendants(os.getpid())]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_contents_are_stored_and_answered_in_order(repository: Repository) -> None:
    contents = [NOISE[n : n * 40] for n in range(1, 200)] + [b""]
    with StorePool(repository, 1, worth=0) as pool:
        slot = free_slot(pool)
        assert [slot.append(content) for content in contents] == list(range(200))
        slot.send()
        stored = slot.wait()
    assert [one.id for one in stored] == [digest(repository.algorithm, content) for content in contents]
    assert all(one.is_new for one in stored)
    for one, content in zip(stored, contents, strict=True):
        assert repository.read_object(one.id, 1 << 20) == content
    assert not repository.store_object(contents[5]).is_new


def test_what_is_there_is_not_new(repository: Repository) -> None:
    repository.store_object(NOISE[:1000])
    with StorePool(repository, 1, worth=0) as pool:
        slot = free_slot(pool)
        slot.append(NOISE[:1000])
        slot.send()
        assert [one.is_new for one in slot.wait()] == [False]


@pytest.mark.parametrize("size", [1, store_pool.SLOT, store_pool.SLOT + 1, 4_999_999])
@pytest.mark.parametrize("step", [100_000, 5_000_000])
def test_large_contents(repository: Repository, size: int, step: int) -> None:
    with StorePool(repository, 1, worth=0) as pool:
        writers = [pool.writer() for _ in range(2)]
        for at in range(0, size, step):
            for writer in writers:
                assert writer is not None
                writer.write(NOISE[at : min(at + step, size)])
        stored = [writer.commit().wait() for writer in writers if writer is not None]
    expected = digest(repository.algorithm, NOISE[:size])
    assert [[(one.id, one.is_new) for one in answer] for answer in stored] == [
        [(expected, True)],
        [(expected, False)],
    ]
    assert repository.object_size(expected) == size


def test_slots_are_limited(repository: Repository) -> None:
    with StorePool(repository, 1, worth=0) as pool:
        slots = []
        while (slot := pool.slot()) is not None:
            slot.append(b"x" * 100)
            slots.append(slot)
        assert 0 < len(slots) < 10
        slots.pop().drop()
        again = free_slot(pool)
        assert not again.has_room(store_pool.SLOT + 1)
        assert again.has_room(store_pool.SLOT)
        for slot in slots:
            slot.send()
            slot.wait()


def test_nothing_is_left_behind(repository: Repository) -> None:
    before = (sorted(os.listdir("/proc/self/fd")), children())
    with StorePool(repository, 3, worth=0) as pool:
        assert len(children()) == len(before[1]) + 3
        free_slot(pool).append(b"x")
    assert (sorted(os.listdir("/proc/self/fd")), children()) == before


def test_helpers_that_cannot_be_started_are_done_without(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", fail)
    with StorePool(repository, 2, worth=0) as pool:
        assert pool.slot() is None
        assert pool.writer() is None
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_helpers_get_no_other_descriptors(repository: Repository) -> None:
    before = set(children())
    with StorePool(repository, 2, worth=0) as pool:
        slots = [free_slot(pool), free_slot(pool)]
        for slot in slots:
            slot.append(b"x" * 100)
            slot.send()
        for slot in slots:
            # One that has answered is done with opening what Python itself reads.
            slot.wait()
        for helper in set(children()) - before:
            # Of sockets and memories its own alone; mapping the memory makes a second descriptor of it.
            opened = [Path(f"/proc/{helper}/fd/{fd}") for fd in os.listdir(f"/proc/{helper}/fd")]
            shared = {(os.readlink(fd).partition(":")[0], fd.stat().st_ino) for fd in opened}
            assert sorted(kind for kind, _ in shared if kind in ("socket", "/memfd")) == ["/memfd", "socket"]


def test_a_killed_helper_is_an_error_and_the_rest_works(repository: Repository) -> None:
    before = set(children())
    with StorePool(repository, 1, worth=0) as pool:
        (helper,) = set(children()) - before
        slot = free_slot(pool)
        slot.append(b"x" * 100)
        os.kill(helper, signal.SIGKILL)
        slot.send()
        with pytest.raises(StorageError, match="ended unexpectedly"):
            slot.wait()
        writer = pool.writer()
        assert writer is not None
        with pytest.raises(StorageError, match="ended unexpectedly"):
            writer.write(NOISE)
        writer.close()
    with StorePool(repository, 1, worth=0) as pool:
        slot = free_slot(pool)
        slot.append(b"x" * 100)
        slot.send()
        assert len(slot.wait()) == 1


def test_an_error_of_a_helper_is_ours(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    popen = subprocess.Popen

    def limited(*args: object, **kwargs: object) -> object:
        process = popen(*args, **kwargs)  # type: ignore[call-overload]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        return process

    monkeypatch.setattr(subprocess, "Popen", limited)
    with StorePool(repository, 1, worth=0) as pool:
        writer = pool.writer()
        assert writer is not None
        with pytest.raises(StorageError, match="cannot write an object of the repository: File too large"):
            writer.write(bytes(20 << 20))
        writer.close()


@pytest.mark.parametrize(
    "error", [*(kind("said so") for kind in store_helper._ERRORS.values()), StorageError("bad\nsector")]
)
def test_errors_keep_their_kind(error: HostimageError) -> None:
    with pytest.raises(type(error)) as raised:
        store_helper.decode_answer(store_helper.encode_error(error), Algorithm.SHA256)
    assert raised.value.message == error.message


def test_helpers_end_with_their_parent(repository: Repository) -> None:
    program = (
        "import sys, time\n"
        "from hostimaged.composefs.repository import Repository\n"
        "from hostimaged.composefs.repository.store_pool import StorePool\n"
        "pool = StorePool(Repository.open(sys.argv[1]), 2, worth=0)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(repository.path)],
        stdout=subprocess.PIPE,
        env=python_environment(),
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        helpers = descendants(parent.pid)
        assert len(helpers) == 2
        parent.kill()

    def gone(process: Process) -> bool:
        try:
            return process.state == "Z"
        except OSError:
            return True

    assert eventually(lambda: all(map(gone, helpers)))


def test_helpers_are_started_when_they_are_worth_it(repository: Repository) -> None:
    before = children()
    with StorePool(repository, 2, worth=1 << 20) as pool:
        pool.spend(900_000)
        assert pool.slot() is None
        assert pool.writer() is None
        # Files count as well.
        for _ in range(20):
            pool.spend(0)
        assert eventually(lambda: len(children()) == len(before) + 2)
        assert eventually(lambda: pool.slot() is not None)
        assert pool.writer() is not None
    assert children() == before


def test_helpers_that_were_not_needed_are_not_started(repository: Repository) -> None:
    before = children()
    with StorePool(repository, 2) as pool:
        pool.spend(100_000)
    pool.close()
    assert children() == before
