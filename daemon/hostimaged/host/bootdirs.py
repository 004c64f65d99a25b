"""Where boot entries, kernels and UKIs of a host are.

Facts: boot-entries.md 1 and 3 (bootc 1.16), and what bootc does since: a separate /boot comes first. Nothing
is mounted, and no automount is triggered; where the ESP is, is found out before (``espmount``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.boot.esp import Mount, mount_at, parse_mountinfo
from hostimaged.boot.loader import Bootloader
from hostimaged.errors import from_os_error
from hostimaged.system.paths import BOOT_IN_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.system.paths import HostPaths

LOADER: Final = "loader"
GRUB: Final = "grub2"
#: File system of what is mounted when somebody looks; of an automount, until then.
AUTOFS: Final = "autofs"
_EFI_LINUX: Final = "EFI/Linux"
#: More lines than any host has; what is beyond is not looked at.
_MAX_TABLE: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class BootDirs:
    """Directories of one boot loader; what is on an ESP that nobody mounted is None.

    ``boot`` holds ``loader/`` (and ``grub2/``); kernels are directories in ``kernels``, which boot entries
    call ``prefix`` + ``/`` + name; UKIs are files in ``ukis``, which entries call by their path on the ESP.
    """

    loader: Bootloader
    boot: Path | None
    kernels: Path | None
    prefix: str
    esp: Path | None

    @property
    def loader_dir(self) -> Path | None:
        """Holds ``entries`` and ``entries.staged``."""
        return None if self.boot is None else self.boot / LOADER

    @property
    def grub_dir(self) -> Path | None:
        """Holds ``user.cfg``, with the classic GRUB alone."""
        return self.boot / GRUB if self.boot is not None and self.loader is Bootloader.GRUB else None

    @property
    def ukis(self) -> Path | None:
        """Holds the UKIs."""
        return None if self.esp is None else self.esp / bls.UKI_DIRECTORY

    def file(self, entry_path: str) -> Path | None:
        """The file that a boot entry calls ``entry_path``; None if that cannot be said.

        An entry's path is absolute in the file system that holds ``boot``.
        """
        parts = [part for part in entry_path.split("/") if part not in ("", ".")]
        if not parts or ".." in parts or self.boot is None:
            return None
        path = self.boot.joinpath(*parts)
        if self.loader is Bootloader.GRUB and parts[0] == "boot" and not path.exists():
            # /boot lies on the root file system, in which the path begins with it.
            path = self.boot.joinpath(*parts[1:])
        return path

    def uki_file(self, entry_path: str) -> Path | None:
        """The UKI that a boot entry calls ``entry_path``: it is always on the ESP."""
        parts = [part for part in entry_path.split("/") if part not in ("", ".")]
        if not parts or ".." in parts or self.esp is None:
            return None
        return self.esp.joinpath(*parts)


def mount_table(paths: HostPaths) -> list[Mount]:
    """The mounts of this host; none where there is no such fact. Raises ``StorageError``."""
    if paths.mountinfo is None:
        return []
    try:
        with paths.mountinfo.open("rb") as file:
            return parse_mountinfo(file.read(_MAX_TABLE))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, "cannot read the table of mounts") from error


def candidates(paths: HostPaths, loader: Bootloader, table: list[Mount]) -> list[BootDirs]:
    """Where the entries of this host may be, the likeliest first; never empty.

    ``table`` is that of ``mount_table``.
    """
    esp = paths.esp
    if paths.scratch_root is not None or paths.mountinfo is None:
        if loader.is_bls:
            return [_on_esp(loader, esp)]
        return [_grub(loader, paths.boot, esp, own=_is_own(paths.boot))]
    if loader.is_bls:
        return [_on_esp(loader, esp)]
    found = []
    mount = mount_at(table, os.fsencode(paths.boot))
    if mount is not None and mount.filesystem != AUTOFS and _has_grub(paths.boot):
        found.append(_grub(loader, paths.boot, esp, own=True))
    physical = paths.physical_root / "boot"
    own = mount_at(table, os.fsencode(physical)) is not None
    return [*found, _grub(loader, physical, esp, own=own)]


def _grub(loader: Bootloader, boot: Path, esp: Path | None, *, own: bool) -> BootDirs:
    return BootDirs(loader, boot, boot, "" if own else BOOT_IN_ROOT, esp)


def _on_esp(loader: Bootloader, esp: Path | None) -> BootDirs:
    return BootDirs(loader, esp, None if esp is None else esp / _EFI_LINUX, "/" + _EFI_LINUX, esp)


def _is_own(boot: Path) -> bool:
    """Whether ``boot`` is the root of a file system."""
    try:
        return boot.stat().st_dev != boot.parent.stat().st_dev
    except OSError:
        return False


def _has_grub(boot: Path) -> bool:
    return any(os.path.lexists(boot / name) for name in (GRUB, f"{LOADER}/entries"))
