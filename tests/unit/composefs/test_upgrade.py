"""Repositories without meta.json: what is inferred, what is refused, on a stand-in for fs-verity."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import (
    FormatSet,
    OldRepository,
    Repository,
    RepositoryMissing,
    Verity,
    VerityUnavailable,
)
from hostimaged.errors import HostimageError, LockTimeout, PreconditionFailed, StorageError
from hostimaged.system import syscalls

CONTENTS = [b"%d" % number * 1000 for number in range(20)]

both_algorithms = pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)


class Kernel:
    """fs-verity for the files in ``enabled``, by inode; ``supported`` or not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.supported = True
        self.enabled: dict[int, tuple[int, bytes]] = {}
        monkeypatch.setattr(syscalls, "measure_verity", self.measure)
        monkeypatch.setattr(syscalls, "enable_verity", self.enable)

    def measure(self, fd: int, algorithm_id: int, digest_size: int) -> bytes:
        if not self.supported:
            raise syscalls.VerityUnsupported(errno.EOPNOTSUPP, "Operation not supported")
        found = self.enabled.get(os.fstat(fd).st_ino)
        if found is None:
            raise syscalls.VerityMissing(errno.ENODATA, "No data available")
        if found[0] != algorithm_id:
            raise ValueError("fs-verity digest of another hash")
        return found[1]

    def enable(self, fd: int, algorithm_id: int) -> None:
        if not self.supported:
            raise syscalls.VerityUnsupported(errno.EOPNOTSUPP, "Operation not supported")
        algorithm = next(a for a in Algorithm if a.kernel_id == algorithm_id)
        self.enabled[os.fstat(fd).st_ino] = algorithm_id, bytes(fsverity.digest_fd(algorithm, fd))

    def disable(self, path: Path) -> None:
        del self.enabled[path.stat().st_ino]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def old(path: Path, algorithm: Algorithm = Algorithm.SHA256) -> Path:
    """A repository of the old format, with fs-verity where the kernel has it."""
    with Repository.init(path, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0] as repository:
        for content in CONTENTS:
            repository.store_object(content)
        repository.write_image(b"image", "name")
    # Not removed: its inode must not become that of another file, which would seem to have its fs-verity.
    (path / "meta.json").rename(path.with_name("removed"))
    return path


def objects(path: Path) -> list[Path]:
    return sorted(path.glob("objects/??/*"))


def upgraded(path: Path, verity: Verity | None = None) -> tuple[Algorithm, bool]:
    repository, done = Repository.upgrade(path, verity=verity)
    with repository:
        assert done
        for content in CONTENTS:
            os.close(repository.open_object(fsverity.digest(repository.algorithm, content)))
        return repository.algorithm, repository.secure


@both_algorithms
@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("verity", [None, Verity.OPPORTUNISTIC])
def test_what_the_objects_say(
    tmp_path: Path, kernel: Kernel, algorithm: Algorithm, supported: bool, verity: Verity | None
) -> None:
    kernel.supported = supported
    path = old(tmp_path / "composefs", algorithm)
    with pytest.raises(OldRepository):
        Repository.open(path)
    assert upgraded(path, verity) == (algorithm, supported)
    reference = tmp_path / "new"
    Repository.init(reference, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0].close()
    assert (path / "meta.json").read_bytes() == (reference / "meta.json").read_bytes()


def test_required(tmp_path: Path, kernel: Kernel) -> None:
    path = old(tmp_path / "composefs")
    assert upgraded(path, Verity.REQUIRE) == (Algorithm.SHA256, True)


@pytest.mark.parametrize("verity", [None, Verity.OPPORTUNISTIC])
def test_no_verity_where_there_could_be(tmp_path: Path, kernel: Kernel, verity: Verity | None) -> None:
    """Made without, on a file system that has it: meta.json must not have it, or nothing could be opened."""
    path = old(tmp_path / "composefs")
    kernel.enabled.clear()
    assert upgraded(path, verity) == (Algorithm.SHA256, False)
    assert not kernel.enabled


@pytest.mark.parametrize("which", [0, 7, -1])
def test_some_objects_have_verity(tmp_path: Path, kernel: Kernel, which: int) -> None:
    path = old(tmp_path / "composefs")
    kernel.disable(objects(path)[which])
    for verity in (None, Verity.REQUIRE):
        with pytest.raises(PreconditionFailed, match="has no fs-verity, and object") as caught:
            Repository.upgrade(path, verity=verity)
        assert objects(path)[which].name in caught.value.message
        assert not (path / "meta.json").exists()
    assert upgraded(path, Verity.OPPORTUNISTIC) == (Algorithm.SHA256, False)


