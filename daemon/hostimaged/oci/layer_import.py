"""A layer's tar into the repository: file contents become objects, the rest a splitstream.

composefs-rs 0.9, splitstream: the stream gives the tar back bit for bit, whatever is in it. Not here: where
the bytes come from and how they are compressed; what the entries mean (``filesystem``).
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import DigestMismatch, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.images import layer_stream
from hostimaged.oci.layer_parts import LayerSplitter
from hostimaged.oci.layer_store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Iterable
    from hashlib import _Hash

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.repository.store_pool import StorePool
    from hostimaged.ids import ObjectId
    from hostimaged.oci.entries import KeptEntries, LayerEntries
    from hostimaged.progress import Reporter


@dataclass(frozen=True, slots=True)
class ImportedLayer:
    """What an import did. Sizes in bytes.

    ``size`` is that of the tar; objects are counted once for each entry, as new or as present already.
    """

    diff_id: DiffId
    stream_id: ObjectId
    size: int
    entries: int
    inline_bytes: int
    objects_new: int
    objects_present: int
    bytes_new: int
    bytes_present: int


def import_layer(
    repository: Repository,
    pieces: Iterable[Buffer],
    diff_id: DiffId,
    reporter: Reporter,
    pool: StorePool | None = None,
    kept: KeptEntries | None = None,
    *,
    verified: bool = False,
) -> ImportedLayer:
    """Store the tar that ``pieces`` make up as the layer ``diff_id``, with the help of ``pool``.

    ``pieces`` is closed, if it can be; a piece must not change after it was given. Contents of over 64 bytes
    become objects; the entries are put into ``kept`` as well. The stream gets its name only when sha256 of
    all pieces is ``diff_id``. With ``verified``, ``pieces`` sees to that: where it is not, it raises at its
    end, and it is always read to its end. Several layers may be imported at once, each from its own thread.

    Raises ``DigestMismatch`` if it is not, ``UnsupportedImage`` for what is no tar or holds what cannot be
    stored, ``Cancelled`` from ``reporter.at``, and what ``pieces`` and ``repository`` raise. An error of
    ``pieces``, then a wrong digest, go before a complaint about the content: they explain it.
    """
    gathered = kept.gather() if kept is not None else None
    noticed = gathered.add_object if gathered is not None else None
    with (
        repository.new_stream(ContentType.LAYER) as writer,
        LayerStore(repository, writer, reporter, pool, noticed) as store,
    ):
        reader = _Reader(pieces, None if verified else diff_id, reporter)
        try:
            entries = reader.run(store, gathered)
        except UnsupportedImage as error:
            raise UnsupportedImage(f"layer {diff_id}: {error.message}") from error
        store.finish()
        reporter.at("layer.verified")
        size = writer.size
        stream_id = repository.write_stream(layer_stream(diff_id), writer)
    if kept is not None and gathered is not None:
        kept.keep(stream_id, gathered)
    return ImportedLayer(
        diff_id=diff_id,
        stream_id=stream_id,
        size=size,
        entries=entries,
        inline_bytes=size - store.bytes_new - store.bytes_present,
        objects_new=store.objects_new,
        objects_present=store.objects_present,
        bytes_new=store.bytes_new,
        bytes_present=store.bytes_present,
    )


class _Reader:
    """Gets the tar, hashes it and takes it apart; ends well only if the digest is right."""

    def __init__(self, pieces: Iterable[Buffer], diff_id: DiffId | None, reporter: Reporter) -> None:
        self._source = pieces
        self._pieces = iter(pieces)
        self._diff_id = diff_id
        self._reporter = reporter
        self._hash: _Hash = hashlib.sha256()
        self._failure: BaseException | None = None

    def run(self, store: LayerStore, gathered: LayerEntries | None) -> int:
        """Read to the end; the number of entries."""
        splitter = LayerSplitter(self._next, store.add)
        with ExitStack() as stack:
            if (close := getattr(self._source, "close", None)) is not None:
                stack.callback(close)
            try:
                entries = splitter.run(gathered.add if gathered is not None else None)
            except UnsupportedImage:
                if self._failure is not None:
                    raise self._failure from None
                # Is it what was asked for? If not, that is the true error.
                while self._next() is not None:
                    pass
                self._check_digest()
                raise
        self._check_digest()
        return entries

    def _next(self) -> Buffer | None:
        self._reporter.at("layer.read")
        try:
            piece = next(self._pieces, None)
        except BaseException as error:
            # Kept as it is: whoever asked for the piece takes it for a complaint about the content.
            self._failure = error
            raise
        if piece is not None and self._diff_id is not None:
            self._hash.update(piece)
        return piece

    def _check_digest(self) -> None:
        if self._diff_id is None:
            return
        actual = DiffId.of_hash(self._hash.hexdigest())
        if actual != self._diff_id:
            raise DigestMismatch(what="uncompressed layer", expected=self._diff_id, actual=actual)
