"""Which changes on a host matter, wherever they begin; and that looking for them uses nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostimaged.host import watches
from hostimaged.host.watches import Watches
from hostimaged.system import syscalls
from hostimaged.system.inotify import Event, Inotify, Mask
from hostimaged.system.paths import HostPaths

ID = "a" * 128
OTHER = "b" * 128


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    """A host with one deployment."""
    root = tmp_path / "root"
    for name in (
        "sysroot/composefs/streams/refs/oci",
        "sysroot/composefs/images",
        "sysroot/composefs/objects/00",
        f"sysroot/state/deploy/{ID}/etc",
        "sysroot/state/hostimaged/tmp",
        "run/composefs",
        "run/hostimaged",
        "efi/loader/entries",
        "efi/EFI/Linux/bootc",
        "boot/grub2",
        "proc/self",
    ):
        (root / name).mkdir(parents=True)
    return HostPaths.scratch(root)


@pytest.fixture
def watched(paths: HostPaths) -> Iterator[Watches]:
    """Its watches."""
    made = Watches(paths)
    made.renew()
    yield made
    made.close()


def changed(made: Watches) -> bool:
    """Whether anything that matters happened until now."""
    found = False
    while (matters := made.read()) is not None:
        found = found or matters
    return found


MATTERS = [
    "sysroot/composefs/meta.json",
    "sysroot/composefs/streams/oci-manifest-x",
    "sysroot/composefs/streams/refs/oci/localhost%2Fbootc-x",
    f"sysroot/composefs/images/{ID}",
    f"sysroot/state/deploy/{OTHER}",
    f"sysroot/state/deploy/{ID}/{ID}.origin",
    f"sysroot/state/deploy/{ID}/{ID}.imginfo",
    "sysroot/state/hostimaged/pulls.json",
    "run/composefs/staged-deployment",
    "efi/loader/entries/bootc_x.conf",
    "efi/loader/entries.staged",
    "efi/EFI/Linux/bootc_composefs-x",
    "efi/EFI/Linux/bootc/x.efi",
    "boot/bootc_composefs-x",
    "boot/grub2/user.cfg",
    "boot/grub2/user.cfg.staged",
    "proc/self/mountinfo",
]
DOES_NOT_MATTER = [
    "sysroot/findings.json",
    "sysroot/composefs/.symlink-x",
    "sysroot/composefs/objects/00/x",
    f"sysroot/state/deploy/{ID}/etc/hostname",
    "sysroot/state/hostimaged/transaction.json",
    "sysroot/state/hostimaged/tmp/host-x",
    "run/composefs/other",
    "run/hostimaged/jobs.json",
    "run/lock",
    "efi/loader/random-seed",
    "efi/loader/loader.conf",
    "boot/grub2/grubenv",
    "etc",
]


@pytest.mark.parametrize("name", MATTERS)
def test_what_status_shows_matters(watched: Watches, paths: HostPaths, name: str) -> None:
    assert paths.scratch_root is not None
    path = paths.scratch_root / name
    assert not changed(watched)
    path.write_text("one")
    assert changed(watched)
    watched.renew()
    path.write_text("two")
    assert changed(watched)
    aside = path.parent / "aside"
    path.rename(aside)
    assert changed(watched)
    aside.rename(path)
    assert changed(watched)
    path.unlink()
    assert changed(watched)


@pytest.mark.parametrize("name", DOES_NOT_MATTER)
def test_what_it_does_not_show_does_not(watched: Watches, paths: HostPaths, name: str) -> None:
    assert paths.scratch_root is not None
    (paths.scratch_root / name).write_text("one")
    assert not changed(watched)


def test_from_nothing_to_a_deployment(tmp_path: Path) -> None:
    """Each step matters, and is watched from then on."""
    root = tmp_path / "root"
    root.mkdir()
    made = Watches(HostPaths.scratch(root))
    try:
        for name in (f"sysroot/state/deploy/{ID}", "sysroot/composefs/streams/refs/oci", "run/composefs"):
            for path in reversed([root / name, *(root / name).parents]):
                if not path.exists():
                    made.renew()
                    assert not changed(made)
                    path.mkdir()
                    assert changed(made), path
    finally:
        made.close()


@pytest.mark.parametrize(
    ("directory", "file"),
    [
        ("sysroot/composefs", "streams/refs/oci/tag"),
        ("sysroot/composefs/streams", "refs/oci/tag"),
        ("sysroot/composefs/streams/refs/oci", "tag"),
        ("sysroot/state", f"deploy/{ID}/{ID}.origin"),
        (f"sysroot/state/deploy/{ID}", f"{ID}.origin"),
        ("run/composefs", "staged-deployment"),
        ("efi/loader", "entries/a.conf"),
        ("efi/loader/entries", "a.conf"),
        ("efi", "loader/entries/a.conf"),
    ],
)
def test_a_directory_in_anothers_place_is_watched(
    watched: Watches, paths: HostPaths, directory: str, file: str
) -> None:
    assert paths.scratch_root is not None
    place = paths.scratch_root / directory
    other = paths.scratch_root / "other"
    (other / file).parent.mkdir(parents=True)
    assert not changed(watched)
    syscalls.rename_exchange(place, other)
    assert changed(watched)
    watched.renew()
    (place / file).touch()
    assert changed(watched)
    # What was there before is nobody's business any more.
    (other / file).touch()
    assert not changed(watched)
    place.rename(place.with_name("aside"))
    assert changed(watched)


def test_watches_are_those_that_are_needed(
    watched: Watches, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewing adds none to what is unchanged, and removes those of what is gone."""
    before = _watches(watched)
    assert 15 < before < 30
    for number in range(5):
        (paths.deployments / f"{number:0128x}").mkdir()
    watched.renew()
    assert _watches(watched) == before + 5
    for number in range(5):
        (paths.deployments / f"{number:0128x}").rename(paths.state / f"{number}")
    watched.renew()
    assert _watches(watched) == before
    monkeypatch.setattr(watches, "MAX_WATCHES", before)
    watched.renew()
    assert watched.problem == ""
    monkeypatch.setattr(watches, "MAX_WATCHES", before - 1)
    watched.renew()
    assert _watches(watched) == before - 1
    assert "more than" in watched.problem


