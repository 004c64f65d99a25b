"""Objects of the repository on a real file system."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import ObjectMissing, Repository
from hostimaged.errors import LimitsExceeded, VerityMismatch
from hostimaged.ids import ObjectId

HELLO = ObjectId.fromhex("1e2eaa4202d750a41174ee454970b92c1bc2f925b1e35076d8c7d5f56362ba64")


def test_store_object(repository: Repository, path: Path) -> None:
    stored = repository.store_object(b"hello world")
    assert stored.id == HELLO
    assert stored.is_new
    assert not repository.store_object(memoryview(b"hello world")).is_new
    file = path / "objects" / HELLO.pathname
    assert file.read_bytes() == b"hello world"
    assert file.stat().st_mode & 0o777 == 0o644
    assert repository.has_object(HELLO)
    assert repository.object_size(HELLO) == 11
    assert repository.read_object(HELLO, 11) == b"hello world"
    assert [p.name for p in (path / "objects").iterdir()] == ["1e"]


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 300_000])
def test_both_ways_of_storing_agree(repository: Repository, size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    with repository.object_writer() as writer:
        for at in range(0, size, 70_001):
            writer.write(data[at : at + 70_001])
        stored = writer.commit()
    assert stored.is_new
    assert stored.id == fsverity.digest(Algorithm.SHA256, data)
    again = repository.store_object(data)
    assert again.id == stored.id
    assert not again.is_new
    with repository.object_writer() as writer:
        writer.write(data)
        assert not writer.commit().is_new
    assert repository.read_object(stored.id, size) == data


def test_an_abandoned_writer_leaves_nothing(repository: Repository, path: Path) -> None:
    with repository.object_writer() as writer:
        writer.write(b"hello world")
    assert not repository.has_object(HELLO)
    assert list((path / "objects").iterdir()) == []


def test_missing_objects(repository: Repository) -> None:
    for attempt in (
        repository.open_object,
        repository.object_size,
        lambda id_: repository.read_object(id_, 1),
    ):
        with pytest.raises(ObjectMissing, match=f"object {HELLO.hex()} is missing"):
            attempt(HELLO)
    assert not repository.has_object(HELLO)
    repository.store_object(b"hello world")
    assert not repository.has_object(ObjectId(bytes(32)))


def test_read_object_checks_size_and_content(repository: Repository, path: Path) -> None:
    repository.store_object(b"hello world")
    with pytest.raises(LimitsExceeded):
        repository.read_object(HELLO, 10)
    (path / "objects" / HELLO.pathname).write_bytes(b"hellO world")
    with pytest.raises(VerityMismatch):
        repository.read_object(HELLO, 100)


def test_objects_cut_short_by_a_crash_are_replaced(repository: Repository, path: Path) -> None:
    """As a power cut before ``syncfs`` leaves them: the name is there, the content is not."""
    file = path / "objects" / HELLO.pathname
    repository.store_object(b"hello world")
    for damage in (b"", b"hello", b"hello world and more"):
        file.write_bytes(damage)
        assert repository.store_object(b"hello world").is_new
        assert file.read_bytes() == b"hello world"
        file.write_bytes(damage)
        with repository.object_writer() as writer:
            writer.write(b"hello world")
            assert writer.commit().is_new
        assert file.read_bytes() == b"hello world"
    assert [p.name for p in (path / "objects").iterdir()] == ["1e"]


def test_storing_from_many_threads(repository: Repository) -> None:
    contents = [b"content %d" % number * 500 for number in range(200)]
    new: list[bool] = []
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(streaming: bool) -> None:
        barrier.wait()
        try:
            for content in contents:
                if streaming:
                    with repository.object_writer() as writer:
                        writer.write(content)
                        new.append(writer.commit().is_new)
                else:
                    new.append(repository.store_object(content).is_new)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(new) == 1600
    assert new.count(True) == 200
    for content in contents:
        assert repository.read_object(fsverity.digest(Algorithm.SHA256, content), 10_000) == content


def test_used_bytes(repository: Repository, path: Path) -> None:
    assert repository.used_bytes() == 0
    for number in range(10):
        repository.store_object(b"%d" % number * 5000)
    repository.sync()
    files = [p for p in (path / "objects").rglob("*") if p.is_file()]
    assert repository.used_bytes() == sum(p.stat().st_blocks * 512 for p in files) >= 50_000
