"""Paths in a layer: their limits, and the names they consist of."""

from __future__ import annotations

from typing import Final

from hostimaged.errors import UnsupportedImage

#: PATH_MAX of Linux: nothing can open a longer path in one call, and it bounds what each entry costs.
MAX_PATH: Final = 4096
#: Directory levels; with one byte a name MAX_PATH allows 2048. Bounds every walk of the tree.
MAX_DEPTH: Final = 2000
#: A name in a directory: NAME_MAX of Linux, EROFS_NAME_LEN of the image format.
MAX_NAME: Final = 255

#: What the name of a whiteout begins with (OCI image layer specification).
WHITEOUT: Final = b".wh."


def split_path(path: bytes) -> list[bytes]:
    """The names in a path, without empty ones and ``.``; an empty list means the root."""
    return [name for name in path.split(b"/") if name and name != b"."]


def check_path(path: bytes) -> None:
    """Raise ``UnsupportedImage`` for a path that is empty, too long or too deep, has NUL or leads upwards."""
    if not path:
        raise UnsupportedImage("an empty path")
    if len(path) > MAX_PATH:
        raise UnsupportedImage(f"a path of {len(path)} bytes, the limit is {MAX_PATH}")
    if b"\0" in path:
        raise UnsupportedImage(f"{path!r} has a NUL byte")
    if b".." in path and b".." in path.split(b"/"):
        raise UnsupportedImage(f"{path!r} leads upwards")
    if len(path) > MAX_NAME:
        _check_names(split_path(path))


def _check_names(names: list[bytes]) -> None:
    if len(names) > MAX_DEPTH:
        raise UnsupportedImage(f"a path of {len(names)} levels, the limit is {MAX_DEPTH}")
    if names and max(map(len, names)) > MAX_NAME:
        names[-1] = names[-1].removeprefix(WHITEOUT)
        if max(map(len, names)) > MAX_NAME:
            raise UnsupportedImage(f"a name of over {MAX_NAME} bytes")
