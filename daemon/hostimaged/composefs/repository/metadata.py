"""``meta.json``: what a repository says about itself.

Facts: composefs-rs 0.9, repository format. Nothing here does any I/O, and the file is never rewritten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm, FsVerityError
from hostimaged.errors import CorruptRepository, NotSupported, PreconditionFailed

FILE_NAME: Final = "meta.json"
#: Bytes of the file: it holds some 200.
MAX_SIZE: Final = 64 << 10

_VERSION: Final = 1
_MAX_VERSION: Final = (1 << 32) - 1
_V1_EROFS: Final = "v1_erofs"
_KNOWN_READ_ONLY_COMPATIBLE: Final = frozenset({_V1_EROFS})
_FEATURE_KINDS: Final = ("compatible", "read-only-compatible", "incompatible")


class Verity(StrEnum):
    """What a new repository wants of the file system."""

    #: fs-verity, or an error.
    REQUIRE = "require"
    #: fs-verity where the file system has it.
    OPPORTUNISTIC = "opportunistic"


class MetadataError(CorruptRepository):
    """meta.json of the repository is malformed: {detail}"""


class RepositoryMissing(PreconditionFailed):
    """there is no composefs repository at {path}"""


class OldRepository(NotSupported):
    """the repository at {path} was made by a composefs-rs before 0.7: it has objects but no meta.json"""

    hint = "upgrade it with 'python3 -m hostimaged.oci upgrade', or with any command of cfsctl 0.9"


class IncompatibleRepository(NotSupported):
    """the repository needs a newer program: {detail}"""


@dataclass(frozen=True, slots=True)
class FormatSet:
    """The EROFS formats that a repository wants images in: one that its names stand for, and others."""

    default: Format
    extra: tuple[Format, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", tuple(sorted(set(self.extra))))

    def in_order(self) -> tuple[Format, ...]:
        """Each format once, in the order in which images are made."""
        return (self.default, *(extra for extra in self.extra if extra != self.default))

    def __str__(self) -> str:
        return "+".join(format_.label for format_ in self.in_order())


#: Of a new repository.
DEFAULT_FORMATS: Final = FormatSet(Format.V1)
#: What the absence of ``erofs_formats`` means.
_LEGACY_FORMATS: Final = FormatSet(Format.V2)


@dataclass(frozen=True, slots=True)
class Metadata:
    """The parsed file. ``stored_formats`` is what is written there, ``formats`` what follows from it."""

    algorithm: Algorithm
    version: int = _VERSION
    compatible: tuple[str, ...] = ()
    read_only_compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()
    stored_formats: FormatSet = _LEGACY_FORMATS

    @classmethod
    def new(cls, algorithm: Algorithm, formats: FormatSet) -> Self:
        """For a new repository; tools that know only V2 are kept from writing into one of V1 by a flag."""
        flags = (_V1_EROFS,) if formats.default == Format.V1 else ()
        return cls(algorithm, read_only_compatible=flags, stored_formats=formats)

    @property
    def formats(self) -> FormatSet:
        """The effective formats."""
        if self.stored_formats == _LEGACY_FORMATS and _V1_EROFS in self.read_only_compatible:
            return FormatSet(Format.V1)
        return self.stored_formats

    @property
    def unknown_read_only_compatible(self) -> tuple[str, ...]:
        """Flags that forbid us to write."""
        return tuple(flag for flag in self.read_only_compatible if flag not in _KNOWN_READ_ONLY_COMPATIBLE)

    def __str__(self) -> str:
        return f"{self.algorithm.identifier}, {self.formats}"

    def check(self) -> None:
        """Raises ``IncompatibleRepository`` unless we may read the repository."""
        if self.version > _VERSION:
            raise IncompatibleRepository(f"its format version is {self.version}")
        if self.incompatible:
            raise IncompatibleRepository(f"it has the features {', '.join(self.incompatible)}")

    def render(self) -> bytes:
        """The file, as composefs-rs writes it to the byte."""
        formats: dict[str, Any] = {"default": int(self.stored_formats.default)}
        if self.stored_formats.extra:
            formats["extra"] = [int(extra) for extra in self.stored_formats.extra]
        features = (self.compatible, self.read_only_compatible, self.incompatible)
        document = {
            "version": self.version,
            "algorithm": self.algorithm.identifier,
            "features": {kind: list(flags) for kind, flags in zip(_FEATURE_KINDS, features, strict=True)},
            "erofs_formats": formats,
        }
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the file; unknown keys are ignored. Raises ``MetadataError``."""
        if len(data) > MAX_SIZE:
            raise MetadataError(f"longer than {MAX_SIZE} bytes")
        try:
            document = json.loads(data.decode(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise MetadataError("not JSON") from error
        if not isinstance(document, dict):
            raise MetadataError("not an object")
        version = _integer(document.get("version"), "version", _MAX_VERSION)
        try:
            algorithm = Algorithm.from_identifier(_string(document.get("algorithm"), "algorithm"))
        except FsVerityError as error:
            raise MetadataError(error.message) from None
        features = _member(document, "features", dict, {})
        compatible, read_only_compatible, incompatible = (
            tuple(_string(flag, kind) for flag in _member(features, kind, list, []))
            for kind in _FEATURE_KINDS
        )
        formats = _LEGACY_FORMATS
        if "erofs_formats" in document:
            formats = _formats(_member(document, "erofs_formats", dict, {}))
        return cls(algorithm, version, compatible, read_only_compatible, incompatible, formats)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MetadataError("a key occurs twice")
    return members


def _member(document: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = document.get(key, default)
    if not isinstance(value, kind):
        raise MetadataError(f"{key} is not of the right type")
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise MetadataError(f"{key} is not a string")
    return value


def _integer(value: Any, key: str, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise MetadataError(f"{key} is not a number from 0 to {limit}")
    return value


def _formats(document: dict[str, Any]) -> FormatSet:
    extra = _member(document, "extra", list, [])
    return FormatSet(_format(document.get("default")), tuple(_format(value) for value in extra))


def _format(value: Any) -> Format:
    return Format(_integer(value, "an EROFS format", max(Format)))
