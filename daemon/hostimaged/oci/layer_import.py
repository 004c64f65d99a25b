"""A layer's tar into the repository: file contents become objects, the rest a splitstream.

composefs-rs 0.9, splitstream: the stream gives the tar back bit for bit, whatever is in it. Not here: where
the bytes come from and how they are compressed; what the entries mean (``filesystem``).
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import DigestMismatch, UnsupportedImage
from hostimaged.ids import DiffId, ObjectId
from hostimaged.oci.pipe import Pipe
from hostimaged.oci.tar import HeaderReader, padding
from hostimaged.oci.window import Window, ends_early

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from hashlib import _Hash

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import Repository, Stored
    from hostimaged.composefs.splitstream import Writer
    from hostimaged.progress import Reporter

#: Bytes between the two threads of a layer: enough that neither waits for the other's short pauses. Memory of
#: an import is about this, whatever the size of the layer.
_QUEUE: Final = 4 << 20
#: Contents up to this size are hashed and stored in one go, larger ones are streamed.
_SMALL: Final = 1 << 20
#: Entries of a layer: a million take some 700 MB as a tree; the largest OS images known have 200,000.
MAX_ENTRIES: Final = 1_000_000


@dataclass(slots=True)
class ImportedLayer:
    """What an import did. Sizes in bytes.

    ``size`` is that of the tar; objects are counted once for each entry, as new or as present already.
    """

    diff_id: DiffId
    stream_id: ObjectId
    size: int
    entries: int
    inline_bytes: int
    objects_new: int = 0
    objects_present: int = 0
    bytes_new: int = 0
    bytes_present: int = 0


def stream_name(diff_id: DiffId) -> str:
    """The name of a layer's stream in a repository."""
    return f"oci-layer-{diff_id}"


def import_layer(
    repository: Repository, pieces: Iterable[Buffer], diff_id: DiffId, reporter: Reporter
) -> ImportedLayer:
    """Store the tar that ``pieces`` make up as the layer ``diff_id``.

    ``pieces`` is iterated (and closed, if it can be) in a thread of its own, which is gone when this returns
    or raises; a piece must not change after it was given. Contents of over 64 bytes become objects. The
    stream gets its name only when sha256 of all pieces is ``diff_id``.

    Raises ``DigestMismatch`` if it is not, ``UnsupportedImage`` for what is no tar or holds what cannot be
    stored, ``Cancelled`` from ``reporter.at``, and what ``pieces`` and ``repository`` raise. An error of
    ``pieces`` goes before a complaint about what came out of them: it explains it.
    """
    importer = _Importer(repository, diff_id, reporter)
    thread = threading.Thread(target=importer.read, args=(pieces,), name=f"layer {diff_id.hex[:12]}")
    with repository.new_stream(ContentType.LAYER) as writer:
        thread.start()
        try:
            layer = importer.split(writer)
        except UnsupportedImage as error:
            raise UnsupportedImage(f"layer {diff_id}: {error.message}") from error
        finally:
            importer.pipe.abandon()
            thread.join()
        reporter.at("layer.verified")
        layer.stream_id = repository.write_stream(stream_name(diff_id), writer)
    return layer


class _Importer:
    """Both ends of an import: ``read`` runs in one thread, ``split`` in the other."""

    def __init__(self, repository: Repository, diff_id: DiffId, reporter: Reporter) -> None:
        self._repository = repository
        self._diff_id = diff_id
        self._reporter = reporter
        self._hash: _Hash = hashlib.sha256()
        self.pipe = Pipe(_QUEUE)

    def read(self, pieces: Iterable[Buffer]) -> None:
        """Hash what ``pieces`` gives and pass it on."""
        error: BaseException | None = None
        try:
            for piece in pieces:
                self._reporter.at("layer.read")
                self._hash.update(piece)
                if not self.pipe.put(piece):
                    break
        except BaseException as raised:  # noqa: BLE001 - raised again in the thread that reads the pipe
            error = raised
        try:
            if (close := getattr(pieces, "close", None)) is not None:
                close()
        except BaseException as raised:  # noqa: BLE001
            error = error or raised
        self.pipe.end(error)

    def split(self, writer: Writer) -> ImportedLayer:
        """Store the contents and write the stream; returns when all was read and the digest is right."""
        splitter = _Splitter(self._repository, self._next_piece, writer, self._diff_id)
        try:
            splitter.run()
        except UnsupportedImage:
            # Is it what was asked for? If not, that is the true error.
            while self._next_piece() is not None:
                pass
            self._check_digest()
            raise
        self._check_digest()
        return splitter.layer

    def _next_piece(self) -> Buffer | None:
        self._reporter.at("layer.store")
        return self.pipe.get()

    def _check_digest(self) -> None:
        """Compare with the diff_id; only to be called after the end of the pipe was seen."""
        actual = DiffId.of_hash(self._hash.hexdigest())
        if actual != self._diff_id:
            raise DigestMismatch(what="uncompressed layer", expected=self._diff_id, actual=actual)


class _Splitter:
    """The loop over the entries (composefs-rs 0.9, splitstream: splitting a tar archive)."""

    def __init__(
        self, repository: Repository, fetch: Callable[[], Buffer | None], writer: Writer, diff_id: DiffId
    ) -> None:
        self._repository = repository
        self._writer = writer
        self._window = Window(fetch, writer.inline)
        self.layer = ImportedLayer(diff_id, ObjectId(), 0, 0, 0)

    def run(self) -> None:
        """Until the end of the data: what follows the end marker belongs to the stream."""
        window = self._window
        headers = HeaderReader(window.inline)
        while (header := headers.read()) is not None:
            if headers.count > MAX_ENTRIES:
                raise UnsupportedImage(f"over {MAX_ENTRIES} entries")
            rest = header.size + padding(header.size)
            if header.is_external:
                self._store(header.size)
                rest -= header.size
            if rest and not window.inline(rest):
                raise ends_early()
        window.inline_rest()
        layer, total = self.layer, self._writer.size
        layer.entries, layer.size = headers.count, total
        layer.inline_bytes = total - layer.bytes_new - layer.bytes_present

    def _store(self, size: int) -> None:
        """The next ``size`` bytes become an object."""
        if size <= _SMALL:
            stored = self._repository.store_object(self._window.content(size))
        else:
            with self._repository.object_writer() as writer:
                for part in self._window.content_parts(size):
                    writer.write(part)
                stored = writer.commit()
        self._writer.external(stored.id, size)
        self._count(stored, size)

    def _count(self, stored: Stored, size: int) -> None:
        if stored.is_new:
            self.layer.objects_new += 1
            self.layer.bytes_new += size
        else:
            self.layer.objects_present += 1
            self.layer.bytes_present += size
