"""The EFI system partition's file system: exchanging directories, which switching boot entries relies on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.boot.esp import EspDevice
from hostimaged.host import bootfs, espmount
from hostimaged.host.bootsets import BlsSets
from hostimaged.system import durable, syscalls
from hostimaged.system.paths import HostPaths

NEW = f"{bootfs.TEMPORARY}new"


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


def shown_after_a_power_cut(mount: Path, image: Path) -> dict[str, str]:
    """The files, by path, of a file system as it would be if nothing more of it were written from now on.

    Without those under temporary names, which recovery removes.
    """
    copy, place = image.with_name("cut.img"), mount.with_name("cut")
    shutil.copyfile(image, copy)
    place.mkdir(exist_ok=True)
    checked = subprocess.run(["fsck.vfat", "-n", copy], check=False, capture_output=True, text=True)
    for defect in ("free cluster", "shared", "cluster 0", "Start cluster"):
        assert defect not in checked.stdout, checked.stdout
    subprocess.run(["mount", "-o", "loop,ro", copy, place], check=True)
    try:
        files = {str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()}
        return {name: path.read_text() for name, path in files.items() if bootfs.TEMPORARY not in name}
    finally:
        subprocess.run(["umount", place], check=True)


def write_entries(loader: Path, name: str, content: str) -> None:
    with bootfs.directory(loader) as fd, bootfs.new_directory(fd, name) as entries:
        durable.write_new_file(entries, "1.conf", [content.encode()])


def test_what_was_renamed_is_there_after_a_power_cut(esp: Path, tmp_path: Path) -> None:
    """The entry of a directory has where it begins: that is on the disk before anything relies on it."""
    image, loader = tmp_path / "esp.img", esp / "loader"
    bootfs.make_directory(loader)
    steps = [("first", "entries"), ("second", "entries"), ("third", "entries.staged")]
    expected = {}
    for content, name in steps:
        write_entries(loader, NEW, content)
        with bootfs.directory(loader) as fd:
            bootfs.put_in_place(loader, fd, NEW, name)
        expected[f"loader/{name}/1.conf"] = content
        assert shown_after_a_power_cut(esp, image) == expected
    BlsSets(loader).activate()
    assert shown_after_a_power_cut(esp, image) == {
        "loader/entries/1.conf": "third",
        "loader/entries.staged/1.conf": "second",
    }
    BlsSets(loader).remove_staged()
    durable.replace_file(loader / "loader.conf", b"timeout 1\n")
    assert shown_after_a_power_cut(esp, image) == {
        "loader/entries/1.conf": "third",
        "loader/loader.conf": "timeout 1\n",
    }


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
