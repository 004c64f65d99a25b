"""The packages that an image says it is made of: from the database of dpkg or of rpm.

Read only to compare images. An image without either has no packages; a damaged database is an error. Facts:
dpkg's status file (deb-control(5)); rpm 4.16 and later, ``rpmdb.sqlite`` with a header for each package.
"""

from __future__ import annotations

import os
import re
import sqlite3
import struct
from contextlib import closing
from typing import TYPE_CHECKING, Final

from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.files import ImageFiles

#: Versions by name and architecture; a kernel is installed more than once.
Packages = dict[str, frozenset[str]]

_DPKG: Final = ("var/lib/dpkg/status", "usr/lib/sysimage/dpkg/status", "usr/lib/dpkg/status")
_RPM: Final = (
    "usr/lib/sysimage/rpm/rpmdb.sqlite",
    "usr/share/rpm/rpmdb.sqlite",
    "var/lib/rpm/rpmdb.sqlite",
)
#: A desktop's has 4 MiB.
MAX_STATUS: Final = 64 << 20
#: A desktop has 3,000.
MAX_PACKAGES: Final = 100_000
#: Bytes of a package's header: one with 100,000 files has 20 MiB.
MAX_HEADER: Final = 64 << 20
#: Bytes of a name, version or architecture.
MAX_TEXT: Final = 256
#: Instructions of SQLite's machine, in steps: a hostile schema must end. 100,000 headers need a tenth.
_STEP: Final = 100_000
_MAX_STEPS: Final = 1000

_HEADER: Final = struct.Struct(">II")
_INDEX: Final = struct.Struct(">IIII")
_NAME, _VERSION, _RELEASE, _EPOCH, _ARCHITECTURE = 1000, 1001, 1002, 1003, 1022
_INT32, _STRING = 4, 6
_MAX_INDEX: Final = 4096
_FIELD: Final = re.compile(rb"^(Package|Version|Architecture|Status):[ \t]*(.*)$", re.MULTILINE)


def read_packages(files: ImageFiles) -> Packages:
    """The packages of an image; none if it has no database that is known.

    Raises ``UnsupportedImage`` for a damaged one, and as ``ImageFiles`` do.
    """
    for path in _RPM:
        fd = files.open(path)
        if fd is not None:
            try:
                return _collected(_rpm(fd, path))
            finally:
                os.close(fd)
    for path in _DPKG:
        data = files.read(path, MAX_STATUS)
        if data is not None:
            return _collected(_dpkg(data))
    return {}


def _collected(found: Iterator[tuple[str, str]]) -> Packages:
    packages: dict[str, set[str]] = {}
    for number, (name, version) in enumerate(found):
        if number >= MAX_PACKAGES:
            raise UnsupportedImage(f"the image has more than {MAX_PACKAGES} packages")
        packages.setdefault(name, set()).add(version)
    return {name: frozenset(versions) for name, versions in packages.items()}


def _text(value: bytes) -> str:
    return value[:MAX_TEXT].decode("utf-8", "backslashreplace").strip()


def _dpkg(data: bytes) -> Iterator[tuple[str, str]]:
    for stanza in re.split(rb"\n[ \t]*\n", data):
        fields = {name: _text(value) for name, value in _FIELD.findall(stanza)}
        if b"Package" in fields and fields.get(b"Status", "").endswith(" installed"):
            name = fields[b"Package"]
            architecture = fields.get(b"Architecture", "")
            yield f"{name}:{architecture}" if architecture else name, fields.get(b"Version", "")


def _rpm(fd: int, path: str) -> Iterator[tuple[str, str]]:
    # Immutable: no lock, no journal, and nothing beside the file is looked for.
    with closing(
        sqlite3.connect(f"file:/proc/self/fd/{fd}?mode=ro&immutable=1", uri=True, isolation_level=None)
    ) as database:
        steps = iter(range(_MAX_STEPS))
        database.set_progress_handler(lambda: next(steps, None) is None, _STEP)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_HEADER)
        try:
            database.execute("PRAGMA trusted_schema = OFF")
            for (blob,) in database.execute("SELECT blob FROM Packages"):
                if isinstance(blob, bytes) and (package := _header(blob)) is not None:
                    yield package
        except sqlite3.Error as error:
            raise UnsupportedImage(f"{path} of the image cannot be read: {error}") from None


def _header(blob: bytes) -> tuple[str, str] | None:
    """Name with architecture, and version, of a package; None for what is no header, or a key."""
    if len(blob) < _HEADER.size:
        return None
    count, size = _HEADER.unpack_from(blob)
    data_at = _HEADER.size + count * _INDEX.size
    if count > _MAX_INDEX or data_at + size > len(blob):
        return None
    data = memoryview(blob)[data_at : data_at + size]
    values = {
        tag: (kind, offset)
        for tag, kind, offset, _ in _INDEX.iter_unpack(blob[_HEADER.size : data_at])
        if tag in (_NAME, _VERSION, _RELEASE, _EPOCH, _ARCHITECTURE)
    }
    texts = {tag: _string(data, offset) for tag, (kind, offset) in values.items() if kind == _STRING}
    if not texts.get(_NAME):
        return None
    version = f"{texts.get(_VERSION, '')}-{texts.get(_RELEASE, '')}"
    kind, offset = values.get(_EPOCH, (0, 0))
    if kind == _INT32 and offset + 4 <= len(data):
        version = f"{int.from_bytes(data[offset : offset + 4], 'big')}:{version}"
    architecture = texts.get(_ARCHITECTURE, "")
    return f"{texts[_NAME]}.{architecture}" if architecture else texts[_NAME], version


def _string(data: memoryview, offset: int) -> str:
    return _text(bytes(data[offset : offset + MAX_TEXT]).partition(b"\0")[0])
