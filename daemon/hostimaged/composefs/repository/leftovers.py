"""What programs that were killed left under temporary names in a repository: links and objects on their way.

Facts: composefs-rs 0.9, repository layout, whose own collector leaves them; ours are named alike.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.errors import from_os_error
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.repository.repository import Repository

_LINK: Final = re.compile(r"\.symlink-[A-Za-z0-9]+\Z")
_OBJECT: Final = re.compile(r"\.tmp-object-[A-Za-z0-9]+\Z")


def remove_leftovers(repository: Repository) -> int:
    """Remove them; says how many there were.

    The exclusive lock is held: whoever is at work has the shared one. Raises as ``sweep`` does.
    """
    removed = 0
    try:
        for path in _leftovers(repository.fileno()):
            os.unlink(path, dir_fd=repository.fileno())
            removed += 1
    except OSError as error:
        raise from_os_error(error, "cannot remove temporary names from the repository") from error
    return removed


def _leftovers(root: int) -> Iterator[str]:
    for directory, pattern in ((".", _LINK), (OBJECTS, _OBJECT)):
        try:
            fd = syscalls.open_beneath(root, directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        yield from (f"{directory}/{name}" for name in names if pattern.match(name))
