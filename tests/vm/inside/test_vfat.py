"""The EFI system partition's file system: exchanging directories, which switching boot entries relies on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.system import durable, syscalls


@pytest.fixture
def esp(tmp_path: Path) -> Iterator[Path]:
    image, mount = tmp_path / "esp.img", tmp_path / "esp"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.vfat", image], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_two_directories_change_places(esp: Path) -> None:
    for name, content in (("entries", "old"), ("entries.staged", "new")):
        (esp / name).mkdir()
        (esp / name / "1.conf").write_text(content)
    syscalls.rename_exchange(esp / "entries", esp / "entries.staged")
    durable.sync_directory(esp)
    assert (esp / "entries/1.conf").read_text() == "new"
    assert (esp / "entries.staged/1.conf").read_text() == "old"


def test_noreplace_keeps_what_is_there(esp: Path) -> None:
    (esp / "one").write_text("1")
    (esp / "two").write_text("2")
    with pytest.raises(FileExistsError):
        syscalls.rename_noreplace(esp / "one", esp / "two")
    assert (esp / "two").read_text() == "2"


def test_replacing_a_file_durably(esp: Path) -> None:
    target = esp / "loader.conf"
    for content in (b"timeout 1\n", b"timeout 2\n"):
        durable.replace_file(target, content)
        assert target.read_bytes() == content
    assert os.listdir(esp) == ["loader.conf"]
