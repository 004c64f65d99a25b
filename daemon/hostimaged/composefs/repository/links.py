"""The names of a repository as its garbage collector must see them: every one, whatever it is called.

``names`` leaves out what no program of ours would make. A collector may not: a reference with a name that is
not UTF-8 keeps its stream as any other, and a directory that cannot be read may hold any reference at all.
Names are text with surrogates for what is not UTF-8 (``os.fsdecode``).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import FsVerityError
from hostimaged.composefs.repository.names import REFS
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.errors import printable
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.composefs.fsverity import Algorithm
    from hostimaged.ids import ObjectId

STREAMS: Final = "streams"
IMAGES: Final = "images"
_TEXT: Final = f"../{OBJECTS}/"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY


@dataclass(slots=True)
class Links:
    """What is in ``streams`` or in ``images``, all paths being relative to the repository."""

    category: str
    #: Names in the directory, and the objects that they lead to; whether those are there is not looked at.
    entries: dict[str, ObjectId] = field(default_factory=dict)
    #: Names that lead to no object: other files, and links with another text.
    strange: set[str] = field(default_factory=set)
    #: Paths of references, and the names that they lead to, which need not be there.
    references: dict[str, str] = field(default_factory=dict)
    #: References whose way leads nowhere, though the name at its end may be there.
    broken: set[str] = field(default_factory=set)
    #: Directories that cannot be read, and why.
    unreadable: dict[str, str] = field(default_factory=dict)


def read_links(
    root: int, algorithm: Algorithm, category: str, *, without: frozenset[str], check: Callable[[], None]
) -> Links:
    """Everything in ``category`` of the repository open as ``root``, but the references ``without``.

    Never raises for what it finds. ``check`` is called once per directory and may raise. Without the
    exclusive lock, what others remove meanwhile may be missing.
    """
    links = Links(category)
    check()
    for name, is_link, _ in _listed(root, category, links):
        if name == REFS:
            continue
        id_ = _target(root, f"{category}/{name}", algorithm) if is_link else None
        if id_ is not None:
            links.entries[name] = id_
        else:
            links.strange.add(name)
    pending = [f"{category}/{REFS}"]
    while pending:
        directory = pending.pop()
        check()
        for name, is_link, is_directory in _listed(root, directory, links):
            path = f"{directory}/{name}"
            if is_directory:
                pending.append(path)
            elif is_link and path not in without:
                _add_reference(root, path, links)
    return links


def _listed(root: int, directory: str, links: Links) -> Iterator[tuple[str, bool, bool]]:
    """Entries of a directory, sorted: the name, whether it is a link, whether it is a directory."""
    try:
        fd = syscalls.open_beneath(root, directory, _DIRECTORY_FLAGS)
        try:
            with os.scandir(fd) as entries:
                found = [
                    (entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries
                ]
        finally:
            os.close(fd)
    except FileNotFoundError:
        return
    except OSError as error:
        links.unreadable[directory] = f"{printable(directory)} cannot be read: {error.strerror}"
        return
    yield from sorted(found)


def _target(root: int, path: str, algorithm: Algorithm) -> ObjectId | None:
    """The object that a link leads to; None if it leads to none."""
    with suppress(OSError, FsVerityError):
        text = os.readlink(path, dir_fd=root)
        if text.startswith(_TEXT):
            return fsverity.parse_hex(algorithm, text[len(_TEXT) :].replace("/", "", 1))
    return None


def _add_reference(root: int, path: str, links: Links) -> None:
    try:
        text = os.readlink(path, dir_fd=root)
    except FileNotFoundError:
        return
    except OSError as error:
        links.unreadable[path] = f"{printable(path)} cannot be read: {error.strerror}"
        return
    links.references[path] = text.rpartition("/")[2]
    if not leads_somewhere(root, path):
        links.broken.add(path)


def leads_somewhere(root: int, path: str) -> bool:
    """Whether a link leads to something; where that cannot be told, it may."""
    try:
        os.close(syscalls.open_beneath(root, path, os.O_PATH))
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True
