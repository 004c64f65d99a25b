"""Unified kernel images."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostimage_testing.uki import PE_OFFSET, Section, boot_digest, pe, uki
from hostimaged.boot import pe as module
from hostimaged.boot.pe import Uki, read_cmdline
from hostimaged.errors import StorageError, UnsupportedImage

LINUX, INITRD = Section(b".linux", b"kernel"), Section(b".initrd", b"initrd" * 1000)


@contextmanager
def memory(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("uki")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def read(data: bytes) -> Uki:
    with memory(data) as fd:
        found = Uki.read(fd, "x.efi")
        assert read_cmdline(fd, "x.efi") == found.cmdline
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(data)
        return found


def test_a_usual_one() -> None:
    found = read(uki(linux=b"kernel", initrd=b"initrd", cmdline="quiet composefs=x", osrel="ID=x\n"))
    assert found.cmdline == "quiet composefs=x"
    assert found.osrel == b"ID=x\n"
    assert found.boot_digest.hex == boot_digest(b"kernel", b"initrd")


def test_without_text() -> None:
    found = read(pe([INITRD, LINUX]))
    assert (found.cmdline, found.osrel) == ("", None)


def test_what_tools_leave_behind_the_command_line() -> None:
    assert read(pe([LINUX, INITRD, Section(b".cmdline", b"a=b \r\n\0\0")])).cmdline == "a=b"


def test_the_virtual_size_counts() -> None:
    """Neither the padding to the file alignment nor the size of the raw data is part of a section."""
    shorter = Section(b".linux", b"kernel+more", virtual_size=6)
    assert read(pe([shorter, INITRD])).boot_digest == read(pe([LINUX, INITRD])).boot_digest
    longer = Section(b".linux", b"kernel", virtual_size=8, raw_size=6)
    expected = hashlib.sha256(b"kernel\xcc\xcc" + INITRD.data).hexdigest()
    assert read(pe([longer, INITRD])).boot_digest.hex == expected


def test_the_first_section_of_a_name_counts() -> None:
    """An image with several profiles repeats sections."""
    sections = [LINUX, INITRD, Section(b".cmdline", b"first"), Section(b".cmdline", b"second")]
    assert read(pe(sections)).cmdline == "first"


def test_large_sections_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.efi"
    content = os.urandom(module._PIECE + 1)
    path.write_bytes(pe([Section(b".linux", content), Section(b".initrd", b"")]))
    with path.open("rb") as file:
        assert Uki.read(file.fileno()).boot_digest.hex == hashlib.sha256(content).hexdigest()


GOOD = pe([LINUX, INITRD])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ",
        GOOD[:PE_OFFSET],
        GOOD[:-4000],
        pe([LINUX, INITRD], magic=b"NE\0\0"),
        pe([LINUX]),
        pe([INITRD]),
        pe([LINUX, INITRD], count=65535),
        pe([LINUX, INITRD], count=module.MAX_SECTIONS),
        pe([LINUX, Section(b".initrd", b"", virtual_size=0xFFFFFFFF)]),
        pe([LINUX, Section(b".initrd", b"x", offset=0xFFFFFFF0)]),
        pe([LINUX, INITRD, Section(b".cmdline", b"\xff")]),
        pe([LINUX, INITRD, Section(b".cmdline", b"a" * (module.MAX_TEXT + 1))]),
        pe([LINUX, INITRD, Section(b".osrel", b"a" * (module.MAX_TEXT + 1))]),
        GOOD[:0x3C] + struct.pack("<I", 0xFFFFFFFF) + GOOD[0x40:],
    ],
)
def test_what_is_refused(data: bytes) -> None:
    with memory(data) as fd, pytest.raises(UnsupportedImage, match=r"x\.efi"):
        Uki.read(fd, "x.efi")


def test_a_descriptor_that_cannot_be_read(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match=r"x\.efi"):
            Uki.read(fd, "x.efi")
    finally:
        os.close(fd)
