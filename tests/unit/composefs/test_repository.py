"""The repository on a real file system: making, opening, locks, streams, images."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimaged.composefs import splitstream
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm, FsVerityError
from hostimaged.composefs.repository import (
    FormatSet,
    IncompatibleRepository,
    MetadataError,
    ObjectMissing,
    OldRepository,
    Repository,
    RepositoryMissing,
    StreamMissing,
    Verity,
)
from hostimaged.composefs.repository.names import link_text
from hostimaged.composefs.splitstream import ContentType, SplitStreamError
from hostimaged.errors import (
    Cancelled,
    CorruptRepository,
    ImageNotFound,
    InvalidArgs,
    LockTimeout,
    PreconditionFailed,
    ReadOnly,
    StorageError,
)
from hostimaged.ids import ObjectId

HELLO = ObjectId.fromhex("1e2eaa4202d750a41174ee454970b92c1bc2f925b1e35076d8c7d5f56362ba64")


def write_stream(
    repository: Repository, name: str, data: bytes, ref: str | None = None, *, inline: bytes = b""
) -> ObjectId:
    """A stream of ``inline`` and the object ``data``."""
    stored = repository.store_object(data)
    writer = repository.new_stream(ContentType.BLOB)
    writer.inline(inline)
    writer.external(stored.id, len(data))
    return repository.write_stream(name, writer, ref)


def links(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): os.readlink(p) for p in path.rglob("*") if p.is_symlink()}


# --- making and opening -------------------------------------------------------------------------------------


def test_init_makes_only_what_is_needed(path: Path) -> None:
    repository, is_new = Repository.init(path, verity=Verity.OPPORTUNISTIC)
    with repository:
        assert is_new
        assert repository.algorithm is Algorithm.SHA512
        assert repository.formats == FormatSet(Format.V1)
        assert not repository.secure
        assert repository.path == path
    assert path.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.iterdir()] == ["meta.json"]
    assert (path / "meta.json").stat().st_mode & 0o777 == 0o644


def test_init_again_opens(path: Path) -> None:
    formats = FormatSet(Format.V1, (Format.V2,))
    for expected in (True, False):
        repository, is_new = Repository.init(path, formats=formats, verity=Verity.OPPORTUNISTIC)
        with repository:
            assert is_new is expected
            assert repository.formats == formats


@pytest.mark.parametrize("different", [{"algorithm": Algorithm.SHA256}, {"formats": FormatSet(Format.V2)}])
def test_init_with_other_parameters(path: Path, different: dict[str, object]) -> None:
    Repository.init(path, verity=Verity.OPPORTUNISTIC)[0].close()
    with pytest.raises(PreconditionFailed, match=r"it is fsverity-sha512-12, v1, not fsverity-sha") as caught:
        Repository.init(path, verity=Verity.OPPORTUNISTIC, **different)  # type: ignore[arg-type]
    assert str(path) in caught.value.message


def test_ensure(path: Path) -> None:
    repository, is_new = Repository.ensure(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    with repository:
        assert is_new
    repository, is_new = Repository.ensure(path, algorithm=Algorithm.SHA512)
    with repository:
        assert not is_new
        assert repository.algorithm is Algorithm.SHA256


def test_ensure_in_an_empty_directory(path: Path) -> None:
    path.mkdir(mode=0o755)
    repository, is_new = Repository.ensure(path, verity=Verity.OPPORTUNISTIC)
    with repository:
        assert is_new
    assert path.stat().st_mode & 0o777 == 0o755


def test_ensure_loses_a_race(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program makes the repository, with other parameters, between our two looks."""
    Repository.init(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)[0].close()
    real = Repository.open
    looks = iter([RepositoryMissing(path=path)])

    def open_(where: Path, **kwargs: float) -> Repository:
        if (error := next(looks, None)) is not None:
            raise error
        return real(where, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Repository, "open", open_)
    repository, is_new = Repository.ensure(path, algorithm=Algorithm.SHA512)
    with repository:
        assert not is_new
        assert repository.algorithm is Algorithm.SHA256


def test_missing_repository(path: Path) -> None:
    for open_ in (Repository.open, Repository.open_unlocked):
        with pytest.raises(RepositoryMissing) as caught:
            open_(path)
        assert caught.value.message == f"there is no composefs repository at {path}"
    path.mkdir()
    with pytest.raises(RepositoryMissing):
        Repository.open(path)


def test_old_repository(path: Path) -> None:
    (path / "objects").mkdir(parents=True)
    for attempt in (Repository.open, Repository.open_unlocked, Repository.init, Repository.ensure):
        with pytest.raises(OldRepository, match=r"before 0\.7"):
            attempt(path)
    assert [p.name for p in path.iterdir()] == ["objects"]


