"""Which boot loader a host has, and how that shows in what is written for it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hostimaged.errors import from_os_error

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.boot.bls import EfiKey

#: The variable in which a boot loader leaves its name (systemd, Boot Loader Interface).
LOADER_INFO: Final = "LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
#: Bytes of the variable that are looked at: a name and a version.
MAX_VARIABLE: Final = 4096
#: The systemd from which on ``bootctl`` and systemd-boot know ``uki`` lines in entries.
UKI_KEY_VERSION: Final = 258


class Bootloader(StrEnum):
    """The boot loaders of composefs hosts, by their names in bootc's status."""

    GRUB = "grub"
    SYSTEMD = "systemd"
    GRUB_CC = "grub-cc"

    @property
    def is_bls(self) -> bool:
        """Whether entries and kernels are on the ESP, and unified kernel images have entries too."""
        return self is not Bootloader.GRUB


def detect(efivars: Path | None) -> Bootloader:
    """The boot loader that started this host; GRUB where there is no EFI or it left no name.

    Raises ``StorageError`` if the variable cannot be read.
    """
    if efivars is None:
        return Bootloader.GRUB
    try:
        with (efivars / LOADER_INFO).open("rb", buffering=0) as file:
            data = file.read(MAX_VARIABLE)
    except (FileNotFoundError, NotADirectoryError):
        return Bootloader.GRUB
    except OSError as error:
        raise from_os_error(error, f"EFI variable {LOADER_INFO}") from None
    return named(data)


def named(variable: bytes) -> Bootloader:
    """The boot loader by its LoaderInfo: four bytes of attributes, then its name in UTF-16."""
    name = variable[4:].decode("utf-16-le", "replace").lower()
    if "systemd-boot" in name:
        return Bootloader.SYSTEMD
    return Bootloader.GRUB_CC if "grub cc" in name else Bootloader.GRUB


def uki_key(loader: Bootloader, systemd_version: int | None) -> EfiKey:
    """The key that names a unified kernel image in an entry; without a known version the older one."""
    if loader is Bootloader.GRUB_CC or systemd_version is None or systemd_version < UKI_KEY_VERSION:
        return "efi"
    return "uki"
