"""Unified kernel images: PE files with a kernel, an initrd and a command line in sections of their own.

Sections are read as composefs-rs 0.9 reads them (``composefs-boot``, ``uki``): ``VirtualSize`` bytes from
``PointerToRawData``, of the first section of a name. So padding up to the file alignment is not part of a
section, and ``SizeOfRawData`` plays no role.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hostimaged.errors import UnsupportedImage, from_os_error
from hostimaged.ids import BootDigest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Sections of a PE file; the field has room for 65535, images have about ten.
MAX_SECTIONS: Final = 256
#: Bytes of a section that is text.
MAX_TEXT: Final = 64 << 10
#: Bytes of a kernel or an initrd; far above what an ESP has room for, and read in pieces.
MAX_SECTION: Final = 2 << 30

_PIECE: Final = 1 << 20
_PE_OFFSET: Final = struct.Struct("<60xI")
_HEADER: Final = struct.Struct("<4sHHIIIHH")
_SECTION: Final = struct.Struct("<8sIIII16x")
_MAGIC: Final = b"PE\0\0"


@dataclass(frozen=True, slots=True)
class Uki:
    """What is known of a unified kernel image.

    ``cmdline`` is its command line, "" without one; ``osrel`` its os-release, None without one.
    """

    cmdline: str
    osrel: bytes | None
    boot_digest: BootDigest

    @classmethod
    def read(cls, fd: int, name: str = "unified kernel image") -> Self:
        """Read it from a descriptor, whose position stays; raises ``UnsupportedImage`` naming the file.

        Kernel and initrd are hashed in pieces, as they are up to hundreds of MiB long.
        """
        file = _File(fd, name)
        sections = file.sections()
        digest = hashlib.sha256()
        for needed in (b".linux", b".initrd"):
            if needed not in sections:
                raise UnsupportedImage(f"{name}: has no section {needed.decode()}")
            for piece in file.pieces(sections[needed]):
                digest.update(piece)
        return cls(file.cmdline(sections), file.text(sections, b".osrel"), BootDigest(digest.hexdigest()))


def read_cmdline(fd: int, name: str = "unified kernel image") -> str:
    """The command line alone, which needs a few KiB of the file; raises as ``Uki.read``."""
    file = _File(fd, name)
    return file.cmdline(file.sections())


@dataclass(frozen=True, slots=True)
class _Section:
    offset: int
    size: int


class _File:
    """A PE file behind a descriptor."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    def sections(self) -> dict[bytes, _Section]:
        """The first section of each name (PE format, "Section Table")."""
        (offset,) = _PE_OFFSET.unpack(self._exactly(0, _PE_OFFSET.size))
        header = _HEADER.unpack(self._exactly(offset, _HEADER.size))
        magic, _, count, *_, optional_size, _ = header
        if magic != _MAGIC:
            raise UnsupportedImage(f"{self._name}: not a PE file")
        if count > MAX_SECTIONS:
            raise UnsupportedImage(f"{self._name}: more than {MAX_SECTIONS} sections")
        table = self._exactly(offset + _HEADER.size + optional_size, count * _SECTION.size)
        found: dict[bytes, _Section] = {}
        for section, virtual_size, _, _, pointer in _SECTION.iter_unpack(table):
            found.setdefault(section.rstrip(b"\0"), _Section(pointer, virtual_size))
        return found

    def pieces(self, section: _Section) -> Iterator[bytes]:
        """The content of a section."""
        if section.size > MAX_SECTION:
            raise UnsupportedImage(f"{self._name}: a section is larger than {MAX_SECTION} bytes")
        for at in range(0, section.size, _PIECE):
            yield self._exactly(section.offset + at, min(_PIECE, section.size - at))

    def text(self, sections: dict[bytes, _Section], section: bytes) -> bytes | None:
        """The content of a section of text, None if there is none of the name."""
        found = sections.get(section)
        if found is None:
            return None
        if found.size > MAX_TEXT:
            raise UnsupportedImage(f"{self._name}: {section.decode()} is larger than {MAX_TEXT} bytes")
        return self._exactly(found.offset, found.size)

    def cmdline(self, sections: dict[bytes, _Section]) -> str:
        """The command line, without what tools leave behind its end."""
        data = self.text(sections, b".cmdline") or b""
        try:
            return data.decode("utf-8").rstrip("\0 \t\r\n")
        except UnicodeDecodeError:
            raise UnsupportedImage(f"{self._name}: .cmdline is not UTF-8") from None

    def _exactly(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise UnsupportedImage(f"{self._name}: ends before what its headers name")
                data += more
        except OSError as error:
            raise from_os_error(error, self._name) from None
        return data
