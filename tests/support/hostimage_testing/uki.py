"""Unified kernel images made byte by byte: PE files that hold sections and no code."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

PE_OFFSET = 0x80
_ALIGNMENT = 0x200
_OPTIONAL_HEADER = 0xF0
_AMD64 = 0x8664


@dataclass(frozen=True)
class Section:
    """One section; its data is padded in the file unless ``raw_size`` and ``virtual_size`` say otherwise."""

    name: bytes
    data: bytes
    virtual_size: int | None = None
    raw_size: int | None = None
    offset: int | None = None


def pe(sections: Sequence[Section], *, count: int | None = None, magic: bytes = b"PE\0\0") -> bytes:
    """A PE32+ file of ``sections`` in the given order; ``count`` is what its header claims."""
    table = PE_OFFSET + 4 + 20 + _OPTIONAL_HEADER
    place = _aligned(table + 40 * len(sections))
    headers, body, address = bytearray(), bytearray(), 0x1000
    for section in sections:
        raw = _aligned(len(section.data))
        headers += struct.pack(
            "<8sIIIIIIHHI",
            section.name,
            len(section.data) if section.virtual_size is None else section.virtual_size,
            address,
            raw if section.raw_size is None else section.raw_size,
            place + len(body) if section.offset is None else section.offset,
            0,
            0,
            0,
            0,
            0x40000040,
        )
        # Not zeros: who reads the padding as content gets a wrong digest.
        body += section.data + b"\xcc" * (raw - len(section.data))
        address += _aligned(max(raw, 1), 0x1000)
    number = len(sections) if count is None else count
    coff = struct.pack("<HHIIIHH", _AMD64, number, 0, 0, 0, _OPTIONAL_HEADER, 0x22E)
    optional = struct.pack("<H", 0x20B).ljust(_OPTIONAL_HEADER, b"\0")
    stub = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", PE_OFFSET)
    start = stub.ljust(PE_OFFSET, b"\0") + magic + coff + optional + bytes(headers)
    return start.ljust(place, b"\0") + bytes(body)


def uki(*, linux: bytes, initrd: bytes, cmdline: str, osrel: str) -> bytes:
    """A unified kernel image as ``ukify`` lays one out."""
    return pe(
        [
            Section(b".osrel", osrel.encode()),
            Section(b".cmdline", cmdline.encode()),
            Section(b".initrd", initrd),
            Section(b".linux", linux),
        ]
    )


def boot_digest(linux: bytes, initrd: bytes) -> str:
    """The boot digest of a kernel and its initrd, packed in one file or not."""
    return hashlib.sha256(linux + initrd).hexdigest()


def _aligned(size: int, alignment: int = _ALIGNMENT) -> int:
    return -(-size // alignment) * alignment
