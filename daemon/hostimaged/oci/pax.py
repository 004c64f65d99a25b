"""pax extended headers: what they change about an entry (POSIX pax, as composefs-rs 0.9 reads it)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Iterator

#: XATTR_NAME_MAX of Linux, and what the 16-bit size of the image format can say (Linux allows one byte more).
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 65535

_WORD: Final = (1 << 64) - 1
#: What ``u64::from_str`` of Rust takes; leading zeros beyond reason aside.
_DECIMAL: Final = re.compile(rb"\+?[0-9]{1,40}\Z")
_XATTR: Final = b"SCHILY.xattr."
_SPARSE: Final = b"GNU.sparse."


def records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header as (key, value), in order.

    A record that does not begin with a number and a space silently ends the list, as in composefs-rs; any
    other malformed one raises ``UnsupportedImage``.
    """
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 42)
        if space < 0 or not _DECIMAL.match(data[at:space]):
            return
        # The length counts itself, the space and the newline.
        end = at + int(data[at:space])
        record = data[space + 1 : end - 1] if space + 1 < end <= len(data) else b""
        key, equals, value = record.partition(b"=")
        if not equals or data[end - 1] != 0x0A:
            raise UnsupportedImage("malformed pax header")
        yield key, value
        at = end


def overrides(data: bytes) -> dict[str, Any]:
    """What a pax header says of its entry, by the names of ``TarHeader``'s fields.

    Extended attributes are taken from ``SCHILY.xattr`` records. Unknown records are ignored. Raises
    ``UnsupportedImage``, also for every form of sparse file.
    """
    fields: dict[str, Any] = {}
    xattrs: dict[bytes, bytes] = {}
    for key, value in records(data):
        if key.startswith(_XATTR):
            xattrs[_xattr_name(key, value)] = value
        elif key == b"mtime":
            # A repeated record: the last gives the seconds, the first the fraction.
            fields["mtime"] = signed(_decimal(key, _utf8(value).partition(b".")[0]))
            fields.setdefault("nsec", _nanoseconds(value))
        elif key == b"path":
            fields["path"] = value
        elif key == b"linkpath":
            fields["link"] = value
        elif key == b"size":
            fields["size"] = _decimal(key, value)
        elif key in (b"uid", b"gid"):
            fields[key.decode()] = _decimal(key, value) & 0xFFFFFFFF
        elif key.startswith(_SPARSE):
            raise UnsupportedImage("sparse files in layers are not supported")
        else:
            _utf8(key)
    if xattrs:
        fields["xattrs"] = xattrs
    return fields


def signed(value: int) -> int:
    """A 64-bit word as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def _utf8(text: bytes) -> bytes:
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UnsupportedImage("malformed pax header: not UTF-8") from error
    return text


def _xattr_name(key: bytes, value: bytes) -> bytes:
    name = _utf8(key)[len(_XATTR) :]
    if len(name) > MAX_XATTR_NAME or len(value) > MAX_XATTR_VALUE:
        raise UnsupportedImage("an extended attribute is larger than an image can hold")
    return name


def _decimal(key: bytes, value: bytes) -> int:
    number = int(value) if _DECIMAL.match(value) else -1
    if not 0 <= number <= _WORD:
        raise UnsupportedImage(f"invalid {key.decode()} {value[:100]!r} in a pax header")
    return number


def _nanoseconds(time: bytes) -> int:
    """The fraction of a pax time, cut to 9 digits; 0 if it is no number."""
    digits = time.partition(b".")[2][:9]
    return int(digits) * 10 ** (9 - len(digits)) if _DECIMAL.match(digits) else 0
