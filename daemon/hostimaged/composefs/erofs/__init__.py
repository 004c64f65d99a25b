"""composefs images: an EROFS file system that holds metadata and small files, and names the objects.

Made from a tree by ``build``, read back by ``Image``. Images are not mounted here.
"""

from __future__ import annotations

from hostimaged.composefs.erofs.format import Format

__all__ = ["Format"]
