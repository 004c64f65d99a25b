"""The repository when the disk fails: at every single change of the file system, each in its turn.

Two kinds of failure. An *error* is told by one system call; the operation must raise the typed error, leave
nothing of its own behind, and succeed when tried again. A *crash* lets nothing change from then on, clean-up
included; a name that is there afterwards must lead to something whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.disk import EXPECTED, Crash, Disk
from hostimaged.composefs import fsverity, splitstream
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import OldRepository, Repository, RepositoryMissing, Verity
from hostimaged.composefs.splitstream import ContentType, SplitStream
from hostimaged.errors import HostimageError, StorageError
from hostimaged.ids import ObjectId
from hostimaged.system import durable, syscalls

OLD, NEW = b"old content" * 100, b"new content" * 100
DAMAGED = b"soon to be cut short" * 100
DAMAGED_ID = fsverity.digest(Algorithm.SHA256, DAMAGED)
NOISE = bytes(os.urandom(3000))

# --- the operations -----------------------------------------------------------------------------------------

Operation = Callable[[Path], object]


def with_repository(work: Callable[[Repository], object]) -> Operation:
    def operation(path: Path) -> object:
        with Repository.open(path) as repository:
            return work(repository)

    return operation


def stream_of(repository: Repository, data: bytes, inline: bytes = b"") -> splitstream.Writer:
    writer = repository.new_stream(ContentType.BLOB)
    try:
        stored = repository.store_object(data)
        writer.inline(inline)
        writer.external(stored.id, len(data))
    except BaseException:
        writer.close()
        raise
    return writer


def stream_object(repository: Repository) -> ObjectId:
    with repository.object_writer() as writer:
        writer.write(NEW[:50])
        writer.write(NEW[50:])
        return writer.commit().id


def heal(repository: Repository) -> object:
    """Replace an object that a crash had cut short."""
    os.truncate(repository.path / "objects" / DAMAGED_ID.pathname, 10)
    return repository.store_object(DAMAGED)


OPERATIONS: dict[str, Operation] = {
    "store": with_repository(lambda r: r.store_object(NEW)),
    "store streaming": with_repository(stream_object),
    "store over a damaged one": with_repository(heal),
    "write a stream": with_repository(lambda r: r.write_stream("new", stream_of(r, NEW), "a/new/ref")),
    "write a spooled stream": with_repository(
        lambda r: r.write_stream("new", stream_of(r, NEW, NOISE), "a/new/ref")
    ),
    "rewrite a stream": with_repository(lambda r: r.write_stream("old", stream_of(r, NEW), "old/ref")),
    "name a stream": with_repository(lambda r: r.name_stream("old", "another/ref")),
    "point a reference anew": with_repository(lambda r: r.name_stream("old", "old/other")),
    "remove a reference": with_repository(lambda r: r.remove_stream_ref("old/ref")),
    "write an image": with_repository(lambda r: r.write_image(NEW, "new/image")),
}


def prepare(path: Path) -> None:
    repository, _ = Repository.init(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    with repository:
        repository.write_stream("old", stream_of(repository, OLD), "old/ref")
        repository.write_stream("other", stream_of(repository, b"x" * 100), "old/other")
        repository.write_image(OLD, "old/image")
        repository.store_object(DAMAGED)


def links(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): os.readlink(p) for p in path.rglob("*") if p.is_symlink()}


def check_whole(path: Path, *, temporary: bool, damaged: bool = False) -> None:
    """Every object is what its name says (one may be ``damaged``), every name leads to something whole."""
    for file in (path / "objects").rglob("*"):
        if not file.is_file():
            continue
        if file.name.startswith(".tmp-object-"):
            assert temporary, file
            continue
        id_ = ObjectId.fromhex(file.parent.name + file.name)
        if not damaged or id_ != DAMAGED_ID:
            assert fsverity.digest(Algorithm.SHA256, file.read_bytes()) == id_
    for name, text in links(path).items():
        if name.startswith(".symlink-"):
            assert temporary, name
            continue
        assert (path / name).exists(), (name, text)
    with Repository.open_unlocked(path) as repository:
        for name in [*repository.streams(), *(f"refs/{ref}" for ref in repository.stream_refs())]:
            with repository.open_stream(name) as stream:
                check_stream(repository, stream)
        for image in repository.images():
            os.close(repository.open_image(image))


def check_stream(repository: Repository, stream: SplitStream) -> None:
    out = bytearray()
    splitstream.cat(stream, repository, out.extend)
    assert len(out) == stream.size


@pytest.fixture(params=[True, False], ids=["O_TMPFILE", "named"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    # Spool everything: the temporary files of a stream are part of the exercise.
    monkeypatch.setattr(splitstream, "_PENDING_LIMIT", 1000)
    monkeypatch.setattr(splitstream, "_COMPRESSED_LIMIT", 500)
    monkeypatch.setattr("hostimaged.composefs.repository.repository._STREAM_IN_MEMORY", 2000)
    # The syncs are steps like others, but nothing is gained by doing them thousands of times.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(syscalls, "syncfs", lambda fd: None)
    return Disk(monkeypatch, tmpfile=request.param)


def steps_of(disk: Disk, tmp_path: Path, operation: Operation, code: int) -> int:
    """The number of changes that the operation makes; installs the disk."""
    path = tmp_path / "trial"
    prepare(path)
    disk.install()
    disk.plan(-1, code)
    operation(path)
    assert disk.count
    return disk.count


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_errors(disk: Disk, tmp_path: Path, name: str, code: int) -> None:
    operation = OPERATIONS[name]
    steps = steps_of(disk, tmp_path, operation, code)
    for at in range(steps):
        path = tmp_path / f"at-{at}"
        disk.plan(-1, 0)
        prepare(path)
        before = links(path)
        disk.plan(at, code)
        try:
            operation(path)
        except HostimageError as error:
            assert type(error) is EXPECTED[code], (at, error)  # noqa: PT017
            assert str(tmp_path) not in error.message  # noqa: PT017
        else:
            pytest.fail(f"no error at step {at} of {name}")
        disk.plan(-1, 0)
        check_whole(path, temporary=False, damaged="damaged" in name)
        assert before.keys() <= links(path).keys()
        operation(path)
        check_whole(path, temporary=False)
        assert links(path) == links(tmp_path / "trial")


@pytest.mark.parametrize("name", OPERATIONS)
def test_crashes(disk: Disk, tmp_path: Path, name: str) -> None:
    operation = OPERATIONS[name]
    steps = steps_of(disk, tmp_path, operation, 0)
    for at in range(steps):
        path = tmp_path / f"at-{at}"
        disk.plan(-1, 0)
        prepare(path)
        disk.plan(at, 0)
        with pytest.raises(Crash):
            operation(path)
        disk.plan(-1, 0)
        check_whole(path, temporary=True, damaged="damaged" in name)
        operation(path)
        check_whole(path, temporary=True)


def make(path: Path) -> None:
    Repository.ensure(path, verity=Verity.OPPORTUNISTIC)[0].close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, 0])
def test_making_a_repository(disk: Disk, tmp_path: Path, code: int) -> None:
    disk.install()
    disk.plan(-1, code)
    make(tmp_path / "trial")
    steps = disk.count
    assert steps >= 4
    for at in range(steps):
        parent = tmp_path / f"at-{at}"
        parent.mkdir()
        path = parent / "composefs"
        disk.plan(at, code)
        with pytest.raises(EXPECTED[code] if code else Crash):
            make(path)
        disk.plan(-1, 0)
        if code and not (path / "meta.json").exists():
            assert list(parent.iterdir()) == []
        try:
            Repository.open(path).close()
        except RepositoryMissing:
            assert not (path / "meta.json").exists()
        make(path)
        Repository.open(path).close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, 0])
def test_upgrading_a_repository(disk: Disk, tmp_path: Path, code: int) -> None:
    """At any time it is one of the old format, or one that was upgraded."""

    def old(name: str) -> Path:
        prepare(tmp_path / name)
        (tmp_path / name / "meta.json").unlink()
        return tmp_path / name

    path = old("trial")
    disk.install()
    disk.plan(-1, code)
    Repository.upgrade(path)[0].close()
    expected = (path / "meta.json").read_bytes()
    steps = disk.count
    assert steps >= 3
    for at in range(steps):
        disk.plan(-1, 0)
        path = old(f"at-{at}")
        names = set(os.listdir(path))
        disk.plan(at, code)
        with pytest.raises(EXPECTED[code] if code else Crash):
            Repository.upgrade(path)
        disk.plan(-1, 0)
        added = set(os.listdir(path)) - names
        if "meta.json" in added:
            assert (path / "meta.json").read_bytes() == expected
            Repository.open(path).close()
        else:
            with pytest.raises(OldRepository):
                Repository.open(path)
        left_over = {name for name in added if name.startswith(".meta.json-")}
        assert added - left_over <= {"meta.json"}
        assert not left_over or not code, "only a crash leaves a temporary file"
        repository, _ = Repository.upgrade(path)
        repository.close()
        assert (path / "meta.json").read_bytes() == expected
        check_whole(path, temporary=False)


def test_a_failing_sync_keeps_the_name_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "composefs"
    prepare(path)
    before = links(path)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "sync_filesystem", fail)
    with Repository.open(path) as repository:
        with pytest.raises(StorageError, match="cannot sync the repository: Input/output error"):
            repository.write_stream("new", stream_of(repository, NEW), "ref")
        with pytest.raises(StorageError):
            repository.write_image(NEW, "ref")
    assert links(path) == before


def test_failing_reads_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "composefs"
    prepare(path)

    def fail(*args: object, **kwargs: object) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with Repository.open(path) as repository:
        id_ = fsverity.digest(Algorithm.SHA256, OLD)
        stream = repository.open_stream("old")
        calls: dict[str, list[Callable[[], object]]] = {
            "stat": [
                lambda: repository.has_object(id_),
                lambda: repository.store_object(OLD),
                lambda: repository.stream_modified("old/ref"),
            ],
            "pread": [lambda: repository.open_stream("old"), lambda: list(stream.chunks())],
            "readv": [lambda: splitstream.cat(stream, repository, bytearray().extend)],
            "scandir": [repository.used_bytes, repository.streams, repository.stream_refs],
            "fstatvfs": [repository.check_writable],
            "open": [lambda: Repository.open(path), lambda: Repository.open_unlocked(path)],
        }
        for name, attempts in calls.items():
            for attempt in attempts:
                with monkeypatch.context() as patch:
                    patch.setattr(os, name, fail)
                    with pytest.raises(StorageError, match="Input/output error"):
                        attempt()
        stream.close()
