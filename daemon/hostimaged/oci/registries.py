"""Whether registries.conf lets an image be fetched without verified TLS (containers-registries.conf(5)).

Only that is read here: skopeo reads the same files to find registries and mirrors. The rules of look-up are
those of containers-image 5; what its versions read differently is taken the stricter way. The format of
version 1 is refused.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from hostimage_dbus.errors import ErrorName
from hostimaged.errors import HostimageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from hostimaged.oci.reference import NamedImage

#: The list of short names that distributions ship is 30 KiB.
MAX_FILE: Final = 1 << 20
#: Drop-ins are one per registry or per product.
MAX_DROP_INS: Final = 256

_REGISTRY_KEYS: Final = frozenset(
    {"prefix", "location", "insecure", "blocked", "mirror", "mirror-by-digest-only"}
)
_MIRROR_KEYS: Final = frozenset({"location", "insecure", "pull-from-mirror"})


class RegistriesError(HostimageError):
    """registries configuration {file}: {detail}"""

    name = ErrorName.PRECONDITION_FAILED


class _Malformed(ValueError):
    """Not the form of containers-registries.conf(5)."""


@dataclass(frozen=True, slots=True)
class Registries:
    """The ``[[registry]]`` tables that count: for each prefix whether it or a mirror of it is insecure."""

    insecure: dict[str, bool]

    @classmethod
    def load(cls, file: Path, drop_ins: Path) -> Self:
        """Read the file and then the ``*.conf`` files of the directory; either may be missing.

        A table in a later file replaces the one of the same prefix. Raises ``RegistriesError`` for what
        cannot be read or understood.
        """
        insecure: dict[str, bool] = {}
        for path in (file, *_conf_files(drop_ins)):
            insecure |= _read(path)
        return cls(insecure)

    def verifies(self, image: NamedImage) -> bool:
        """Whether TLS is verified with every server that ``image`` may be fetched from."""
        # Versions differ in whether tag and digest take part in the match.
        return not any(self._is_insecure(name) for name in (image.repository, str(image)))

    def _is_insecure(self, name: str) -> bool:
        matching = [prefix for prefix in self.insecure if _matches(name, prefix)]
        longest = max(map(len, matching), default=0)
        return any(self.insecure[prefix] for prefix in matching if len(prefix) == longest)


def _matches(name: str, prefix: str) -> bool:
    """containers-image's match of an image name with a prefix, which may begin with ``*.``."""
    if prefix.startswith("*."):
        start = name.find(prefix[1:])
        end = start + len(prefix) - 1
        if start < 0 or "/" in name[:start]:
            return False
    else:
        end = len(prefix)
        if not name.startswith(prefix):
            return False
    # A port counts as what follows a host: "example.com" means example.com:5000 as well.
    return end == len(name) or name[end] in ":/@"


def _conf_files(directory: Path) -> Sequence[Path]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".conf"))
        found = [directory / name for name in names if not stat.S_ISDIR(os.lstat(directory / name).st_mode)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RegistriesError(f"cannot be read: {error.strerror}", file=directory) from None
    if len(found) > MAX_DROP_INS:
        raise RegistriesError(f"more than {MAX_DROP_INS} files", file=directory)
    return found


def _read(file: Path) -> dict[str, bool]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RegistriesError(f"cannot be read: {error.strerror}", file=file) from None
    if len(raw) > MAX_FILE:
        raise RegistriesError(f"larger than {MAX_FILE} bytes", file=file)
    try:
        return _tables(tomllib.loads(raw.decode()))
    except (ValueError, RecursionError) as error:
        raise RegistriesError(str(error) or "nested too deeply", file=file) from None


def _tables(document: dict[str, Any]) -> dict[str, bool]:
    """The registries of one file; raises ``_Malformed``."""
    top = _folded(document)
    if "registries" in top:
        raise _Malformed("the format of version 1 is not supported")
    found: dict[str, bool] = {}
    for table in _list(top.get("registry", []), "registry"):
        prefix, insecure = _registry(table)
        # Of two tables with one prefix the first counts; the stricter reading is that both do.
        found[prefix] = found.get(prefix, False) or insecure
    return found


def _registry(table: dict[str, Any]) -> tuple[str, bool]:
    fields = _known(table, _REGISTRY_KEYS, "registry")
    location = _location(fields.get("location", ""))
    prefix = _location(fields.get("prefix", "")) or location
    if not prefix or (not location and not prefix.startswith("*.")):
        raise _Malformed("a registry has no location")
    if prefix.startswith("*.") and any(c in prefix for c in "/@:"):
        raise _Malformed("a prefix with *. has more than a domain")
    insecure = _bool(fields.get("insecure", False))
    for mirror in _list(fields.get("mirror", []), "mirror"):
        of_mirror = _known(mirror, _MIRROR_KEYS, "mirror")
        if not _location(of_mirror.get("location", "")):
            raise _Malformed("a mirror has no location")
        insecure = _bool(of_mirror.get("insecure", False)) or insecure
    return prefix, insecure


def _folded(table: Any) -> dict[str, Any]:
    # The TOML decoder of containers-image takes keys in any case.
    if not isinstance(table, dict):
        raise _Malformed("a table is expected")
    folded = {key.casefold(): value for key, value in table.items()}
    if len(folded) != len(table):
        raise _Malformed("keys that differ in case only")
    return folded


def _known(table: Any, keys: Iterable[str], what: str) -> dict[str, Any]:
    # An unknown key may be a later version's way to switch verification off.
    fields = _folded(table)
    if unknown := sorted(fields.keys() - keys):
        raise _Malformed(f"a {what} has an unknown key {unknown[0][:64]!a}")
    return fields


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed(f"{what} is no array of tables")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Malformed("insecure is neither true nor false")
    return value


def _location(value: Any) -> str:
    if not isinstance(value, str):
        raise _Malformed("a location or prefix is no string")
    if value.startswith(("http://", "https://")):
        raise _Malformed("a location or prefix has a scheme")
    return value.rstrip("/")
