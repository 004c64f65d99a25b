"""Where stores are: what a reference says, or the usual places (composefs-rs 0.9, containers-storage)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from hostimaged.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.oci.reference import ImageReference

_SPECIFIER: Final = re.compile(
    r"\[(?:(?P<driver>[a-z0-9]*)@)?(?P<root>/[^+:\]]*)(?:\+(?P<run>[^:\]]*))?(?::(?P<options>[^\]]*))?\]"
)
_ID: Final = re.compile(r"@([0-9a-f]{64})\Z")
#: The one driver whose layers are plain directories beside each other.
DRIVER: Final = "overlay"
_ADDITIONAL: Final = "additionalimagestore="


@dataclass(frozen=True, slots=True)
class StorageName:
    """What a ``containers-storage:`` reference names. ``root`` None: the usual places.

    ``name`` is a name in full, or "" where only ``image_id``, 64 hex digits or "", is given.
    """

    root: Path | None
    name: str
    image_id: str

    @classmethod
    def of(cls, reference: ImageReference) -> Self:
        """The parts of ``reference``; raises ``NotSupported`` for a store that this program cannot read."""
        text = reference.name
        root = None
        if text.startswith("["):
            found = _SPECIFIER.match(text)
            if found is None:
                raise NotSupported(f"{reference}: the store must be given as [overlay@/path]")
            if found["driver"] not in (None, "", DRIVER):
                raise NotSupported(f"{reference}: only stores of the overlay driver can be read")
            root = Path(found["root"])
            text = text[found.end() :]
        image_id = ""
        if at := _ID.search(text):
            image_id = at[1]
            text = text[: at.start()]
        return cls(root, text, image_id)


def default_roots(environment: Mapping[str, str], system: Path) -> tuple[Path, ...]:
    """Roots of the stores to look into, first to last; not all need exist.

    ``system`` is root's own; those that are named as additional ones come last.
    """
    found: list[Path] = []
    if root := environment.get("CONTAINERS_STORAGE_ROOT"):
        found.append(Path(root))
    if home := environment.get("HOME"):
        if data := environment.get("XDG_DATA_HOME"):
            found.append(Path(data) / "containers/storage")
        found.append(Path(home) / ".local/share/containers/storage")
    found.append(system)
    options = (option.strip() for option in environment.get("STORAGE_OPTS", "").split(","))
    found += [Path(option.removeprefix(_ADDITIONAL)) for option in options if option.startswith(_ADDITIONAL)]
    return tuple(dict.fromkeys(path for path in found if path.is_absolute()))
