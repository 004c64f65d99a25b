"""Identity types: what is told apart has a type of its own.

Two kinds never compare equal, and mixing them is a type error. Printed digests carry their algorithm.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from hostimaged.errors import InvalidArgs

_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}\Z")
_SHA512_HEX: Final = re.compile(r"[0-9a-f]{128}\Z")


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

    @classmethod
    def of_content(cls, content: bytes) -> Self:
        """The digest of ``content``."""
        return cls.of_hash(hashlib.sha256(content).hexdigest())

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


@dataclass(frozen=True, slots=True, order=True)
class DeploymentId:
    """Identity of a deployment: the fs-verity sha512 of its boot image in 128 lower-case hex digits.

    It names ``state/deploy/<id>``, ``images/<id>`` and the ``composefs=`` argument. Raises ``InvalidArgs``
    for anything else.
    """

    value: str

    def __post_init__(self) -> None:
        if not _SHA512_HEX.match(self.value):
            raise InvalidArgs(f"deployment {self.value!r} is not of the form <128 hex digits>")

    @classmethod
    def of_object(cls, object_id: ObjectId) -> Self:
        """The deployment of a boot image."""
        return cls(object_id.hex())

    @property
    def object_id(self) -> ObjectId:
        """The object that holds the boot image."""
        return ObjectId(bytes.fromhex(self.value))

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class BootDigest:
    """sha256 of the boot artifacts of a deployment, 64 lower-case hex digits.

    Kernel followed by initrd, or the digest of a UKI (bootc, origin key ``boot.digest``, which has the bare
    digits). Raises ``InvalidArgs`` for anything else.
    """

    hex: str

    def __post_init__(self) -> None:
        if not _SHA256_HEX.match(self.hex):
            raise InvalidArgs(f"boot digest {self.hex!r} is not of the form <64 hex digits>")

    def __str__(self) -> str:
        return "sha256:" + self.hex