@pytest.mark.parametrize("supported", [True, False])
def test_required_and_none_has_it(tmp_path: Path, kernel: Kernel, supported: bool) -> None:
    path = old(tmp_path / "composefs")
    kernel.enabled.clear()
    kernel.supported = supported
    with pytest.raises(PreconditionFailed, match="as none of its objects has"):
        Repository.upgrade(path, verity=Verity.REQUIRE)
    assert not (path / "meta.json").exists()


def test_verity_of_another_hash_is_none(tmp_path: Path, kernel: Kernel) -> None:
    path = old(tmp_path / "composefs")
    kernel.enabled = {file.stat().st_ino: (2, bytes(64)) for file in objects(path)}
    with Repository.upgrade(path)[0] as repository:
        assert not repository.secure


def test_verity_fails_on_the_new_file(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old(tmp_path / "composefs")

    def enable(fd: int, algorithm_id: int) -> None:
        raise syscalls.VerityUnsupported(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(syscalls, "enable_verity", enable)
    before = sorted(path.iterdir())
    with pytest.raises(VerityUnavailable):
        Repository.upgrade(path)
    assert sorted(path.iterdir()) == before


# --- what is refused, and what is left alone ----------------------------------------------------------------


def test_two_hashes(tmp_path: Path) -> None:
    path = old(tmp_path / "composefs")
    (path / "objects/fe").mkdir(exist_ok=True)
    (path / "objects/fe" / ("0" * 126)).touch()
    with pytest.raises(PreconditionFailed, match="objects of sha256 and of sha512"):
        Repository.upgrade(path)
    assert not (path / "meta.json").exists()


def test_what_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "composefs"
    for name in (
        "00/" + "0" * 63,
        "00/" + "g" * 62,
        "zz/" + "0" * 62,
        "000/" + "0" * 62,
        "00/" + "0" * 61 + "\n",
    ):
        (path / "objects" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "objects" / name).touch()
    with pytest.raises(PreconditionFailed, match="no objects that tell its hash"):
        Repository.upgrade(path)
    (path / "objects/00" / ("0" * 62)).touch()
    with Repository.upgrade(path)[0] as repository:
        assert repository.algorithm is Algorithm.SHA256


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "composefs"
    (path / "objects/00").mkdir(parents=True)
    os.mkfifo(path / "objects/00" / ("0" * 62))
    with Repository.upgrade(path)[0] as repository:
        assert not repository.secure


def test_an_object_that_cannot_be_opened(tmp_path: Path) -> None:
    path = old(tmp_path / "composefs")
    (path / "objects/00").mkdir(exist_ok=True)
    (path / "objects/00" / ("0" * 62)).symlink_to("nowhere")
    with pytest.raises(StorageError, match="cannot upgrade the repository"):
        Repository.upgrade(path)
    assert not (path / "meta.json").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RepositoryMissing):
        Repository.upgrade(tmp_path / "composefs")
    (tmp_path / "composefs").mkdir()
    with pytest.raises(RepositoryMissing):
        Repository.upgrade(tmp_path / "composefs")
    assert list((tmp_path / "composefs").iterdir()) == []


def test_again(tmp_path: Path) -> None:
    path = old(tmp_path / "composefs")
    formats = FormatSet(Format.V2, (Format.V1,))
    with Repository.upgrade(path, formats=formats)[0] as repository:
        assert repository.formats == formats
    before = (path / "meta.json").stat()
    repository, done = Repository.upgrade(path)
    with repository:
        assert not done
        assert repository.formats == formats
    assert (path / "meta.json").stat() == before


@pytest.mark.parametrize("text", ["{", json.dumps({"version": 9, "algorithm": "fsverity-sha256-12"})])
def test_metadata_of_others_is_left_alone(tmp_path: Path, text: str) -> None:
    path = old(tmp_path / "composefs")
    (path / "meta.json").write_text(text)
    with pytest.raises(HostimageError):
        Repository.upgrade(path)
    assert (path / "meta.json").read_text() == text


def test_another_program_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "composefs")
    real = syscalls.link_fd
    other = tmp_path / "other"
    Repository.init(other, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)[0].close()

    def overtaken(fd: int, directory: int, name: str) -> None:
        if name == "meta.json":
            (path / name).write_bytes((other / name).read_bytes())
        real(fd, directory, name)

    monkeypatch.setattr(syscalls, "link_fd", overtaken)
    repository, done = Repository.upgrade(path)
    with repository:
        assert not done


def test_lock(tmp_path: Path) -> None:
    """A collector that knows the old format holds the lock while it removes objects."""
    path = old(tmp_path / "composefs")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert syscalls.try_flock(fd, exclusive=True)
        begun = time.monotonic()
        with pytest.raises(LockTimeout):
            Repository.upgrade(path, lock_timeout=0.1)
        assert time.monotonic() - begun < 5
        assert not (path / "meta.json").exists()
    finally:
        os.close(fd)
    with Repository.upgrade(path)[0], pytest.raises(LockTimeout):
        Repository.open(path, exclusive=True, lock_timeout=0.1)
