"""A host whose EFI system partition is not mounted, or not as it would be needed.

The kernels that the tests run on need not know vfat: any file system does that has names and links.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.hosts import Kind, Loader, RecordedHost
from hostimage_testing.lives import Life, staged, upgraded
from hostimaged.errors import BootLoaderError, HostimageError
from hostimaged.host import commands, espmount, reorder
from hostimaged.host.session import open_session
from hostimaged.host.status import scan
from hostimaged.progress import Silent
from hostimaged.system import mountcalls
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

MakeHost = Callable[..., RecordedHost]
PARTITION = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
#: What the recorded table of mounts has at ``/``: what the block devices are asked for.
BACKING = "/dev/block/0:31"


@dataclasses.dataclass
class Partition:
    """The ESP of a recorded host as a block device; ``asked`` is a line for each time lsblk was run."""

    life: Life
    image: Path
    device: str
    asked: Path

    @property
    def host(self) -> RecordedHost:
        return self.life.host

    @property
    def paths(self) -> HostPaths:
        """Places as those of a running host."""
        return dataclasses.replace(HostPaths.scratch(self.host.root), scratch_root=None, esp=None)

    @property
    def number(self) -> str:
        found = os.stat(self.device).st_rdev
        return f"{os.major(found)}:{os.minor(found)}"

    @property
    def digest(self) -> str:
        os.sync()
        return hashlib.sha256(self.image.read_bytes()).hexdigest()

    @property
    def questions(self) -> int:
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Path]:
        point = self.image.with_name("point")
        point.mkdir(exist_ok=True)
        subprocess.run(["mount", *options, self.device, point], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", point], check=True)

    def in_table(self, point: Path, options: str = "rw", kind: str = "ext4") -> None:
        """Let the table of mounts have it there."""
        with (self.host.root / "proc/self/mountinfo").open("a") as table:
            table.write(f"90 36 {self.number} / {point} {options} - {kind} {self.device} rw\n")

    def order(self) -> list[str]:
        """Ids in the order of the live menu, as a boot finds them."""
        with self.mounted("-o", "ro") as point:
            shutil.rmtree(self.host.root / "efi", ignore_errors=True)
            shutil.copytree(point, self.host.root / "efi")
        return [self.host.startable(line).id for line in self.host.menu()]


@pytest.fixture
def partition(
    make: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Partition]]:
    monkeypatch.setattr(espmount, "FILESYSTEM", "ext4")
    monkeypatch.setattr(espmount, "OPTIONS", {})
    monkeypatch.setattr(espmount, "_PAUSE", 0.0)
    devices: list[str] = []

    def made(life: Callable[[RecordedHost], Life] = upgraded, kind: Kind | None = None) -> Partition:
        recorded = life(make(kind or Kind(Loader.SYSTEMD)))
        image = tmp_path / "esp.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-d", recorded.host.root / "efi", image], check=True)
        shutil.rmtree(recorded.host.root / "efi")
        attach = ["losetup", "--find", "--show", image]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        devices.append(device)
        found = Partition(recorded, image, device, tmp_path / "asked")
        own = {
            "path": device,
            "maj:min": found.number,
            "type": "part",
            "parttype": PARTITION,
            "pttype": "gpt",
        }
        _answer(
            tmp_path / "bin", {BACKING: {"path": "/dev/vda", "type": "disk"}, "/dev/vda": own}, found.asked
        )
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return found

    yield made
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


def _answer(directory: Path, answers: dict[str, dict[str, Any]], asked: Path) -> None:
    """A program lsblk that knows these devices."""
    directory.mkdir()
    for name, device in answers.items():
        (directory / name.replace("/", "_")).write_text(json.dumps({"blockdevices": [device]}))
    program = directory / "lsblk"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> "{asked}"\n'
        "for last; do :; done\n"
        f'cat "{directory}/$(echo "$last" | tr / _)"\n'
    )
    program.chmod(0o755)


MakePartition = Callable[..., Partition]


def all_mounts() -> set[str]:
    """What is mounted, in every namespace that can be seen."""
    found = set()
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            found.update(table.read_text().splitlines())
        except OSError:
            continue
    return found


def problems(found: dict[str, Any]) -> list[str]:
    return [problem["text"] for problem in found["problems"]]


# --- looking -----------------------------------------------------------------------------------------------


def test_a_look_mounts_nothing_that_is_seen_and_writes_nothing(partition: MakePartition) -> None:
    here = partition()
    before, mounts = here.digest, Path("/proc/self/mountinfo").read_text()
    found = scan(here.paths)
    assert [row["id"] for row in found["deployments"]] == [here.life.booted.id, here.life.rollback.id]  # type: ignore[union-attr]
    assert problems(found) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert here.questions == 2, "once upwards, once for the disk"
    assert here.digest == before
    # It was given back: nothing keeps the file system as it was mounted.
    with here.mounted("-o", "rw"):
        pass


def test_it_is_not_mounted_while_anything_else_is_done(
    partition: MakePartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = partition()
    seen: list[bool] = []
    make = mountcalls.make_mount

    def watched(*arguments: Any, **options: Any) -> int:
        assert options["read_only"]
        mounts = all_mounts()
        fd = make(*arguments, **options)
        seen.append(any(here.device in line for line in all_mounts() - mounts))
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("x", dir_fd=fd)
        return fd

    monkeypatch.setattr(mountcalls, "make_mount", watched)
    scan(here.paths)
    assert seen == [False]


def test_where_it_is_mounted_that_mount_is_used(
    partition: MakePartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = partition()
    monkeypatch.setattr(mountcalls, "make_mount", lambda *_, **__: pytest.fail("it is mounted"))
    with here.mounted() as point:
        here.in_table(point)
        found = scan(here.paths)
        assert len(found["deployments"]) == 2
        assert problems(found) == []


def test_an_automount_that_waits_is_left_waiting(partition: MakePartition) -> None:
    here = partition()
    with (here.host.root / "proc/self/mountinfo").open("a") as table:
        table.write(f"80 36 0:50 / {here.host.root / 'efi'} rw - autofs systemd-1 rw,direct\n")
    assert len(scan(here.paths)["deployments"]) == 2


def test_one_who_writes_to_it_is_read_along_with(partition: MakePartition) -> None:
    here = partition()
    # In a namespace of somebody else, as far as the table tells.
    with here.mounted("-o", "rw") as point:
        assert len(scan(here.paths)["deployments"]) == 2
        found = espmount.seek(here.paths)
        assert found.esp is not None
        with pytest.raises(OSError, match="Read-only"):
            (found.esp / "x").touch()
        espmount.release(found)
        (point / "x").touch()


def test_one_that_cannot_be_mounted_is_a_problem(partition: MakePartition) -> None:
    here = partition()
    with here.image.open("r+b") as file:
        file.write(b"\0" * 8192)
    found = scan(here.paths)
    assert any(text.startswith("the EFI system partition cannot be mounted: ") for text in problems(found))
    assert [row["id"] for row in found["deployments"]]
    with pytest.raises(BootLoaderError, match="cannot be mounted"):
        scan(here.paths, whole=True)


def test_people_are_told_its_name(partition: MakePartition) -> None:
    here = partition()
    with here.mounted() as point:
        (point / "loader/entries").rename(point / "loader/away")
        (point / "loader/entries").touch()
    told = json.dumps(scan(here.paths))
    assert "ESP:/loader/entries" in told
    assert "/proc/self/fd" not in told
    with pytest.raises(HostimageError) as raised, open_session(here.paths, Silent()) as session:
        reorder.rollback(session)
    assert "/proc/self/fd" not in raised.value.message


def test_grub_with_its_own_entries_needs_none(
    partition: MakePartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = partition(kind=Kind(Loader.GRUB))
    monkeypatch.setattr(mountcalls, "make_mount", lambda *_, **__: pytest.fail("it is not needed"))
    (here.host.root / "boot").rename(here.host.sysroot / "boot")
    assert len(scan(here.paths)["deployments"]) == 2


def test_a_host_without_one(partition: MakePartition) -> None:
    here = partition()
    (here.asked.with_name("bin") / BACKING.replace("/", "_")).unlink()
    assert "the file system with the boot entries is not mounted" in problems(scan(here.paths))


# --- writing -----------------------------------------------------------------------------------------------


def test_a_change_is_made_where_nobody_sees_it_mounted(partition: MakePartition) -> None:
    here = partition()
    mounts = Path("/proc/self/mountinfo").read_text()
    during: list[str] = []

    class Looking(Silent):
        def at(self, point: str) -> None:
            during.append(Path("/proc/self/mountinfo").read_text())

    assert here.life.rollback is not None
    with open_session(here.paths, Looking()) as session:
        assert reorder.rollback(session)["result"] == "queued"
    assert set(during) == {mounts}
    assert here.questions == 2, "however often the host is read"
    assert here.order() == [here.life.rollback.id, here.life.booted.id]


def test_a_mount_that_is_read_only_is_not_made_another(partition: MakePartition) -> None:
    here = partition()
    with here.mounted() as point:
        subprocess.run(["mount", "-o", "remount,bind,ro", point], check=True)
        here.in_table(point, "ro")
        with open_session(here.paths, Silent()) as session:
            reorder.rollback(session)
        with pytest.raises(OSError, match="Read-only"):
            (point / "x").touch()
    assert here.life.rollback is not None
    assert here.order()[0] == here.life.rollback.id


def test_one_whom_somebody_reads_is_waited_for_and_then_told_of(
    partition: MakePartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = partition()
    tries: list[str] = []
    make = mountcalls.make_mount

    def counted(kind: str, **options: Any) -> int:
        tries.append(kind)
        return make(kind, **options)

    monkeypatch.setattr(espmount, "_TRIES", 3)
    monkeypatch.setattr(mountcalls, "make_mount", counted)
    before = here.digest
    with here.mounted("-o", "ro"), open_session(here.paths, Silent()) as session:
        with pytest.raises(BootLoaderError, match="cannot be mounted: Device or resource busy"):
            reorder.rollback(session)
        assert len(tries) == 3
    assert here.digest == before


def test_the_shutdown_activates_what_is_staged(
    partition: MakePartition, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partition(staged)
    mounts = Path("/proc/self/mountinfo").read_text()
    paths = here.paths
    monkeypatch.setattr(commands.HostPaths, "scratch", lambda _: paths)
    monkeypatch.setattr(commands.mounts, "make_writable", lambda _: None)
    assert commands.finalize_main(["--root", str(here.host.root)]) == 0
    assert here.life.staged is not None
    assert capsys.readouterr().out == f"finalized {here.life.staged.id}\n"
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert here.order() == [here.life.staged.id, here.life.booted.id]


def test_the_boot_is_checked_there(partition: MakePartition, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a look at the staged entries a failed shutdown would pass for one without anything staged."""
    here = partition(staged)
    assert here.life.staged is not None
    shutil.rmtree(here.host.root / "run")
    here.host.booted(here.life.booted)
    before = here.digest
    found = commands._boot_check(here.paths)
    assert (found["result"], found["deployment"]) == ("not-activated", here.life.staged.id)
    assert here.digest == before
    assert here.life.staged.id in capsys.readouterr().err


def test_where_it_cannot_be_reached_the_rest_is_checked(
    partition: MakePartition, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = partition(staged)
    assert here.life.rollback is not None
    with here.mounted():
        pass
    here.paths.expected_boot.parent.mkdir(parents=True, exist_ok=True)
    document = {"version": 1, "boot_id": "of before", "time": 0, "deployment": here.life.rollback.id}
    here.paths.expected_boot.write_text(json.dumps(document))
    shutil.rmtree(here.host.root / "run")

    def broken(*_: Any, **__: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mountcalls, "make_mount", broken)
    found = commands._boot_check(here.paths)
    assert (found["result"], found["deployment"]) == ("not-booted", here.life.rollback.id)
    assert "cannot be mounted" in capsys.readouterr().err
