"""The EFI system partition's file system: exchanging directories, which switching boot entries relies on."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.boot.esp import EspDevice
from hostimaged.host import espmount
from hostimaged.system import durable, syscalls
from hostimaged.system.paths import HostPaths


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


def test_one_that_is_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and written by mounts without a place, as its own type and with the options of bootc."""
    image = tmp_path / "esp.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.vfat", image], check=True, stdout=subprocess.DEVNULL)
    attach = ["losetup", "--find", "--show", image]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    number = os.stat(device).st_rdev
    found = EspDevice(device, (os.major(number), os.minor(number)))
    monkeypatch.setattr(espmount, "find_esp", lambda *_: found)
    monkeypatch.setattr(espmount, "_is_needed", lambda _: True)
    paths = dataclasses.replace(HostPaths.scratch(tmp_path), scratch_root=None, esp=None)
    before = Path("/proc/self/mountinfo").read_text()
    try:
        with espmount.reached(paths, writable=True) as written:
            assert written.esp is not None
            (written.esp / "loader").mkdir()
            durable.replace_file(written.esp / "loader/entry", b"content")
            assert stat.S_IMODE((written.esp / "loader/entry").stat().st_mode) == 0o600
        digest = image.read_bytes()
        with espmount.reached(paths) as read:
            assert read.esp is not None
            assert (read.esp / "loader/entry").read_bytes() == b"content"
            with pytest.raises(OSError, match="Read-only"):
                (read.esp / "x").touch()
        assert image.read_bytes() == digest
        assert Path("/proc/self/mountinfo").read_text() == before
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
