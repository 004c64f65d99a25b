"""Private directories of jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimaged.errors import StorageError
from hostimaged.system.workdir import private_directory


def test_made_and_removed(tmp_path: Path) -> None:
    parent = tmp_path / "state/tmp"
    with private_directory(parent, "pull-") as directory:
        assert directory.parent == parent
        assert directory.name.startswith("pull-")
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "copy").mkdir()
        (directory / "copy/blob").write_bytes(b"x")
    assert list(parent.iterdir()) == []


def test_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), private_directory(tmp_path, "pull-"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_abandoned_ones_are_removed_and_living_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "pull-dead/copy").mkdir(parents=True)
    (tmp_path / "pull-dead/copy/blob").write_bytes(b"x")
    with private_directory(tmp_path, "pull-") as first, private_directory(tmp_path, "pull-") as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    parent = tmp_path / "tmp"
    parent.mkdir()
    (parent / "pull-link").symlink_to(outside)
    with private_directory(parent, "pull-"):
        pass
    assert (outside / "precious").exists()


def test_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot make a directory"),
        private_directory(tmp_path / "file", "pull-"),
    ):
        pass
    assert os.listdir(tmp_path) == ["file"]
