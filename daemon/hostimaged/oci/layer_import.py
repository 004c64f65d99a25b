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
from hostimaged.errors import Cancelled, DigestMismatch, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.layer_parts import Batch, LayerSplitter, Part
from hostimaged.oci.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Iterable
    from hashlib import _Hash
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import ObjectWriter, Repository, Stored
    from hostimaged.composefs.splitstream import Writer
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter

#: Bytes between the two threads of a layer: enough that neither waits for the other's short pauses. Memory of
#: an import is about this, whatever the size of the layer.
_QUEUE: Final = 4 << 20


#: Held while a batch is stored. Hashing blocks of 4 KiB and making files go in and out of the interpreter all
#: the time; two threads at it take turns every few microseconds, and are slower together than one alone:
#: eight layers, two at a time, 5.9 s of CPU instead of 3.4. There is one interpreter, hence one lock.
_STORING: Final = threading.Lock()


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


def stream_name(diff_id: DiffId) -> str:
    """The name of a layer's stream in a repository."""
    return f"oci-layer-{diff_id}"


def import_layer(
    repository: Repository, pieces: Iterable[Buffer], diff_id: DiffId, reporter: Reporter
) -> ImportedLayer:
    """Store the tar that ``pieces`` make up as the layer ``diff_id``.

    ``pieces`` is iterated (and closed, if it can be) in a thread of its own, which is gone when this returns
    or raises; a piece must not change after it was given. Contents of over 64 bytes become objects. The
    stream gets its name only when sha256 of all pieces is ``diff_id``. Several layers may be imported at
    once, each from a thread of its own.

    Raises ``DigestMismatch`` if it is not, ``UnsupportedImage`` for what is no tar or holds what cannot be
    stored, ``Cancelled`` from ``reporter.at``, and what ``pieces`` and ``repository`` raise. An error of
    ``pieces``, then a wrong digest, go before a complaint about the content: they explain it.
    """
    pipe: Pipe[Batch] = Pipe(_QUEUE)
    reader = _Reader(pieces, diff_id, reporter, pipe)
    thread = threading.Thread(target=reader.run, name=f"layer {diff_id.hex[:12]}")
    with repository.new_stream(ContentType.LAYER) as writer, _Storer(repository, writer) as storer:
        thread.start()
        try:
            while (batch := pipe.get()) is not None:
                reporter.at("layer.store")
                with _STORING:
                    storer.store(batch)
        except UnsupportedImage as error:
            raise UnsupportedImage(f"layer {diff_id}: {error.message}") from error
        finally:
            pipe.abandon()
            thread.join()
        reporter.at("layer.verified")
        size = writer.size
        stream_id = repository.write_stream(stream_name(diff_id), writer)
    return ImportedLayer(
        diff_id=diff_id,
        stream_id=stream_id,
        size=size,
        entries=reader.entries,
        inline_bytes=size - storer.bytes_new - storer.bytes_present,
        objects_new=storer.objects_new,
        objects_present=storer.objects_present,
        bytes_new=storer.bytes_new,
        bytes_present=storer.bytes_present,
    )


class _Reader:
    """One end: gets the tar, hashes it and takes it apart. The pipe ends only if the digest is right."""

    def __init__(
        self, pieces: Iterable[Buffer], diff_id: DiffId, reporter: Reporter, pipe: Pipe[Batch]
    ) -> None:
        self._source = pieces
        self._pieces = iter(pieces)
        self._diff_id = diff_id
        self._reporter = reporter
        self._pipe = pipe
        self._hash: _Hash = hashlib.sha256()
        self._failure: BaseException | None = None
        #: Entries of the tar, once everything was read.
        self.entries = 0

    def run(self) -> None:
        """Read to the end; whatever is raised comes out of the pipe."""
        error: BaseException | None = None
        try:
            self._read()
        except BaseException as raised:  # noqa: BLE001 - raised again in the thread that reads the pipe
            error = raised
        try:
            if (close := getattr(self._source, "close", None)) is not None:
                close()
        except BaseException as raised:  # noqa: BLE001
            error = error or raised
        self._pipe.end(error)

    def _read(self) -> None:
        try:
            self.entries = LayerSplitter(self._next, self._emit).run()
        except UnsupportedImage:
            if self._failure is not None:
                raise self._failure from None
            # Is it what was asked for? If not, that is the true error.
            while self._next() is not None:
                pass
            self._check_digest()
            raise
        self._check_digest()

    def _next(self) -> Buffer | None:
        self._reporter.at("layer.read")
        try:
            piece = next(self._pieces, None)
        except BaseException as error:
            # Kept as it is: whoever asked for the piece takes it for a complaint about the content.
            self._failure = error
            raise
        if piece is not None:
            self._hash.update(piece)
        return piece

    def _emit(self, batch: Batch) -> None:
        if not self._pipe.put(batch):
            # Nobody hears this: who reads the pipe has gone with an error of its own.
            raise Cancelled

    def _check_digest(self) -> None:
        actual = DiffId.of_hash(self._hash.hexdigest())
        if actual != self._diff_id:
            raise DigestMismatch(what="uncompressed layer", expected=self._diff_id, actual=actual)


class _Storer:
    """The other end: makes objects of contents, and writes the stream."""

    def __init__(self, repository: Repository, writer: Writer) -> None:
        self._repository = repository
        self._writer = writer
        self._large: ObjectWriter | None = None
        self._large_size = 0
        self.objects_new = self.objects_present = self.bytes_new = self.bytes_present = 0

    def store(self, batch: Batch) -> None:
        """Store the next parts."""
        for part, buffer in batch.parts:
            if part is Part.INLINE:
                self._writer.inline(buffer)
            elif part is Part.CONTENT:
                self._append(self._repository.store_object(buffer), len(buffer))
            else:
                self._piece(buffer, last=part is Part.LAST_PIECE)

    def _piece(self, buffer: Buffer, *, last: bool) -> None:
        if self._large is None:
            self._large, self._large_size = self._repository.object_writer(), 0
        self._large.write(buffer)
        self._large_size += len(buffer)
        if last:
            self._append(self._large.commit(), self._large_size)
            self.close()

    def _append(self, stored: Stored, size: int) -> None:
        self._writer.external(stored.id, size)
        if stored.is_new:
            self.objects_new += 1
            self.bytes_new += size
        else:
            self.objects_present += 1
            self.bytes_present += size

    def close(self) -> None:
        """Drop a large content that is not complete."""
        if self._large is not None:
            self._large.close()
            self._large = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
