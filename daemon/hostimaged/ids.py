"""Identity types: what is told apart has a type of its own.

Two kinds never compare equal, and mixing them is a type error. Printed digests carry their algorithm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from hostimaged.errors import InvalidArgs

_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")


class ObjectId(bytes):
    """fs-verity digest of an object: 32 (sha256) or 64 (sha512) bytes.

    Names objects, streams and EROFS images of a repository (composefs-rs 0.9, repository layout).
    """

    __slots__ = ()

    @property
    def pathname(self) -> str:
        """Path below ``objects/``: first byte in hex, ``/``, the rest in hex."""
        text = self.hex()
        return f"{text[:2]}/{text[2:]}"


@dataclass(frozen=True, slots=True, order=True)
class OciDigest:
    """A content digest as OCI writes it, ``sha256:`` and 64 lower-case hex digits.

    Raises ``InvalidArgs`` for anything else: no other algorithm is in use for OS images.
    """

    value: str
    what: ClassVar[str] = "digest"

    def __post_init__(self) -> None:
        if not _SHA256.match(self.value):
            raise InvalidArgs(f"{self.what} {self.value!r} is not of the form sha256:<64 hex digits>")

    @property
    def hex(self) -> str:
        """The hex digits alone."""
        return self.value[7:]

    @classmethod
    def of_hash(cls, hexdigest: str) -> Self:
        """From the hex digits of a finished sha256."""
        return cls("sha256:" + hexdigest)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class ManifestDigest(OciDigest):
    """sha256 of a manifest's bytes as stored in the repository."""

    what: ClassVar[str] = "manifest digest"


@dataclass(frozen=True, slots=True, order=True)
class ConfigDigest(OciDigest):
    """sha256 of an image configuration's bytes."""

    what: ClassVar[str] = "config digest"


@dataclass(frozen=True, slots=True, order=True)
class BlobDigest(OciDigest):
    """sha256 of a blob as it is transferred (a layer: compressed)."""

    what: ClassVar[str] = "blob digest"


@dataclass(frozen=True, slots=True, order=True)
class DiffId(OciDigest):
    """sha256 of a layer's uncompressed tar."""

    what: ClassVar[str] = "diff_id"


@dataclass(frozen=True, slots=True, order=True)
class SourceDigest(OciDigest):
    """Digest under which the source names a manifest; differs from ours where it was converted to OCI."""

    what: ClassVar[str] = "source digest"
