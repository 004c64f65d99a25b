"""A small file system that can be filled to the brim, and turned read-only in the middle of work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.tools import absent, require, run

_FILLER = "filler"


@dataclass
class SmallDisk:
    """An ext4 on the loop device ``device``, mounted at ``path``. Turns read-only by itself on errors."""

    path: Path
    device: str
    image: Path

    def fill(self) -> None:
        """Write until not a single byte more fits, for root either."""
        fd = os.open(self.path / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        os.write(fd, bytes(size))
                # Delayed allocation makes room once more.
                with suppress(OSError):
                    os.fsync(fd)
        finally:
            os.close(fd)

    def make_room(self) -> None:
        """Remove what ``fill`` wrote."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def turn_read_only(self) -> None:
        """By remounting; where files are open for writing, as a disk that had an error."""
        if run("mount", "-o", "remount,ro", self.path, check=False).code:
            # What was written so far is not what this is about: an aborted journal loses it.
            run("sync", "--file-system", self.path)
            trigger = Path("/sys/fs/ext4") / Path(self.device).name / "trigger_fs_error"
            trigger.write_text("test")
        assert os.statvfs(self.path).f_flag & os.ST_RDONLY or self._refuses()

    def _refuses(self) -> bool:
        """Whether nothing can be made, whatever the flags say."""
        try:
            (self.path / "probe").touch()
        except OSError:
            return True
        return False

    def turn_writable(self) -> None:
        """Mount it anew, checked: an error stays until then, even where a remount says otherwise."""
        if run("mount", "-o", "remount,rw", self.path, check=False).code or self._refuses():
            run("umount", self.path)
            run("e2fsck", "-p", "-f", self.device, check=False)
            self.mount()
            with suppress(FileNotFoundError):
                (self.path / "lost+found").rmdir()
        assert not self._refuses()
        (self.path / "probe").unlink()

    def mount(self) -> None:
        """Mount it."""
        done = run("mount", "-t", "ext4", "-o", "errors=remount-ro", self.device, self.path, check=False)
        if done.code:
            absent(f"ext4 on a loop device cannot be mounted here: {done.err.strip()}")

    def unmount(self) -> None:
        """Unmount it with everything below; nobody is kept waiting by what a failed test left open."""
        if run("umount", "--recursive", self.path, check=False).code:
            run("umount", "--lazy", "--recursive", self.path)

    def clear(self) -> None:
        """Make it empty and writable, whatever it went through."""
        self.turn_writable()
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def small_disk(directory: Path, path: Path, size: int) -> Iterator[SmallDisk]:
    """A new one of ``size`` bytes, mounted at ``path``; its image lies in ``directory``."""
    if os.geteuid() != 0:
        absent("mounting needs root")
    image = directory / f"{path.name}.img"
    with image.open("xb") as file:
        file.truncate(size)
    run(require("mkfs.ext4"), "-q", "-F", "-m", "0", image)
    attached = run(require("losetup"), "--find", "--show", image, check=False)
    if attached.code:
        absent(f"no loop device can be had: {attached.err.strip()}")
    device = attached.out.strip()
    path.mkdir(parents=True, exist_ok=True)
    disk = SmallDisk(path, device, image)
    try:
        disk.mount()
        try:
            yield disk
        finally:
            disk.unmount()
    finally:
        run("losetup", "--detach", device)
        image.unlink()
