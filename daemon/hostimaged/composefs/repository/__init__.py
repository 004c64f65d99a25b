"""A composefs repository on disk: objects, streams, images, and the names that lead to them.

Not here: ``store_pool``, which only what stores many objects imports.
"""

from __future__ import annotations

from hostimaged.composefs.repository.metadata import (
    FormatSet,
    IncompatibleRepository,
    MetadataError,
    OldRepository,
    RepositoryMissing,
    Verity,
)
from hostimaged.composefs.repository.objects import ObjectMissing, ObjectWriter
from hostimaged.composefs.repository.repository import DEFAULT_LOCK_TIMEOUT, Repository, StreamMissing
from hostimaged.composefs.repository.sharing import ChangedWhileRead, Shareable, SharingImpossible
from hostimaged.composefs.repository.stored import How, Sharing, Stored
from hostimaged.composefs.repository.verity import VerityUnavailable

__all__ = [
    "DEFAULT_LOCK_TIMEOUT",
    "ChangedWhileRead",
    "FormatSet",
    "How",
    "IncompatibleRepository",
    "MetadataError",
    "ObjectMissing",
    "ObjectWriter",
    "OldRepository",
    "Repository",
    "RepositoryMissing",
    "Shareable",
    "Sharing",
    "SharingImpossible",
    "Stored",
    "StreamMissing",
    "Verity",
    "VerityUnavailable",
]
