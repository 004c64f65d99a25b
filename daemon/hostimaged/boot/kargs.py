"""Kernel arguments that an image brings along (``/usr/lib/bootc/kargs.d/*.toml``), and what updates change.

Type 1 only: those of a unified kernel image are inside it.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.cmdline import Cmdline, Parameter, split
from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.boot.files import ImageFiles

DIRECTORY: Final = "/usr/lib/bootc/kargs.d"
#: Files of an image; each has a handful of arguments.
MAX_FILES: Final = 256
#: Bytes of one file: the time that parsing TOML takes grows with the square of some inputs.
MAX_SIZE: Final = 16 << 10
#: Characters of all arguments of an image, of the few KiB that a kernel takes.
MAX_LENGTH: Final = 16 << 10

_KEYS: Final = frozenset({"kargs", "match-architectures"})
#: Names of architectures by those of OCI and the kernel, as files name them: as Rust does.
_RUST_NAMES: Final = {
    "386": "x86",
    "amd64": "x86_64",
    "arm64": "aarch64",
    "i686": "x86",
    "loong64": "loongarch64",
    "ppc64le": "powerpc64",
}


def rust_architecture(name: str) -> str:
    """The name that ``match-architectures`` has for an architecture of OCI or of ``uname -m``."""
    return _RUST_NAMES.get(name, name)


def read_kargs(files: ImageFiles, architecture: str) -> tuple[str, ...]:
    """The arguments of an image for an architecture (named as by OCI, ``uname -m`` or Rust), in order.

    Files are read in the order of their names; what is there already is not repeated. Raises
    ``UnsupportedImage`` naming the file that is not as bootc reads it, or that names a deployment.
    """
    names = [name for name in files.names(DIRECTORY) if name.endswith(b".toml")]
    if len(names) > MAX_FILES:
        raise UnsupportedImage(f"{DIRECTORY} has more than {MAX_FILES} files")
    found: dict[Parameter, None] = {}
    total = 0
    for name in names:
        path = f"{DIRECTORY}/{name.decode('utf-8', 'surrogateescape')}"
        data = files.read(path, MAX_SIZE)
        if data is None:
            continue
        for parameter in parse_file(data, path, rust_architecture(architecture)):
            if parameter not in found:
                found[parameter] = None
                total += len(parameter.raw) + 1
        if total > MAX_LENGTH:
            raise UnsupportedImage(f"{DIRECTORY} has more than {MAX_LENGTH} characters of arguments")
    return tuple(parameter.raw for parameter in found)


def parse_file(data: bytes, path: str, architecture: str) -> list[Parameter]:
    """The arguments of one file, none if it is for other architectures; raises ``UnsupportedImage``."""
    document = _document(data, path)
    unknown = sorted(document.keys() - _KEYS)
    if unknown:
        raise UnsupportedImage(f"{path}: unknown key {unknown[0]}")
    architectures = document.get("match-architectures")
    if architectures is not None and architecture not in _strings(architectures, path, "match-architectures"):
        return []
    if "kargs" not in document:
        raise UnsupportedImage(f"{path}: kargs is missing")
    items = _strings(document["kargs"], path, "kargs")
    return [_checked(raw, path) for item in items for raw in split(item)]


def _document(data: bytes, path: str) -> dict[str, Any]:
    if len(data) > MAX_SIZE:
        raise UnsupportedImage(f"{path}: longer than {MAX_SIZE} bytes")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise UnsupportedImage(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise UnsupportedImage(f"{path}: nested too deeply") from None


def _strings(value: object, path: str, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UnsupportedImage(f"{path}: {key} is not an array of strings")
    return value


def _checked(raw: str, path: str) -> Parameter:
    parameter = Parameter(raw)
    # A line break within quotes would add a line to the boot entry.
    if not raw.isprintable() or raw.count('"') % 2:
        raise UnsupportedImage(f"{path}: kernel argument {raw!r} is not printable or has an open quote")
    if parameter.names_deployment:
        raise UnsupportedImage(f"{path}: an image cannot set the kernel argument {parameter.key}")
    return parameter


def diff_kargs(old: Iterable[str], new: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an update adds and what it removes, by the arguments of the booted and of the new image."""
    before = [Parameter(raw) for raw in old]
    after = [Parameter(raw) for raw in new]
    added = tuple(p.raw for p in after if p not in before)
    return added, tuple(p.raw for p in before if p not in after)


def apply(cmdline: Cmdline, old: Iterable[str], new: Iterable[str]) -> Cmdline:
    """The command line after an update: the difference is applied, everything else stays as it is."""
    added, removed = diff_kargs(old, new)
    return cmdline.removing(map(Parameter, removed)).adding(map(Parameter, added))
