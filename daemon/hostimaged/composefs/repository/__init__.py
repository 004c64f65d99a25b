"""A composefs repository on disk: objects, streams, images, and the names that lead to them."""

from __future__ import annotations

from hostimaged.composefs.repository.metadata import (
    FormatSet,
    IncompatibleRepository,
    MetadataError,
    OldRepository,
    RepositoryMissing,
    Verity,
)
from hostimaged.composefs.repository.objects import ObjectMissing, ObjectWriter, Stored
from hostimaged.composefs.repository.repository import DEFAULT_LOCK_TIMEOUT, Repository, StreamMissing
from hostimaged.composefs.repository.store_pool import PoolWriter, Slot, StorePool
from hostimaged.composefs.repository.verity import VerityUnavailable

__all__ = [
    "DEFAULT_LOCK_TIMEOUT",
    "FormatSet",
    "IncompatibleRepository",
    "MetadataError",
    "ObjectMissing",
    "ObjectWriter",
    "OldRepository",
    "PoolWriter",
    "Repository",
    "RepositoryMissing",
    "Slot",
    "StorePool",
    "Stored",
    "StreamMissing",
    "Verity",
    "VerityUnavailable",
]