def test_damaged_and_future_metadata(path: Path) -> None:
    path.mkdir()
    (path / "meta.json").write_text("{")
    with pytest.raises(MetadataError):
        Repository.open(path)
    (path / "meta.json").write_text('{"version": 2, "algorithm": "fsverity-sha256-12"}')
    with pytest.raises(IncompatibleRepository):
        Repository.ensure(path)


def test_metadata_that_is_no_file(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "meta.json")
    with pytest.raises((MetadataError, StorageError)):
        Repository.open(path)


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Repository.open(tmp_path / "file")
    with pytest.raises(StorageError):
        Repository.init(tmp_path / "file", verity=Verity.OPPORTUNISTIC)
    with pytest.raises(StorageError):
        Repository.init(tmp_path / "missing/composefs", verity=Verity.OPPORTUNISTIC)


def test_unknown_read_only_compatible_flag(path: Path) -> None:
    path.mkdir()
    (path / "meta.json").write_text(
        '{"version":1,"algorithm":"fsverity-sha256-12","features":{"read-only-compatible":["new_thing"]}}'
    )
    with Repository.open(path) as repository:
        writer = repository.new_stream
        attempts: list[Callable[[], object]] = [
            repository.check_writable,
            lambda: repository.store_object(b"x"),
            repository.object_writer,
            lambda: repository.name_stream("name", "ref"),
            lambda: repository.write_image(b"x"),
            lambda: repository.remove_stream_ref("ref"),
            lambda: repository.write_stream("name", writer(1)),
        ]
        for attempt in attempts:
            with pytest.raises(ReadOnly, match="new_thing"):
                attempt()
        assert repository.streams() == []
    assert [p.name for p in path.iterdir()] == ["meta.json"]


def test_read_only_mount(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs(0)
    fields = list(real)
    fields[8] |= os.ST_RDONLY
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(fields))
    with pytest.raises(ReadOnly):
        repository.check_writable()


