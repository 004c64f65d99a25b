"""A layer that is unpacked already into the repository: its files become objects where they lie.

The tar is put together from its parts and taken apart by the same rules as one that is fetched, so stream and
objects are the same. Its digest is that of every byte that went into an object or the stream.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import DigestMismatch, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.images import layer_stream
from hostimaged.oci.layer_parts import LayerSplitter
from hostimaged.oci.layer_store import LayerStore
from hostimaged.oci.tar import INLINE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import How, Repository, Sharing
    from hostimaged.ids import ObjectId
    from hostimaged.oci.entries import KeptEntries
    from hostimaged.oci.storage.layer import OpenFile
    from hostimaged.progress import Reporter


def import_unpacked(
    repository: Repository,
    parts: Iterator[bytes | OpenFile],
    diff_id: DiffId,
    reporter: Reporter,
    sharing: Sharing,
    kept: KeptEntries | None = None,
) -> tuple[ObjectId, dict[How, tuple[int, int]]]:
    """Store the tar that ``parts`` make up as the layer ``diff_id``: its stream id, and objects and bytes by
    how they were stored.

    Nothing is named unless all of it has that digest. Raises ``DigestMismatch``, ``UnsupportedImage``,
    ``SharingImpossible``, and what ``parts`` and ``repository`` raise.
    """
    gathered = kept.gather() if kept is not None else None
    noticed = gathered.add_object if gathered is not None else None
    with (
        repository.new_stream(ContentType.LAYER) as writer,
        LayerStore(repository, writer, reporter, None, noticed) as store,
    ):
        reader = _Reader(parts, store, sharing, reporter)
        splitter = LayerSplitter(reader.fetch, store.add, reader.take)
        try:
            splitter.run(gathered.add if gathered is not None else None)
        except UnsupportedImage as error:
            # Is it what was asked for? If not, that is the true error.
            reader.drain()
            reader.check(diff_id)
            raise UnsupportedImage(f"layer {diff_id}: {error.message}") from error
        reader.check(diff_id)
        store.finish()
        reporter.at("layer.verified")
        stream_id = repository.write_stream(layer_stream(diff_id), writer)
    if kept is not None and gathered is not None:
        kept.keep(stream_id, gathered)
    return stream_id, store.how


class _Reader:
    """Gives bytes to the one who takes the tar apart, files to the store, and all of it to the hash."""

    def __init__(
        self, parts: Iterator[bytes | OpenFile], store: LayerStore, sharing: Sharing, reporter: Reporter
    ) -> None:
        self._parts = parts
        self._store = store
        self._sharing = sharing
        self._reporter = reporter
        self._hash = hashlib.sha256()

    def fetch(self) -> Buffer | None:
        """The next bytes; those of files are among them if they stay in the stream."""
        self._reporter.at("layer.read")
        part = next(self._parts, None)
        if part is None:
            return None
        if not isinstance(part, bytes):
            if part.size > INLINE_MAX:
                raise UnsupportedImage("a content is where it should not be")
            part = os.pread(part.fd, part.size, 0)
        self._hash.update(part)
        return part

    def take(self, size: int) -> None:
        """Store the file that comes next, whose content has ``size`` bytes."""
        part = next(self._parts, None)
        if part is None or isinstance(part, bytes) or part.size != size:
            raise UnsupportedImage("a content is not where it should be")
        self._store.add_file(part.fd, size, self._sharing, self._hash.update)

    def drain(self) -> None:
        """Hash what is left."""
        for part in self._parts:
            self._reporter.at("layer.read")
            if isinstance(part, bytes):
                self._hash.update(part)
                continue
            at = 0
            while piece := os.pread(part.fd, min(part.size - at, 1 << 20), at):
                self._hash.update(piece)
                at += len(piece)

    def check(self, diff_id: DiffId) -> None:
        """Raises ``DigestMismatch`` unless everything so far is the tar ``diff_id``."""
        actual = DiffId.of_hash(self._hash.hexdigest())
        if actual != diff_id:
            raise DigestMismatch(what="uncompressed layer", expected=diff_id, actual=actual)
