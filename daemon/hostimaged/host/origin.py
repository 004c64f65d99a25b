"""The origin of a deployment: which image it came from, how it boots (``state/deploy/<id>/<id>.origin``).

Facts: deployments.md 4 (bootc 1.16, its INI library tini 1.3). Nothing here reads or writes files, save
``read_origin``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self, TypeVar

from hostimaged.boot.resources import BootType
from hostimaged.errors import DamagedState, HostimageError, InvalidArgs
from hostimaged.host.imgref import OriginReference
from hostimaged.host.statefile import read_state_file
from hostimaged.ids import BootDigest, DeploymentId, ManifestDigest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: An origin has a few hundred bytes; a reference may have 4 KiB.
MAX_SIZE: Final = 64 << 10
#: Where bootc's reader cuts a line off, wherever it stands (tini 1.3): such a value cannot be written.
_COMMENT: Final = re.compile(r"[;#]")
_UNWRITABLE: Final = re.compile(r"[;#\r\n\ud800-\udfff]")

_ORIGIN: Final = "origin"
_BOOT: Final = "boot"
_IMAGE: Final = "image"
#: Our own section: bootc keeps what it does not know.
OWN: Final = "hostimaged"
_REFERENCE: Final = "container-image-reference"
_BOOT_TYPE: Final = "boot_type"
_DIGEST: Final = "digest"
_MANIFEST: Final = "manifest_digest"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Origin:
    """An origin: its sections in their order, and what we understand of them.

    A value that is there and makes no sense is None, with a sentence in ``problems``; one that is missing is
    None. ``reference`` and ``boot_type`` are in every origin that bootc wrote, ``boot_digest`` not in old
    ones with a UKI, ``manifest_digest`` not in those from before May 2026.
    """

    sections: Mapping[str, Mapping[str, str]]
    reference: OriginReference | None = None
    boot_type: BootType | None = None
    boot_digest: BootDigest | None = None
    manifest_digest: ManifestDigest | None = None
    problems: tuple[str, ...] = field(default=())

    @classmethod
    def new(
        cls,
        reference: OriginReference,
        boot_type: BootType,
        boot_digest: BootDigest,
        manifest_digest: ManifestDigest,
        own: Mapping[str, str] | None = None,
    ) -> Self:
        """The origin of a new deployment; ``own`` goes into our own section. Raises ``InvalidArgs``."""
        sections = {
            _ORIGIN: {_REFERENCE: str(reference)},
            _BOOT: {_BOOT_TYPE: str(boot_type), _DIGEST: boot_digest.hex},
            _IMAGE: {_MANIFEST: str(manifest_digest)},
        }
        return cls._of(_writable(sections | ({OWN: dict(own)} if own else {})))

    @classmethod
    def parse(cls, data: bytes, name: str) -> Self:
        """The origin in ``data``; ``name`` stands in messages.

        Raises ``DamagedState`` for what is no such file at all.
        """
        if len(data) > MAX_SIZE:
            raise DamagedState(f"larger than {MAX_SIZE} bytes", file=name)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedState("it is not UTF-8", file=name) from None
        sections: dict[str, dict[str, str]] = {}
        current = ""
        for number, line in enumerate(text.split("\n"), 1):
            content = _COMMENT.split(line, maxsplit=1)[0].strip()
            if not content:
                continue
            if content.startswith("["):
                if not content.endswith("]"):
                    raise DamagedState(f"line {number} is no section", file=name)
                current = content.strip("[]")
                sections.setdefault(current, {})
                continue
            key, equals, value = (part.strip() for part in content.partition("="))
            if not equals or not key:
                raise DamagedState(f"line {number} is no key with a value", file=name)
            sections.setdefault(current, {})[key] = value
        return cls._of(sections)

    @classmethod
    def _of(cls, sections: Mapping[str, Mapping[str, str]]) -> Self:
        problems: list[str] = []

        def get(section: str, key: str, kind: Callable[[str], _T]) -> _T | None:
            value = sections.get(section, {}).get(key)
            if value is None:
                return None
            try:
                return kind(value)
            except (HostimageError, ValueError):
                problems.append(f"{section}.{key} of its origin is not valid")
                return None

        return cls(
            sections=sections,
            reference=get(_ORIGIN, _REFERENCE, OriginReference.parse),
            boot_type=get(_BOOT, _BOOT_TYPE, BootType),
            boot_digest=get(_BOOT, _DIGEST, BootDigest),
            manifest_digest=get(_IMAGE, _MANIFEST, ManifestDigest),
            problems=tuple(problems),
        )

    @property
    def own(self) -> Mapping[str, str]:
        """What our own section has."""
        return self.sections.get(OWN, {})

    def with_manifest_digest(self, digest: ManifestDigest) -> Self:
        """A copy that names its manifest."""
        return self._with(_IMAGE, {_MANIFEST: str(digest)})

    def with_boot_digest(self, digest: BootDigest) -> Self:
        """A copy with this boot digest."""
        return self._with(_BOOT, {_DIGEST: digest.hex})

    def with_reference(self, reference: OriginReference) -> Self:
        """A copy that follows another image."""
        return self._with(_ORIGIN, {_REFERENCE: str(reference)})

    def with_own(self, values: Mapping[str, str]) -> Self:
        """A copy with these values in our own section, besides those it has. Raises ``InvalidArgs``."""
        return self._with(OWN, values)

    def _with(self, section: str, values: Mapping[str, str]) -> Self:
        changed = {**self.sections.get(section, {}), **values}
        return self._of(_writable({**self.sections, section: changed}))

    def serialise(self) -> bytes:
        """The bytes of the file, as bootc writes it: without the newline that would end it."""
        parts = (
            f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
            for section, values in self.sections.items()
        )
        return "\n".join(parts).removesuffix("\n").encode()


def _writable(sections: Mapping[str, Mapping[str, str]]) -> Mapping[str, Mapping[str, str]]:
    """Itself, if bootc would read what is meant; raises ``InvalidArgs``."""
    for section, values in sections.items():
        for text in (section, *values, *values.values()):
            if _UNWRITABLE.search(text):
                raise InvalidArgs(f"{text!r} cannot be written into an origin: it has ; or # or a line break")
    return sections


def origin_name(id_: DeploymentId) -> str:
    """File name of the origin of ``id_`` in its directory."""
    return f"{id_}.origin"


def read_origin(directory: int, id_: DeploymentId) -> Origin | None:
    """The origin in the state directory open as ``directory``; None if it has none.

    Raises ``DamagedState`` or ``StorageError``.
    """
    name = origin_name(id_)
    data = read_state_file(directory, name, MAX_SIZE)
    return None if data is None else Origin.parse(data, name)