def test_no_write_permission(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.check_writable()
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    with pytest.raises(ReadOnly):
        repository.check_writable()


def test_closing_twice_and_descriptors(repository: Repository) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for number in range(1000):
        repository.store_object(b"%d" % number)
    assert 200 < len(set(os.listdir("/proc/self/fd")) - before) < 270
    repository.close()
    repository.close()
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


# --- locks --------------------------------------------------------------------------------------------------


def test_shared_and_exclusive(repository: Repository) -> None:
    with Repository.open(repository.path, lock_timeout=0):
        pass
    with pytest.raises(LockTimeout, match=rf"composefs is locked by pid {os.getpid()} "):
        Repository.open(repository.path, exclusive=True, lock_timeout=0)
    with Repository.open_unlocked(repository.path):
        pass
    repository.relock(exclusive=True, lock_timeout=0)
    with pytest.raises(LockTimeout):
        Repository.open(repository.path, lock_timeout=0.01)
    with Repository.open_unlocked(repository.path) as looker:
        assert looker.streams() == []
    repository.relock(exclusive=False, lock_timeout=0)
    with Repository.open(repository.path, lock_timeout=0), pytest.raises(LockTimeout):
        repository.relock(exclusive=True, lock_timeout=0)


def test_waiting_for_the_lock(repository: Repository) -> None:
    repository.relock(exclusive=True)
    opened: list[float] = []

    def wait() -> None:
        with Repository.open(repository.path, lock_timeout=30):
            opened.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    released = time.monotonic()
    repository.relock(exclusive=False)
    thread.join(60)
    assert opened[0] >= released


def test_waiting_for_the_lock_can_be_cancelled(repository: Repository) -> None:
    repository.relock(exclusive=True)

    def cancel() -> None:
        raise Cancelled

    for wait in (Repository.open, Repository.ensure):
        with pytest.raises(Cancelled):
            wait(repository.path, lock_timeout=60, check=cancel)
    with Repository.open_unlocked(repository.path) as other, pytest.raises(Cancelled):
        other.relock(exclusive=False, lock_timeout=60, check=cancel)


def test_without_o_tmpfile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary names stand in ``objects``, where the collector of composefs-rs does not stumble on them."""
    real = os.open
    temporary: list[str] = []

    def open_(name: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if flags & os.O_EXCL:
            temporary.append(f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{name}")
        return real(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_)
    repository, _ = Repository.init(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    with repository:
        assert repository.store_object(b"hello world").id == HELLO
        write_stream(repository, "name", b"data" * 100)
        with repository.object_writer() as writer:
            writer.write(b"abandoned")
    assert temporary[1].startswith(f"{path}/objects/.tmp-object-")
    left = [p for p in path.rglob("*") if p.name.startswith(".")]
    assert left == []
    assert (path / "objects" / HELLO.pathname).read_bytes() == b"hello world"


# --- streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "target", "text"),
    [
        ("streams/oci-layer-sha256:1", "objects/4e/67", "../objects/4e/67"),
        ("images/67", "objects/4e/67", "../objects/4e/67"),
        ("images/refs/a", "images/67", "../67"),
        ("images/refs/some/name", "images/67", "../../67"),
        ("streams/refs/oci/tag", "streams/oci-manifest-sha256:1", "../../oci-manifest-sha256:1"),
    ],
)
def test_link_texts(link: str, target: str, text: str) -> None:
    assert link_text(link, target) == text


def test_write_stream(repository: Repository, path: Path) -> None:
    id_ = write_stream(repository, "oci-blob-sha256:1", b"data" * 100, "oci/tag", inline=b"inline")
    assert repository.has_stream("oci-blob-sha256:1") == id_
    assert repository.streams() == ["oci-blob-sha256:1"]
    assert repository.stream_refs() == {"oci/tag": "oci-blob-sha256:1"}
    assert repository.stream_refs("oci") == {"tag": "oci-blob-sha256:1"}
    assert repository.stream_refs("other") == {}
    assert links(path) == {
        "streams/oci-blob-sha256:1": f"../objects/{id_.pathname}",
        "streams/refs/oci/tag": "../../oci-blob-sha256:1",
    }
    for name, given in (("oci-blob-sha256:1", None), ("refs/oci/tag", None), ("", id_)):
        with repository.open_stream(name, given, ContentType.BLOB) as stream:
            out = bytearray()
            splitstream.cat(stream, repository, out.extend)
            assert bytes(out) == b"inline" + b"data" * 100
    assert not (path / "images").exists()


def test_streams_are_pointed_anew(repository: Repository) -> None:
    write_stream(repository, "name", b"one" * 100, "ref")
    before = repository.stream_modified("ref")
    two = write_stream(repository, "name", b"two" * 100, "ref")
    assert repository.has_stream("name") == two
    assert repository.stream_modified("ref") == before  # it leads to the name, which stayed
    write_stream(repository, "other", b"three" * 100, "ref")
    assert repository.stream_refs() == {"ref": "other"}
    assert repository.stream_modified("missing") is None


def test_large_streams_are_not_held_in_memory(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostimaged.composefs.repository.repository._STREAM_IN_MEMORY", 0)
    monkeypatch.setattr(splitstream, "_PENDING_LIMIT", 1000)
    monkeypatch.setattr(splitstream, "_COMPRESSED_LIMIT", 1000)
    noise = os.urandom(50_000)
    id_ = write_stream(repository, "name", b"data", inline=noise)
    with repository.open_stream("name", id_) as stream:
        assert next(stream.chunks()) == noise


def test_names_appear_after_what_they_name_is_synced(
    repository: Repository, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, str], int]] = []

    def syncfs(fd: int) -> None:
        assert os.fstat(fd).st_ino == path.stat().st_ino
        seen.append((links(path), sum(p.is_file() for p in (path / "objects").rglob("*"))))

    monkeypatch.setattr("hostimaged.system.syscalls.syncfs", syncfs)
    write_stream(repository, "name", b"data" * 100, "ref")
    assert seen == [({}, 2)]
    before = links(path)
    repository.write_image(b"image", "ref")
    assert seen[1:] == [(before, 3)]


def test_missing_streams(repository: Repository, path: Path) -> None:
    assert repository.has_stream("name") is None
    assert repository.streams() == []
    with pytest.raises(StreamMissing, match="stream name is not in the repository"):
        repository.open_stream("name")
    with pytest.raises(ObjectMissing):
        repository.open_stream("name", HELLO)
    with pytest.raises(StreamMissing):
        repository.name_stream("name", "ref")
    # A name whose object is gone is as good as none.
    write_stream(repository, "name", b"data" * 100)
    for file in (path / "objects").rglob("*"):
        if file.is_file():
            file.unlink()
    assert repository.has_stream("name") is not None
    with pytest.raises(StreamMissing):
        repository.name_stream("name", "ref")
    assert repository.stream_refs() == {}


def test_references(repository: Repository, path: Path) -> None:
    write_stream(repository, "one", b"1" * 100)
    write_stream(repository, "two", b"2" * 100)
    for name, ref in (("one", "a"), ("two", "deep/er/b"), ("one", "deep/c")):
        repository.name_stream(name, ref)
    assert repository.stream_refs() == {"a": "one", "deep/c": "one", "deep/er/b": "two"}
    assert list(repository.stream_refs("deep")) == ["c", "er/b"]
    assert os.readlink(path / "streams/refs/deep/er/b") == "../../../two"
    assert repository.remove_stream_ref("deep/c")
    assert not repository.remove_stream_ref("deep/c")
    assert not repository.remove_stream_ref("a/b")
    assert repository.stream_refs() == {"a": "one", "deep/er/b": "two"}
    with pytest.raises(StorageError):
        repository.name_stream("one", "a/below-a-reference")
    with pytest.raises(StorageError):
        repository.name_stream("one", "deep")


def test_listings_survive_what_others_left(repository: Repository, path: Path) -> None:
    write_stream(repository, "one", b"1" * 100, "a")
    refs = path / "streams/refs"
    (refs / "file").write_text("no link")
    (refs / "dangling").symlink_to("../gone")
    os.symlink("../one", os.fsencode(refs) + b"/not-utf8-\xff")
    (path / "streams/file").write_text("no link")
    deep = refs
    for _ in range(80):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "too-deep").symlink_to("x")
    assert repository.stream_refs() == {"a": "one", "dangling": "gone"}
    assert repository.streams() == ["one"]


def test_damaged_stream_names(repository: Repository, path: Path) -> None:
    (path / "streams").mkdir()
    (path / "streams/file").write_text("no link")
    (path / "streams/short").symlink_to("../objects/xx")
    (path / "streams/prefix").symlink_to(f"objects/{HELLO.pathname}")
    (path / "streams/outside").symlink_to("/etc/passwd")
    (path / "streams/climbing").symlink_to("../../../../../../../etc/passwd")
    (path / "streams/directory").symlink_to("..")
    os.mkfifo(path / "fifo")
    (path / "streams/fifo").symlink_to("../fifo")
    for name in ("file", "short", "prefix"):
        with pytest.raises(CorruptRepository):
            repository.has_stream(name)
    for name in ("outside", "climbing"):
        with pytest.raises(StreamMissing):
            repository.open_stream(name)
    for name in ("directory", "fifo"):
        with pytest.raises(CorruptRepository):
            repository.open_stream(name)
    (path / "streams/notstream").symlink_to("../meta.json")
    with pytest.raises(SplitStreamError, match="stream notstream is damaged"):
        repository.open_stream("notstream")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "/"])
def test_bad_stream_names(repository: Repository, name: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: repository.has_stream(name),
        lambda: repository.name_stream(name, "ref"),
        lambda: repository.write_stream(name, repository.new_stream(1)),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidArgs):
            attempt()


@pytest.mark.parametrize(
    "ref", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.", "a\0", "x" * 256, "x/" * 2500 + "x"]
)
def test_bad_references(repository: Repository, path: Path, ref: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: write_stream(repository, "name", b"x" * 100, ref),
        lambda: repository.name_stream("name", ref),
        lambda: repository.remove_stream_ref(ref),
        lambda: repository.stream_modified(ref),
        lambda: repository.write_image(b"x", ref),
        lambda: repository.open_image(ref),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidArgs):
            attempt()
    assert not (path / "streams").exists()


# --- images -------------------------------------------------------------------------------------------------


def read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_images(repository: Repository, path: Path) -> None:
    id_ = repository.write_image(b"an image", "hostimaged/x")
    repository.write_image(b"an image", "plain")
    other = repository.write_image(b"another")
    assert repository.images() == sorted([id_.hex(), other.hex()])
    assert repository.image_refs() == {"hostimaged/x": id_.hex(), "plain": id_.hex()}
    assert repository.image_refs("hostimaged") == {"x": id_.hex()}
    assert links(path)[f"images/{id_.hex()}"] == f"../objects/{id_.pathname}"
    assert links(path)["images/refs/hostimaged/x"] == f"../../{id_.hex()}"
    for name in (id_.hex(), "plain", "refs/plain", "refs/hostimaged/x"):
        assert read(repository.open_image(name)) == b"an image"
    for name in ("missing", "refs/missing", "hostimaged/x", "0" * 64):
        with pytest.raises(ImageNotFound):
            repository.open_image(name)


def test_image_names_that_are_no_ids(repository: Repository, path: Path) -> None:
    id_ = repository.write_image(b"an image")
    (path / "images/name").symlink_to(f"../objects/{id_.pathname}")
    with pytest.raises(FsVerityError):
        repository.open_image("name")