def _watches(made: Watches) -> int:
    """As the kernel counts them."""
    lines = Path(f"/proc/self/fdinfo/{made.fileno()}").read_text().splitlines()
    return sum(line.startswith("inotify ") for line in lines)


def test_what_may_not_be_watched_is_a_problem(watched: Watches, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Inotify, _directory: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Inotify, "watch", refuse)
        watched.renew()
    assert "max_user_watches" in watched.problem
    watched.renew()
    assert watched.problem == ""


def test_lost_events_matter(watched: Watches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inotify, "read", lambda _self: [Event(-1, Mask.OVERFLOW)])
    assert watched.read() is True


def mountinfo(*lines: str) -> str:
    head = "36 1 0:31 / / ro - overlay composefs:x ro"
    return "\n".join([head, *lines]) + "\n"


def test_only_what_is_mounted_is_looked_at(paths: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a running host; an automount is not opened at all, and one under a mount left alone."""
    root = paths.scratch_root
    assert root is not None
    table = root / "proc/self/mountinfo"
    live = replace(paths, scratch_root=None, esp=None)
    opened: list[str] = []
    real: Callable[..., int] = os.open

    def recording(path: object, *arguments: object, **options: object) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", recording)

    def looked_at(*lines: str) -> bool:
        table.write_text(mountinfo(*lines))
        opened.clear()
        made = Watches(live)
        made.renew()
        (root / "efi/loader/entries/a.conf").write_text("title\n")
        seen = changed(made)
        made.close()
        return seen

    esp = root / "efi"
    device = f"{os.major(esp.stat().st_dev)}:{os.minor(esp.stat().st_dev)}"
    assert not looked_at()
    assert looked_at(f"40 36 8:1 / {esp} rw - vfat /dev/sda1 rw")
    assert not looked_at(f"40 36 0:40 / {esp} rw - autofs systemd-1 rw")
    assert str(esp) not in opened
    # It was unmounted between two looks, and the trigger is seen there.
    assert not looked_at(f"41 36 8:1 / {esp} rw - vfat /dev/sda1 rw", f"40 36 {device} / /x rw - autofs y rw")
