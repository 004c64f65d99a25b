"""Copied directories: hard links among what is copied."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostimaged.system.trees import Copier


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two names of a file in two directories, and one of another."""
    made = tmp_path / "source"
    (made / "below").mkdir(parents=True)
    (made / "below/one").write_bytes(b"shared")
    os.link(made / "below/one", made / "two")
    (made / "alone").write_bytes(b"alone")
    return made


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    with opened(source.parent) as parent, opened(target) as root:
        Copier(root, lambda: None).copy(os.fsencode(source.name), parent, root, os.fsencode(source.name))


def test_hard_links_are_kept(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "target")
    copied = tmp_path / "target/source"
    assert (copied / "two").samefile(copied / "below/one")
    assert (copied / "two").stat().st_nlink == 2
    assert (copied / "two").read_bytes() == b"shared"
    assert (copied / "alone").stat().st_nlink == 1


@pytest.mark.parametrize(("code", "possible"), [(errno.EMLINK, True), (errno.EIO, False)])
def test_a_link_too_many_becomes_a_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, possible: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    if not possible:
        with pytest.raises(OSError, match=os.strerror(code)):
            copy(source, tmp_path / "target")
        return
    copy(source, tmp_path / "target")
    for name in ("two", "below/one"):
        copied = tmp_path / "target/source" / name
        assert (copied.read_bytes(), copied.stat().st_nlink) == (b"shared", 1)
