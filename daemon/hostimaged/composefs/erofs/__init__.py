"""composefs images: an EROFS file system that holds metadata and small files, and names the objects.

Made from a tree by ``build``, read back by ``Image``. Images are not mounted here. Writer and reader are
imported when first used: most users of this package want only ``Format``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.composefs.erofs.format import ErofsError, Format, UnsupportedTree

if TYPE_CHECKING:
    from hostimaged.composefs.erofs.reader import Image, possible_objects
    from hostimaged.composefs.erofs.writer import build

__all__ = ["ErofsError", "Format", "Image", "UnsupportedTree", "build", "possible_objects"]


def __getattr__(name: str) -> object:
    if name == "build":
        from hostimaged.composefs.erofs.writer import build

        return build
    if name in ("Image", "possible_objects"):
        from hostimaged.composefs.erofs import reader

        return getattr(reader, name)
    raise AttributeError(name)
