"""Under which name an image is in the store of the host: what ``podman run`` calls it."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from hostimaged.oci.reference import ImageReference, Transport
from hostimaged.oci.storage.places import StorageName

#: Names without a registry; podman, too, puts images of layouts and archives below it.
_LOCAL: Final = "localhost"
_STRANGE: Final = re.compile(r"[^a-z0-9]+")
_DIGITS: Final = 12


def name_in_store(reference: ImageReference) -> str:
    """The name of ``reference`` in the store, in normal form.

    That of its registry where it has one (bootc). podman makes one name of all tags of a layout, so an image
    of a layout, an archive or a directory has one that tells them apart: the name of the file, and as tag
    digits of the digest of the whole reference.
    """
    if reference.named is not None:
        return str(reference.named)
    if reference.transport is Transport.CONTAINERS_STORAGE and (name := StorageName.of(reference).name):
        return name
    path = reference.name.partition(":")[0] if reference.name.startswith("/") else ""
    file = _STRANGE.sub("-", path.rpartition("/")[2].lower()).strip("-") or "image"
    digits = hashlib.sha256(str(reference).encode()).hexdigest()[:_DIGITS]
    return f"{_LOCAL}/{reference.transport}/{file}:{digits}"
