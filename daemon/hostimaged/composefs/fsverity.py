"""fs-verity file digests, computed in user space, and the names made from them.

Facts: kernel documentation of fs-verity, and composefs-rs 0.9 for the names. Block size 4096, no salt. Does
no ioctl: that is ``hostimaged.system``.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from enum import Enum
from typing import TYPE_CHECKING, Final

from hostimaged.errors import CorruptRepository
from hostimaged.ids import ObjectId

if TYPE_CHECKING:
    from collections.abc import Callable
    from hashlib import _Hash
    from typing import TypeAlias

    #: Anything with bytes in it (``collections.abc.Buffer`` comes with Python 3.12).
    Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCK: Final = 4096

#: Bytes read at a time by ``digest_fd``: large enough to amortise the call, small enough for the cache.
_READ: Final = 1 << 18

_IDENTIFIER_PREFIX: Final = "fsverity-"
#: How Rust parses a ``u8``: an optional ``+``, then digits.
_UNSIGNED: Final = re.compile(r"\+?[0-9]+\Z", re.ASCII)

#: version, algorithm, log2 of block size, salt size, signature size, data size, root hash, salt, reserved.
_DESCRIPTOR: Final = struct.Struct("<BBBBIQ64s32s144s")


class FsVerityError(CorruptRepository):
    """{detail}"""


class Algorithm(Enum):
    """The hash of a repository. ``value`` is the label, ``sha256`` or ``sha512``."""

    SHA256 = "sha256"
    SHA512 = "sha512"

    kernel_id: int
    digest_size: int
    hex_length: int
    new: Callable[..., _Hash]

    def __init__(self, label: str) -> None:
        constructor: Callable[..., _Hash] = getattr(hashlib, label)
        #: ``FS_VERITY_HASH_ALG_*`` of the kernel.
        self.kernel_id = {"sha256": 1, "sha512": 2}[label]
        #: Bytes in a digest.
        self.digest_size = constructor().digest_size
        #: Hex digits in a digest.
        self.hex_length = 2 * self.digest_size
        #: Constructor of the hashlib object.
        self.new = constructor

    @property
    def label(self) -> str:
        """``sha256`` or ``sha512``."""
        return str(self.value)

    @property
    def identifier(self) -> str:
        """The name in ``meta.json``, such as ``fsverity-sha256-12``."""
        return f"{_IDENTIFIER_PREFIX}{self.label}-12"

    @classmethod
    def from_label(cls, label: str) -> Algorithm:
        """``sha256`` or ``sha512``; raises ``FsVerityError``."""
        for algorithm in cls:
            if algorithm.label == label:
                return algorithm
        raise FsVerityError(f"unknown fs-verity hash {label[:80]!r}")

    @classmethod
    def from_identifier(cls, text: str) -> Algorithm:
        """Parse an identifier such as ``fsverity-sha512-12``; raises ``FsVerityError``.

        The checks run in the order of composefs-rs 0.9: prefix, separator, block size, hash.
        """
        shown = f"fs-verity algorithm {text[:80]!r}"
        if not text.startswith(_IDENTIFIER_PREFIX):
            raise FsVerityError(f"{shown} does not begin with {_IDENTIFIER_PREFIX!r}")
        label, separator, block_bits = text.removeprefix(_IDENTIFIER_PREFIX).rpartition("-")
        if not separator:
            raise FsVerityError(f"{shown} has no block size")
        if not _UNSIGNED.match(block_bits) or len(block_bits) > 16 or int(block_bits) > 255:
            raise FsVerityError(f"{shown} has an invalid block size")
        if int(block_bits) != 12:
            raise FsVerityError(f"{shown} has an unsupported block size")
        return cls.from_label(label)


def _descriptor_digest(algorithm: Algorithm, root: bytes, size: int) -> ObjectId:
    descriptor = _DESCRIPTOR.pack(1, algorithm.kernel_id, 12, 0, 0, size, root, b"", b"")
    return ObjectId(algorithm.new(descriptor).digest())


class Hasher:
    """Computes the fs-verity digest of bytes that come in pieces.

    Memory is O(log n). Not thread-safe. ``finish`` may be called once, and ends the use of the object.
    """

    __slots__ = ("_algorithm", "_levels", "_partial", "size")

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._partial = bytearray()
        # Per level of the tree the digests of the block that is not full yet. A level exists from the moment
        # the first digest is put into it, so a single digest in the top level is the root.
        self._levels: list[bytearray] = [bytearray()]
        #: Bytes fed so far.
        self.size = 0

    def update(self, buffer: Buffer) -> None:
        """Feed the next bytes; pieces that are multiples of 4096 bytes are the fastest."""
        view = memoryview(buffer).cast("B")
        length = len(view)
        self.size += length
        start = 0
        new = self._algorithm.new
        partial = self._partial
        if partial:
            start = min(BLOCK - len(partial), length)
            partial += view[:start]
            if len(partial) < BLOCK:
                return
            self._push(new(partial).digest())
            partial.clear()
        end = length - (length - start) % BLOCK
        if end > start:
            blocks = range(start, end, BLOCK)
            self._push(b"".join([new(view[at : at + BLOCK]).digest() for at in blocks]))
        partial += view[end:]

    def update_digested(self, size: int, digests: bytes) -> None:
        """Feed whole blocks, ``size`` bytes, by what ``block_digests`` gave for them; after whole blocks."""
        if self._partial or size % BLOCK or len(digests) != size // BLOCK * self._algorithm.digest_size:
            raise ValueError("not the digests of whole blocks")
        self.size += size
        self._push(digests)

    def _push(self, digests: bytes) -> None:
        """Append ``digests`` to level 0 and hash every block that became full, up to the top."""
        new = self._algorithm.new
        for level in self._levels:
            level += digests
            full = len(level) - len(level) % BLOCK
            if not full:
                return
            digests = b"".join([new(level[at : at + BLOCK]).digest() for at in range(0, full, BLOCK)])
            del level[:full]
        while digests:
            level = bytearray(digests)
            self._levels.append(level)
            full = len(level) - len(level) % BLOCK
            digests = b"".join([new(level[at : at + BLOCK]).digest() for at in range(0, full, BLOCK)])
            del level[:full]

    def finish(self) -> ObjectId:
        """The digest of everything fed."""
        algorithm = self._algorithm
        if self._partial:
            self._push(algorithm.new(self._partial.ljust(BLOCK, b"\0")).digest())
        if not self.size:
            return _descriptor_digest(algorithm, b"", 0)
        levels = self._levels
        at = 0
        while at < len(levels) - 1 or len(levels[at]) > algorithm.digest_size:
            if levels[at]:
                above = algorithm.new(levels[at].ljust(BLOCK, b"\0")).digest()
                if at + 1 == len(levels):
                    levels.append(bytearray())
                levels[at + 1] += above
            at += 1
        return _descriptor_digest(algorithm, bytes(levels[at]), self.size)


def block_digests(algorithm: Algorithm, buffer: Buffer) -> bytes:
    """The digests of whole blocks, one after the other: the part of the work that can be done elsewhere."""
    view = memoryview(buffer).cast("B")
    new = algorithm.new
    return b"".join([new(view[at : at + BLOCK]).digest() for at in range(0, len(view), BLOCK)])


def digest(algorithm: Algorithm, buffer: Buffer) -> ObjectId:
    """The fs-verity digest of ``buffer``."""
    view = memoryview(buffer).cast("B")
    if len(view) <= BLOCK:
        return digest_small(algorithm, bytes(view))
    hasher = Hasher(algorithm)
    hasher.update(view)
    return hasher.finish()


def digest_small(algorithm: Algorithm, data: bytes) -> ObjectId:
    """The fs-verity digest of at most 4096 bytes, as most files of an OS have: no tree at all."""
    size = len(data)
    root = algorithm.new(data.ljust(BLOCK, b"\0")).digest() if size else b""
    return _descriptor_digest(algorithm, root, size)


def digest_fd(algorithm: Algorithm, fd: int) -> ObjectId:
    """The fs-verity digest of an open regular file, read from its beginning without moving its offset."""
    hasher = Hasher(algorithm)
    buffer = bytearray(_READ)
    view = memoryview(buffer)
    while count := os.preadv(fd, [buffer], hasher.size):
        hasher.update(view[:count])
    return hasher.finish()


def parse_hex(algorithm: Algorithm, text: str | bytes) -> ObjectId:
    """A digest written as hex in either case, of exactly the algorithm's length; raises ``FsVerityError``."""
    try:
        # ``fromhex`` skips white space, which the length of the result then shows.
        raw = bytes.fromhex(text if isinstance(text, str) else text.decode("ascii"))
    except ValueError:
        raw = b""
    if len(raw) != algorithm.digest_size or len(text) != algorithm.hex_length:
        raise FsVerityError(f"{_shown(text)} is not a {algorithm.label} fs-verity digest")
    return ObjectId(raw)


def parse_pathname(algorithm: Algorithm, text: str | bytes) -> ObjectId:
    """The digest named by an object path: the last bytes ``xx/rest``, whatever stands before them.

    Raises ``FsVerityError``.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    tail = raw[-(algorithm.hex_length + 1) :]
    if len(tail) != algorithm.hex_length + 1 or tail[2:3] != b"/":
        raise FsVerityError(f"{_shown(text)} is not the path of a {algorithm.label} object")
    return parse_hex(algorithm, tail[:2] + tail[3:])


def _shown(text: str | bytes) -> str:
    return repr(text if isinstance(text, str) else text.decode("utf-8", "backslashreplace"))
