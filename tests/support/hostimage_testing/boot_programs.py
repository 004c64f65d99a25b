"""Programs for boot loaders, made by Debian's own tools in roots that hold nothing else.

GRUB becomes one file by ``grub-mkimage`` of its release; a unified kernel image by ``ukify``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hostimage_testing.debian_root import in_root, unpack
from hostimage_testing.loaders import ROOT_LABEL, Grub
from hostimage_testing.tools import absent, require

_GRUB_PACKAGES = ("base-files", "coreutils", "grub-common", "grub-efi-amd64-bin")
_UKIFY_PACKAGES = ("base-files", "coreutils", "systemd-boot-efi", "systemd-ukify")
_UKIFY_SUITE = "trixie"
_MODULES = (
    *("part_gpt", "fat", "ext2", "search", "search_label", "search_fs_uuid", "configfile", "normal"),
    *("test", "echo", "linux", "chain", "boot", "sleep", "reboot", "halt", "ls", "cat"),
)
#: As bootupd's program: the file system of /boot is found, then its menu is read.
_CONFIGURATION = f"""\
search --no-floppy --label {ROOT_LABEL} --set=root
set prefix=($root)/boot/grub2
configfile $prefix/grub.cfg
"""


def grub(release: Grub, directory: Path, cache: Path) -> Path:
    """The program of a release, made below ``directory``, its packages kept in ``cache``."""
    root = _tools(f"grub-{release.suite}", release.suite, _GRUB_PACKAGES, directory, cache)
    (root / "grub.cfg").write_text(_CONFIGURATION)
    argv = ["grub-mkimage", "-O", "x86_64-efi", "-o", "/grub.efi", "-c", "/grub.cfg", "-p", "/boot/grub2"]
    in_root(root, *argv, *_MODULES, *release.modules)
    program = directory / release.program
    shutil.move(root / "grub.efi", program)
    shutil.rmtree(root)
    return program


class Ukify:
    """Makes unified kernel images of one kernel and initrd; a root of tools below ``directory``."""

    def __init__(self, directory: Path, cache: Path, kernel: Path, initrd: Path, os_release: bytes) -> None:
        self._root = _tools("ukify", _UKIFY_SUITE, _UKIFY_PACKAGES, directory, cache)
        shutil.copy(kernel, self._root / "vmlinuz")
        shutil.copy(initrd, self._root / "initrd")
        (self._root / "os-release").write_bytes(os_release)

    def build(self, cmdline: str) -> bytes:
        """The image with these arguments of the kernel."""
        given = ("--linux=/vmlinuz", "--initrd=/initrd", "--os-release=@/os-release", f"--cmdline={cmdline}")
        stub = "--stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
        in_root(self._root, "python3", "/usr/bin/ukify", "build", *given, stub, "--output=/image.efi")
        made = self._root / "image.efi"
        try:
            return made.read_bytes()
        finally:
            made.unlink()

    def remove(self) -> None:
        """Remove the root of tools."""
        shutil.rmtree(self._root)


def _tools(name: str, suite: str, packages: tuple[str, ...], directory: Path, cache: Path) -> Path:
    """A root below ``directory`` with the files of ``packages``, none of them configured."""
    archive = cache / f"tools-{name}.tar"
    if not archive.exists():
        partial = archive.with_suffix(".partial.tar")
        argv = [require("mmdebstrap"), "--variant=extract", "--mode=root", f"--include={','.join(packages)}"]
        argv += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "info", "locale", "man")]
        # A mirror that is a copy of some day has lists whose time is over; their signatures hold.
        argv += ['--aptopt=Acquire::Check-Valid-Until "false"', "--quiet", suite, str(partial)]
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "TERM", *argv],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        if done.returncode != 0:
            absent(f"mmdebstrap failed: {done.stderr[-500:]}")
        partial.rename(archive)
    root = directory / f"tools-{name}"
    unpack(archive, root)
    return root
