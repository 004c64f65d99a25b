"""Which boot loader a host has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostimaged.boot.loader import LOADER_INFO, Bootloader, detect, named, uki_key
from hostimaged.errors import StorageError

ATTRIBUTES = b"\x06\0\0\0"


def variable(name: str) -> bytes:
    return ATTRIBUTES + name.encode("utf-16-le") + b"\0\0"


@pytest.mark.parametrize(
    ("data", "loader"),
    [
        (variable("systemd-boot 258.1"), Bootloader.SYSTEMD),
        (variable("Systemd-Boot 250"), Bootloader.SYSTEMD),
        (variable("GRUB CC 2.12"), Bootloader.GRUB_CC),
        (variable("GRUB 2.12"), Bootloader.GRUB),
        (variable(""), Bootloader.GRUB),
        (b"", Bootloader.GRUB),
        (ATTRIBUTES + b"\0\xd8s", Bootloader.GRUB),
    ],
)
def test_names(data: bytes, loader: Bootloader, tmp_path: Path) -> None:
    assert named(data) is loader
    (tmp_path / LOADER_INFO).write_bytes(data)
    assert detect(tmp_path) is loader


def test_without_efi(tmp_path: Path) -> None:
    assert detect(None) is Bootloader.GRUB
    assert detect(tmp_path) is Bootloader.GRUB
    assert detect(tmp_path / "absent") is Bootloader.GRUB


def test_a_variable_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / LOADER_INFO).mkdir()
    with pytest.raises(StorageError, match="LoaderInfo"):
        detect(tmp_path)


def test_the_key_of_unified_kernel_images() -> None:
    assert uki_key(Bootloader.SYSTEMD, 258) == "uki"
    assert uki_key(Bootloader.SYSTEMD, 257) == "efi"
    assert uki_key(Bootloader.SYSTEMD, None) == "efi"
    assert uki_key(Bootloader.GRUB_CC, 258) == "efi"
    assert [loader.is_bls for loader in Bootloader] == [False, True, True]
