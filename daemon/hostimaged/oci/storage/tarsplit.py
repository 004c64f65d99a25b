"""How the tar of a layer is made of its files: the data that containers-storage keeps beside them.

Facts: tar-split (github.com/vbatts/tar-split), as stored by podman 4 and 5. Gzip over lines of JSON:
``{"type":2,"payload":BASE64}`` is bytes of the tar, ``{"type":1,"name":...,"size":N,"payload":BASE64}`` the
content of a file, of which ``payload`` is the CRC-64, 8 bytes big-endian. A name that is no UTF-8 is
``name_raw``, in base64. (composefs-rs 0.9 looks for the checksum under ``crc64``.) A file without size has no
content. No I/O.
"""

from __future__ import annotations

import binascii
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.gunzip import gunzip
from hostimaged.oci.tar import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer

#: Bytes of a line. The headers of an entry have some MiB at most; podman cuts what follows the last entry
#: into pieces of a MiB.
MAX_LINE: Final = 8 << 20
#: Bytes of all lines: those of a million entries with every header they may have are fewer in practice.
MAX_TEXT: Final = 4 << 30
_FILE, _SEGMENT = 1, 2
_CRC: Final = 8


class FileEntry(NamedTuple):
    """The content of a file goes here: ``size`` bytes, over 0; ``checksum`` is its CRC-64, if known."""

    name: bytes
    size: int
    checksum: int | None


def parse(chunks: Iterable[Buffer]) -> Iterator[bytes | FileEntry]:
    """The parts of the tar in ``chunks`` of a ``tar-split.gz``, in order; parts of bytes are not empty.

    Raises ``UnsupportedImage`` for what is no such data, and for more than the limits above.
    """
    for line in _lines(gunzip(chunks)):
        part = _part(line)
        if part:
            yield part


def _lines(pieces: Iterator[Buffer]) -> Iterator[bytes]:
    rest = b""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_TEXT:
            raise UnsupportedImage(f"over {MAX_TEXT} bytes")
        *lines, last = bytes(piece).split(b"\n")
        if lines:
            lines[0] = rest + lines[0]
            rest = last
        else:
            rest += last
        if len(rest) > MAX_LINE:
            raise UnsupportedImage(f"a line of over {MAX_LINE} bytes")
        for line in lines:
            if line:
                yield line
    if rest:
        yield rest


def _part(line: bytes) -> bytes | FileEntry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UnsupportedImage("a line is no entry")
    kind = entry.get("type")
    if kind == _SEGMENT:
        return _bytes(entry, "payload")
    if kind == _FILE:
        return _file(entry)
    raise UnsupportedImage("an entry is of an unknown type")


def _file(entry: dict[str, Any]) -> FileEntry | None:
    size = entry.get("size") or 0
    if type(size) is not int or not 0 <= size <= MAX_SIZE:
        raise UnsupportedImage("an entry has an invalid size")
    if not size:
        return None
    name = _bytes(entry, "name_raw")
    if not name:
        text = entry.get("name")
        if not isinstance(text, str) or not text:
            raise UnsupportedImage("an entry has no name")
        try:
            name = text.encode()
        except UnicodeEncodeError:
            raise UnsupportedImage("an entry has an invalid name") from None
    if b"\0" in name:
        raise UnsupportedImage("an entry has an invalid name")
    checksum = _bytes(entry, "payload")
    if checksum and len(checksum) != _CRC:
        raise UnsupportedImage("an entry has an invalid checksum")
    return FileEntry(name, size, int.from_bytes(checksum, "big") if checksum else None)


def _bytes(entry: dict[str, Any], key: str) -> bytes:
    value = entry.get(key)
    if value is None:
        return b""
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except (TypeError, ValueError):
        raise UnsupportedImage(f"the {key} of an entry is not valid") from None
