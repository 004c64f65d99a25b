"""Durable files: what is visible at each moment, and that failures leave nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.system import durable, syscalls


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture(params=["tmpfile", "named"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With O_TMPFILE, and on a file system without it."""
    if request.param == "named":
        real = os.open

        def refuse(path: object, flags: int, *args: int, **kwargs: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
            return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse)
    return str(request.param)


@pytest.mark.usefixtures("either_way")
def test_new_file_has_no_name_until_published(tmp_path: Path, directory: int) -> None:
    with durable.NewFile(directory, prefix=".tmp-object-") as new:
        durable.write_all(new.fd, b"content")
        assert not (tmp_path / "name").exists()
        new.publish(directory, "name")
    assert [p.name for p in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_bytes() == b"content"


@pytest.mark.usefixtures("either_way")
def test_new_file_unpublished_leaves_nothing(tmp_path: Path, directory: int) -> None:
    new = durable.NewFile(directory)
    durable.write_all(new.fd, b"content")
    new.close()
    new.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("either_way")
def test_detached_file_has_no_name(tmp_path: Path, directory: int) -> None:
    with durable.NewFile(directory) as new:
        fd = new.detach()
    durable.write_all(fd, b"content")
    assert os.pread(fd, 100, 0) == b"content"
    os.close(fd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("either_way")
def test_new_file_does_not_replace_unless_told(tmp_path: Path, directory: int) -> None:
    (tmp_path / "name").write_text("old")
    with durable.NewFile(directory) as new:
        durable.write_all(new.fd, b"new")
        with pytest.raises(FileExistsError):
            new.publish(directory, "name")
        assert (tmp_path / "name").read_text() == "old"
        new.publish(directory, "name", replace=True)
    assert (tmp_path / "name").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


@pytest.mark.usefixtures("either_way")
def test_sealed_file_is_read_only(directory: int) -> None:
    with durable.NewFile(directory) as new:
        durable.write_all(new.fd, b"content")
        new.seal()
        with pytest.raises(OSError) as caught:
            os.write(new.fd, b"more")
        assert caught.value.errno == errno.EBADF
        assert os.pread(new.fd, 100, 0) == b"content"


def test_fallback_name_has_the_prefix(tmp_path: Path, directory: int, either_way: str) -> None:
    with durable.NewFile(directory, prefix=".tmp-object-"):
        names = [p.name for p in tmp_path.iterdir()]
    if either_way == "named":
        assert len(names) == 1
        assert names[0].startswith(".tmp-object-")
        assert len(names[0]) == len(".tmp-object-") + 12
    else:
        assert names == []


@pytest.mark.usefixtures("either_way")
def test_replace_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.replace_file(path, b"one", mode=0o640)
    assert path.stat().st_mode & 0o777 == 0o640
    durable.replace_file(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_replace_file_syncs_the_content_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(path.read_text())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.replace_file(path, b"new")
    assert seen == ["old", "new"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "fchmod"])
@pytest.mark.usefixtures("either_way")
def test_failed_replacement_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as caught:
        durable.replace_file(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    durable.replace_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_replace_symlink(tmp_path: Path, directory: int) -> None:
    sub = tmp_path / "sub"
    sub.mkdir()
    where = os.open(sub, os.O_RDONLY)
    try:
        make = {"directory": where, "temporary_directory": directory}
        assert durable.replace_symlink("one", "link", **make)
        assert not durable.replace_symlink("one", "link", **make)
        assert durable.replace_symlink("two", "link", **make)
        assert os.readlink(sub / "link") == "two"
        (sub / "file").write_text("not a link")
        assert durable.replace_symlink("two", "file", **make)
        assert os.readlink(sub / "file") == "two"
        (sub / "directory").mkdir()
        with pytest.raises(OSError):
            durable.replace_symlink("two", "directory", **make)
    finally:
        os.close(where)
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]


def test_failed_symlink_replacement_leaves_nothing(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError):
        durable.replace_symlink("new", "link", directory=directory, temporary_directory=directory)
    assert os.readlink(tmp_path / "link") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


def test_taken_temporary_names_are_skipped(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("old")
    (tmp_path / ".symlink-0").symlink_to("foreign")
    numbers = iter(range(100))
    monkeypatch.setattr(durable, "temporary_name", lambda prefix: f"{prefix}{next(numbers)}")
    durable.replace_symlink("new", "link", directory=directory, temporary_directory=directory)
    assert os.readlink(tmp_path / "link") == "new"
    assert os.readlink(tmp_path / ".symlink-0") == "foreign"
    assert not (tmp_path / ".symlink-1").is_symlink()


def test_no_free_temporary_name(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(durable, "temporary_name", lambda prefix: "taken")
    with pytest.raises(FileExistsError):
        durable.replace_symlink("new", "link", directory=directory, temporary_directory=directory)


def test_sync(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    durable.sync_directory(tmp_path)
    durable.sync_directory(directory)
    assert synced == [tmp_path.stat().st_ino] * 2
    durable.sync_filesystem(directory)


def test_on_fat_all_is_written_and_the_cache_of_the_disk_emptied(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(syscalls, "filesystem_type", lambda _: syscalls.MSDOS_SUPER_MAGIC)
    monkeypatch.setattr(syscalls, "syncfs", lambda _: done.append("syncfs"))
    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    durable.sync_directory(directory)
    assert done == ["syncfs", "fsync"]


def test_a_new_file_that_cannot_be_removed_either_tells_why_it_was_not_written(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"begun"
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        durable.write_new_file(directory, "removed", pieces())
    assert os.listdir(tmp_path) == []

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only by now")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="full"):
        durable.write_new_file(directory, "stays", pieces())


def test_replacements_that_a_crash_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    durable.replace_file(file, b"old")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # As if the process were gone: what cleans up after an error does not run either.
        patch.setattr(os, "rename", crash)
        patch.setattr(os, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            durable.replace_file(file, b"new")
    others = [".file.short", ".other.abcdefghijkl", "file.abcdefghijkl", ".file.abcdefghijklm"]
    for name in others:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    durable.remove_replacements(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "file"])
    assert file.read_bytes() == b"old"
    durable.remove_replacements(tmp_path / "missing/file")
