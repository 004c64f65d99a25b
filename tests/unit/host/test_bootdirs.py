"""Where boot entries and what they name are looked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hostimaged.boot.esp import Mount, parse_mountinfo
from hostimaged.boot.loader import Bootloader
from hostimaged.host import bootdirs
from hostimaged.host.bootdirs import BootDirs, candidates, mount_table
from hostimaged.system.paths import HostPaths


def live(root: Path) -> HostPaths:
    """Paths that are taken for those of a running host."""
    return dataclasses.replace(HostPaths.scratch(root), scratch_root=None, esp=None)


def mounts(*points: tuple[str | Path, str]) -> list[Mount]:
    lines = (f"1 1 8:{at} / {point} rw - {kind} src rw\n" for at, (point, kind) in enumerate(points))
    return parse_mountinfo("".join(lines).encode())


def test_a_scratch_root_has_plain_directories(tmp_path: Path) -> None:
    paths = HostPaths.scratch(tmp_path)
    (tmp_path / "boot").mkdir()
    (grub,) = candidates(paths, Bootloader.GRUB, [])
    assert (grub.boot, grub.kernels, grub.prefix) == (tmp_path / "boot", tmp_path / "boot", "/boot")
    assert grub.grub_dir == tmp_path / "boot/grub2"
    assert grub.ukis == tmp_path / "efi/EFI/Linux/bootc"
    (systemd,) = candidates(paths, Bootloader.SYSTEMD, [])
    assert systemd.loader_dir == tmp_path / "efi/loader"
    assert (systemd.kernels, systemd.prefix) == (tmp_path / "efi/EFI/Linux", "/EFI/Linux")
    assert systemd.grub_dir is None


def test_a_live_grub_prefers_a_boot_that_is_mounted_and_holds_its_files(tmp_path: Path) -> None:
    paths = live(tmp_path)
    physical = tmp_path / "sysroot/boot"
    plain = BootDirs(Bootloader.GRUB, physical, physical, "/boot", None)
    own = BootDirs(Bootloader.GRUB, paths.boot, paths.boot, "", None)
    assert candidates(paths, Bootloader.GRUB, []) == [plain]
    assert candidates(paths, Bootloader.GRUB, mounts((paths.boot, "ext4"))) == [plain]
    (paths.boot / "loader/entries").mkdir(parents=True)
    assert candidates(paths, Bootloader.GRUB, []) == [plain]
    assert candidates(paths, Bootloader.GRUB, mounts((paths.boot, "ext4"))) == [own, plain]
    both = mounts((paths.boot, "autofs"), (paths.boot, "ext4"), (physical, "ext4"))
    assert candidates(paths, Bootloader.GRUB, both) == [own, dataclasses.replace(plain, prefix="")]


def test_an_automount_that_waits_is_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = live(tmp_path)
    touched: list[Path] = []

    def has_grub(path: Path) -> bool:
        touched.append(path)
        return True

    monkeypatch.setattr(bootdirs, "_has_grub", has_grub)
    found = candidates(paths, Bootloader.GRUB, mounts((paths.boot, "autofs")))
    assert [dirs.boot for dirs in found] == [tmp_path / "sysroot/boot"]
    assert not touched


def test_the_esp_is_used_where_it_was_found(tmp_path: Path) -> None:
    paths = live(tmp_path)
    assert candidates(paths, Bootloader.SYSTEMD, []) == [
        BootDirs(Bootloader.SYSTEMD, None, None, "/EFI/Linux", None)
    ]
    (found,) = candidates(dataclasses.replace(paths, esp=tmp_path / "mnt"), Bootloader.SYSTEMD, [])
    assert found.esp == found.boot == tmp_path / "mnt"


def test_paths_of_entries_stay_below_their_file_system(tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    dirs = BootDirs(Bootloader.GRUB, boot, boot, "/boot", tmp_path / "efi")
    assert dirs.file("/boot/a/vmlinuz") == boot / "a/vmlinuz"
    assert dirs.file("/a/vmlinuz") == boot / "a/vmlinuz"
    assert dirs.uki_file("/EFI/x.efi") == tmp_path / "efi/EFI/x.efi"
    for bad in ("", "/", "/../etc/passwd", "/a/../../x"):
        assert dirs.file(bad) is None
        assert dirs.uki_file(bad) is None
    nowhere = BootDirs(Bootloader.SYSTEMD, None, None, "", None)
    assert nowhere.file("/a") is nowhere.uki_file("/a") is None


def test_the_table_of_mounts(tmp_path: Path) -> None:
    paths = HostPaths.scratch(tmp_path)
    assert mount_table(paths) == []
    assert mount_table(dataclasses.replace(paths, mountinfo=None)) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("36 1 0:31 / / ro - overlay composefs:x ro\nnonsense\n")
    assert [mount.source for mount in mount_table(paths)] == ["composefs:x"]
