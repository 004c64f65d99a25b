"""Secure and insecure repositories, on a stand-in for a kernel with fs-verity.

The stand-in keeps the kernel's rules: a file can be enabled once, read-only, and while nobody has it open for
writing; what it measures is the digest of the bytes that are there.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity, VerityUnavailable
from hostimaged.errors import NotSupported, StorageError, VerityMismatch
from hostimaged.ids import ObjectId
from hostimaged.system import syscalls

SHA256 = Algorithm.SHA256


class Kernel:
    """fs-verity for all files of this process."""

    def __init__(self) -> None:
        self.supported = True
        self.enable_error = 0
        self.busy = 0
        self.files: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.enabled = 0
        self.measured = 0

    @staticmethod
    def key(fd: int) -> tuple[int, int]:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino

    def _unsupported(self) -> None:
        if not self.supported:
            raise syscalls.VerityUnsupported(errno.EOPNOTSUPP, "Operation not supported")

    def enable(self, fd: int, algorithm_id: int) -> None:
        self._unsupported()
        if self.enable_error:
            raise OSError(self.enable_error, os.strerror(self.enable_error))
        key = self.key(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if self.busy or self._writable(key):
            self.busy = max(0, self.busy - 1)
            raise OSError(errno.ETXTBSY, "Text file busy")
        if key in self.files:
            raise FileExistsError(errno.EEXIST, "File exists")
        algorithm = next(a for a in Algorithm if a.kernel_id == algorithm_id)
        self.files[key] = algorithm_id, bytes(fsverity.digest_fd(algorithm, fd))
        self.enabled += 1

    def _writable(self, key: tuple[int, int]) -> bool:
        for name in os.listdir("/proc/self/fd"):
            try:
                if self.key(int(name)) == key and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE:
                    return True
            except OSError:
                continue
        return False

    def measure(self, fd: int, algorithm_id: int, digest_size: int) -> bytes:
        self._unsupported()
        self.measured += 1
        if self.key(fd) not in self.files:
            raise syscalls.VerityMissing(errno.ENODATA, "No data available")
        found, digest = self.files[self.key(fd)]
        if (found, len(digest)) != (algorithm_id, digest_size):
            raise ValueError("fs-verity digest of another hash")
        return digest

    def forget(self, path: Path) -> None:
        """As if the file had been copied without its fs-verity."""
        status = path.stat()
        del self.files[status.st_dev, status.st_ino]

    def pretend(self, path: Path, digest: bytes, algorithm: Algorithm = SHA256) -> None:
        status = path.stat()
        self.files[status.st_dev, status.st_ino] = algorithm.kernel_id, digest


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(syscalls, "enable_verity", kernel.enable)
    monkeypatch.setattr(syscalls, "measure_verity", kernel.measure)
    return kernel


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "composefs"


@pytest.fixture
def secure(path: Path, kernel: Kernel) -> Iterator[Repository]:
    repository, _ = Repository.init(path, algorithm=SHA256, verity=Verity.REQUIRE)
    with repository:
        assert repository.secure
        yield repository


@pytest.fixture
def insecure(path: Path, kernel: Kernel) -> Iterator[Repository]:
    """Insecure on a file system with fs-verity, as ``cfsctl init --insecure`` makes it."""
    kernel.supported = False
    Repository.init(path, algorithm=SHA256, verity=Verity.OPPORTUNISTIC)[0].close()
    kernel.supported = True
    with Repository.open(path) as repository:
        assert not repository.secure
        yield repository


def store(repository: Repository, data: bytes, *, streaming: bool) -> ObjectId:
    if not streaming:
        return repository.store_object(data).id
    with repository.object_writer() as writer:
        writer.write(data)
        return writer.commit().id


def object_file(path: Path, id_: ObjectId) -> Path:
    return path / "objects" / id_.pathname


both_ways = pytest.mark.parametrize("streaming", [False, True])


# --- making -------------------------------------------------------------------------------------------------


def test_verity_of_meta_json_is_what_makes_a_repository_secure(path: Path, kernel: Kernel) -> None:
    path.mkdir()
    for wanted in Verity:
        repository, _ = Repository.init(path / wanted, verity=wanted)
        with repository:
            assert repository.secure
    assert len(kernel.files) == 2
    kernel.forget(path / "require/meta.json")
    with Repository.open(path / "require") as repository:
        assert not repository.secure


def test_required_but_unsupported_leaves_nothing(tmp_path: Path, path: Path, kernel: Kernel) -> None:
    kernel.supported = False
    with pytest.raises(VerityUnavailable, match="does not support fs-verity") as caught:
        Repository.init(path, verity=Verity.REQUIRE)
    assert isinstance(caught.value, NotSupported)
    assert "opportunistic" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    path.mkdir()
    with pytest.raises(VerityUnavailable):
        Repository.ensure(path, verity=Verity.REQUIRE)
    assert list(path.iterdir()) == []


def test_this_kernel_without_a_stand_in(tmp_path: Path, path: Path) -> None:
    """The machines of the project have no fs-verity; where there is, the repository must be secure."""
    try:
        repository, _ = Repository.init(path, verity=Verity.REQUIRE)
    except VerityUnavailable:
        assert list(tmp_path.iterdir()) == []
        return
    with repository:
        assert repository.secure


def test_verity_of_another_hash(path: Path, kernel: Kernel) -> None:
    Repository.init(path, algorithm=SHA256)[0].close()
    kernel.pretend(path / "meta.json", bytes(64), Algorithm.SHA512)
    with pytest.raises(VerityMismatch, match="another hash"):
        Repository.open(path)


@pytest.mark.usefixtures("secure")
def test_an_existing_secure_repository_is_secure_for_all(path: Path) -> None:
    repository, is_new = Repository.ensure(path, verity=Verity.OPPORTUNISTIC)
    with repository:
        assert not is_new
        assert repository.secure
    with Repository.open(path, insecure=True) as repository:
        assert not repository.secure


# --- storing ------------------------------------------------------------------------------------------------


@both_ways
def test_secure_objects_have_verity(
    secure: Repository, path: Path, kernel: Kernel, *, streaming: bool
) -> None:
    id_ = store(secure, b"content", streaming=streaming)
    status = object_file(path, id_).stat()
    assert kernel.files[status.st_dev, status.st_ino] == (1, id_)
    os.close(secure.open_object(id_))
    enabled = kernel.enabled
    assert store(secure, b"content", streaming=streaming) == id_
    assert kernel.enabled == enabled


@both_ways
def test_insecure_objects_have_verity_where_they_can(
    insecure: Repository, path: Path, kernel: Kernel, *, streaming: bool
) -> None:
    id_ = store(insecure, b"content", streaming=streaming)
    status = object_file(path, id_).stat()
    assert kernel.files[status.st_dev, status.st_ino] == (1, id_)


@both_ways
def test_unsupported_while_storing(
    secure: Repository, path: Path, kernel: Kernel, *, streaming: bool
) -> None:
    kernel.supported = False
    with pytest.raises(VerityUnavailable):
        store(secure, b"content", streaming=streaming)
    assert list((path / "objects").rglob("*")) == []
    with Repository.open(path, insecure=True) as repository:
        id_ = store(repository, b"content", streaming=streaming)
        assert repository.read_object(id_, 100) == b"content"


@both_ways
@pytest.mark.parametrize("which", ["secure", "insecure"])
def test_other_failures_to_enable(
    request: pytest.FixtureRequest, path: Path, kernel: Kernel, which: str, *, streaming: bool
) -> None:
    repository = request.getfixturevalue(which)
    kernel.enable_error = errno.EIO
    with pytest.raises(StorageError, match="Input/output error"):
        store(repository, b"content", streaming=streaming)
    assert list((path / "objects").rglob("*")) == []


@both_ways
@pytest.mark.parametrize("which", ["secure", "insecure"])
def test_a_kernel_that_comes_to_another_digest(
    request: pytest.FixtureRequest,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    *,
    streaming: bool,
) -> None:
    repository = request.getfixturevalue(which)
    monkeypatch.setattr(syscalls, "measure_verity", lambda fd, algorithm_id, size: bytes(size))
    with pytest.raises(VerityMismatch):
        store(repository, b"content", streaming=streaming)
    assert list((path / "objects").rglob("*")) == []


@both_ways
def test_found_without_verity(secure: Repository, path: Path, kernel: Kernel, *, streaming: bool) -> None:
    """Existing object, verity missing: secure refuses it, insecure enables it."""
    id_ = store(secure, b"content", streaming=False)
    kernel.forget(object_file(path, id_))
    with pytest.raises(VerityMismatch, match="has no fs-verity, which this repository requires"):
        store(secure, b"content", streaming=streaming)
    with Repository.open(path, insecure=True) as insecure:
        assert store(insecure, b"content", streaming=streaming) == id_
    os.close(secure.open_object(id_))  # now it has


def test_found_without_verity_and_with_other_content(
    insecure: Repository, path: Path, kernel: Kernel
) -> None:
    id_ = insecure.store_object(b"content").id
    file = object_file(path, id_)
    kernel.forget(file)
    file.write_bytes(b"CONTENT")
    with pytest.raises(VerityMismatch):
        insecure.store_object(b"content")
    kernel.forget(file)
    kernel.enable_error = errno.EIO
    with pytest.raises(StorageError):
        insecure.store_object(b"content")
    kernel.enable_error, kernel.busy = 0, 100
    with pytest.raises(StorageError, match="open for writing"):
        insecure.store_object(b"content")


def test_found_where_verity_is_unsupported(secure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = secure.store_object(b"content").id
    kernel.supported = False
    with pytest.raises(VerityMismatch):
        secure.store_object(b"content")
    with Repository.open(path, insecure=True) as insecure:
        assert insecure.store_object(b"content").id == id_


def test_found_with_another_digest(secure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = secure.store_object(b"content").id
    kernel.pretend(object_file(path, id_), bytes(32))
    with pytest.raises(VerityMismatch, match="has the fs-verity digest 0000"):
        secure.store_object(b"content")
    kernel.pretend(object_file(path, id_), bytes(64), Algorithm.SHA512)
    with pytest.raises(VerityMismatch, match="another hash"):
        secure.store_object(b"content")


@both_ways
@pytest.mark.parametrize("which", ["secure", "insecure"])
def test_objects_cut_short_are_replaced(
    request: pytest.FixtureRequest, path: Path, kernel: Kernel, which: str, *, streaming: bool
) -> None:
    """What a crash left is not worth an error: it is proved wrong, and the right bytes are at hand."""
    repository = request.getfixturevalue(which)
    id_ = store(repository, b"content", streaming=False)
    file = object_file(path, id_)
    kernel.forget(file)
    os.truncate(file, 0)
    assert store(repository, b"content", streaming=streaming) == id_
    assert file.read_bytes() == b"content"
    status = file.stat()
    assert kernel.files[status.st_dev, status.st_ino] == (1, id_)


def test_an_unsupporting_file_system_is_asked_once(path: Path, kernel: Kernel) -> None:
    kernel.supported = False
    repository, _ = Repository.init(path, verity=Verity.OPPORTUNISTIC)
    with repository:
        kernel.supported = True
        for _ in range(2):
            repository.store_object(b"content")
        assert kernel.measured == kernel.enabled == 0


@both_ways
def test_stray_writable_descriptors(
    secure: Repository, path: Path, kernel: Kernel, *, streaming: bool
) -> None:
    """A fork in another thread keeps our descriptor for a moment: tried again, then a copy is made."""
    for busy in (1, 2, 3, 7):
        kernel.busy = busy
        content = b"content %d" % busy * 1000
        id_ = store(secure, content, streaming=streaming)
        assert secure.read_object(id_, 100_000) == content
        assert kernel.busy == 0
    kernel.busy = 10_000
    with pytest.raises(StorageError, match="stays open for writing"):
        store(secure, b"more", streaming=streaming)
    assert [p.name for p in (path / "objects").iterdir() if p.name.startswith(".")] == []


def test_failing_copy_of_a_busy_file(
    secure: Repository, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.busy = 3
    real = os.pread

    def fail(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError):
        secure.store_object(b"content")
    monkeypatch.setattr(os, "pread", real)


# --- opening ------------------------------------------------------------------------------------------------


def test_opening(secure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = secure.store_object(b"content").id
    file = object_file(path, id_)
    with Repository.open(path, insecure=True) as insecure:
        for repository in (secure, insecure):
            os.close(repository.open_object(id_))
        kernel.forget(file)
        os.close(insecure.open_object(id_))
        with pytest.raises(VerityMismatch, match="has no fs-verity"):
            secure.open_object(id_)
        kernel.supported = False
        os.close(insecure.open_object(id_))
        with pytest.raises(VerityMismatch, match="has no fs-verity"):
            secure.open_object(id_)
    kernel.supported = True
    kernel.pretend(file, bytes(32))
    with Repository.open(path, insecure=True) as insecure:
        for repository in (secure, insecure):
            with pytest.raises(VerityMismatch, match="has the fs-verity digest"):
                repository.open_object(id_)


def test_reading_checks_what_the_kernel_does_not(insecure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = insecure.store_object(b"content").id
    file = object_file(path, id_)
    kernel.forget(file)
    assert insecure.read_object(id_, 100) == b"content"
    file.write_bytes(b"CONTENT")
    os.close(insecure.open_object(id_))
    with pytest.raises(VerityMismatch, match="content with the digest"):
        insecure.read_object(id_, 100)


def test_streams_by_id_are_checked(secure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = secure.write_stream("name", secure.new_stream(1))
    secure.open_stream("name", id_).close()
    kernel.forget(object_file(path, id_))
    secure.open_stream("name").close()
    with pytest.raises(VerityMismatch):
        secure.open_stream("name", id_)


def test_images_by_id_are_checked(secure: Repository, path: Path, kernel: Kernel) -> None:
    id_ = secure.write_image(b"image", "ref")
    os.close(secure.open_image(id_.hex()))
    kernel.forget(object_file(path, id_))
    os.close(secure.open_image("ref"))
    with pytest.raises(VerityMismatch):
        secure.open_image(id_.hex())
    with Repository.open(path, insecure=True) as insecure:
        os.close(insecure.open_image(id_.hex()))
