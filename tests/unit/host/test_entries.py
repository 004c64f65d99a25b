"""The sets of boot entries, read with what other people put beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostimaged.boot.grubcfg import MenuEntry, serialise_user_cfg
from hostimaged.boot.loader import Bootloader
from hostimaged.host import entries
from hostimaged.host.bootdirs import BootDirs
from hostimaged.host.bootsets import BlsSets, RawSet
from hostimaged.host.entries import read_sets
from hostimaged.ids import DeploymentId

A, B = (DeploymentId(digit * 128) for digit in "ab")


def dirs(boot: Path | None, loader: Bootloader = Bootloader.SYSTEMD) -> BootDirs:
    return BootDirs(loader, boot, boot, "", boot)


def entry(id_: DeploymentId, place: int, *, artifact: DeploymentId | None = None) -> str:
    kernel = f"/EFI/Linux/bootc_composefs-{artifact or id_}"
    return (
        f"title T\nversion 1\nlinux {kernel}/vmlinuz\ninitrd {kernel}/initrd\n"
        f"options root=x composefs=?{id_}\nsort-key bootc-t-{place}\n"
    )


def write(boot: Path, name: str, text: str, where: str = "entries") -> None:
    directory = boot / "loader" / where
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def test_both_sets_in_the_order_of_the_menu(tmp_path: Path) -> None:
    write(tmp_path, "bootc_t-1-0.conf", entry(A, 1))
    write(tmp_path, "bootc_t-1-1.conf", entry(B, 0, artifact=A))
    write(tmp_path, "bootc_t-2-1.conf", entry(A, 0), "entries.staged")
    sets = read_sets(dirs(tmp_path))
    assert sets.live is not None
    assert sets.live.ids == (B, A)
    assert [each.artifact for each in sets.live.entries] == [str(A), str(A)]
    assert [each.file_name for each in sets.live.of(B)] == ["bootc_t-1-1.conf"]
    assert sets.live.entries[0].options == f"root=x composefs=?{B}"
    assert not sets.live.entries[0].is_uki
    assert sets.live.entries[0].files == tuple(
        f"/EFI/Linux/bootc_composefs-{A}/{name}" for name in ("vmlinuz", "initrd")
    )
    assert sets.staged is not None
    assert sets.staged.ids == (A,)
    assert [each.id for each in sets.entries] == [B, A, A]
    assert not sets.unreadable


def test_what_boots_no_deployment_is_kept_aside(tmp_path: Path) -> None:
    write(tmp_path, "bootc_t-1-1.conf", entry(A, 0))
    write(tmp_path, "windows.conf", "title W\nefi /EFI/Microsoft/bootmgfw.efi\n")
    write(tmp_path, "broken.conf", "nothing")
    write(tmp_path, "bootc_broken.conf", "title only\n")
    write(tmp_path, "bootc_other.conf", "version 1\nlinux /vmlinuz\noptions root=x\n")
    write(tmp_path, "bootc_short.conf", "version 1\nlinux /a/vmlinuz\noptions composefs=abc\n")
    write(tmp_path, "notes.txt", entry(B, 0))
    sets = read_sets(dirs(tmp_path))
    assert sets.live is not None
    assert sets.live.ids == (A,)
    foreign = {each.file_name: each.problem for each in sets.live.foreign}
    assert foreign.keys() == {
        "windows.conf",
        "broken.conf",
        "bootc_broken.conf",
        "bootc_other.conf",
        "bootc_short.conf",
    }
    assert not foreign["windows.conf"]
    assert not foreign["broken.conf"]
    assert "exactly one" in foreign["bootc_broken.conf"]
    assert "no deployment" in foreign["bootc_other.conf"]
    assert "128 hex digits" in foreign["bootc_short.conf"]
    assert next(each.data for each in sets.live.foreign if each.file_name == "broken.conf") == b"nothing"


def test_a_user_cfg_means_that_other_entries_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "bootc_t-1-1.conf", entry(A, 0))
    assert read_sets(dirs(tmp_path, Bootloader.GRUB)).entries[0].id == A
    (tmp_path / "grub2").mkdir()
    menu = serialise_user_cfg([MenuEntry.new("T 2", B), MenuEntry.new("T 1", A)])
    other = b'menuentry "other" {\nchainloader /EFI/other.efi\n}\n'
    (tmp_path / "grub2/user.cfg").write_bytes(menu + other)
    sets = read_sets(dirs(tmp_path, Bootloader.GRUB))
    assert sets.is_menu
    assert sets.live is not None
    assert sets.live.ids == (B, A)
    assert [each.label for each in sets.live.menu] == ["T 2", "T 1", "other"]
    assert sets.live.entries[0].is_uki
    assert sets.live.entries[0].files == (f"/EFI/Linux/bootc/bootc_composefs-{B}.efi",)
    assert sets.staged is None
    assert read_sets(dirs(tmp_path, Bootloader.SYSTEMD)).entries[0].id == A


def test_nothing_is_no_error_and_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert "not mounted" in read_sets(dirs(None)).unreadable
    empty = read_sets(dirs(tmp_path))
    assert (empty.live, empty.staged, empty.unreadable) == (None, None, "")
    (tmp_path / "grub2").mkdir()
    (tmp_path / "grub2/user.cfg").write_bytes(serialise_user_cfg([MenuEntry.new("T 2", B)]))
    (tmp_path / "grub2/user.cfg.staged").write_text('menuentry "x" {')
    sets = read_sets(dirs(tmp_path, Bootloader.GRUB))
    assert sets.live is not None
    assert sets.staged is not None
    assert (sets.live.ids, sets.staged.ids) == ((B,), ())
    assert "not closed" in sets.staged.foreign[0].problem
    (tmp_path / "grub2/user.cfg").write_text('menuentry "x" {')
    sets = read_sets(dirs(tmp_path, Bootloader.GRUB))
    assert "not closed" in sets.unreadable
    assert sets.live is None


class Exchanging(BlsSets):
    """Somebody exchanges the sets after each of the first ``times`` reads of the live one."""

    times = 0

    def live(self) -> RawSet | None:
        found = super().live()
        if Exchanging.times:
            Exchanging.times -= 1
            one, two = (self._loader / name for name in (self.LIVE, self.STAGED))
            one.rename(self._loader / "aside")
            two.rename(one)
            (self._loader / "aside").rename(two)
        return found


def test_sets_that_are_exchanged_meanwhile_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "bootc_t-1-1.conf", entry(A, 0))
    write(tmp_path, "bootc_t-2-1.conf", entry(B, 0), "entries.staged")
    monkeypatch.setattr(entries, "BlsSets", Exchanging)
    for times in range(4):
        Exchanging.times = times
        sets = read_sets(dirs(tmp_path))
        # Never one set twice.
        assert {each.id for each in sets.entries} == {A, B}
    Exchanging.times = 1000
    assert "change all the time" in read_sets(dirs(tmp_path)).unreadable
    Exchanging.times = 0
