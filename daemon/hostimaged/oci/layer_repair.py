"""Repairs one stored layer: gets the contents that are missing again, and nothing else.

While the stream of a layer is whole it tells the order of its contents. So the tar, wherever it comes from,
is read up to the last one that is missing, and only these are stored, each under the id that it has always
had: nothing else of it needs to be verified, or to be right. A layer whose stream is damaged is stored anew
as a whole (``layers.fetch_layers``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository import Sharing
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import CorruptRepository, UnsupportedImage, VerityMismatch, from_os_error
from hostimaged.ids import ObjectId
from hostimaged.oci.decompress import DEFAULT_LIMIT, decompressed
from hostimaged.oci.layer_parts import LayerSplitter, Part
from hostimaged.oci.layers import StoppableReporter, fetch_layers
from hostimaged.oci.tar import INLINE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import ObjectWriter, Repository
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.source import BlobSource
    from hostimaged.oci.storage.layer import OpenFile
    from hostimaged.progress import Reporter


@dataclass(frozen=True, slots=True)
class Gap:
    """What is missing of a layer: all of it, or these ``contents`` of the one in ``stream_id``."""

    plan: LayerPlan
    stream_id: ObjectId | None = None
    contents: frozenset[ObjectId] = frozenset()

    @property
    def is_partial(self) -> bool:
        """Whether the stream is whole, so that single contents can be put back."""
        return self.stream_id is not None


def find_gap(repository: Repository, plan: LayerPlan) -> Gap | None:
    """What is missing of a layer, None if it is whole. Objects are looked for, not read."""
    try:
        id_ = repository.has_stream(plan.stream)
        if id_ is None:
            return Gap(plan)
        with repository.open_stream(plan.stream, id_, plan.content_type) as stream:
            missing = frozenset(one for one in stream.object_refs if not repository.has_object(one))
    except (CorruptRepository, VerityMismatch):
        return Gap(plan)
    return Gap(plan, id_, missing) if missing else None


def fill_from_blob(repository: Repository, source: BlobSource, gap: Gap, reporter: Reporter) -> int:
    """Store what is missing of a layer out of its blob; how many bytes of that were read.

    Raises as ``restore_contents``, and as ``fetch_layers`` where all of it is missing.
    """
    plan = gap.plan
    if not gap.is_partial or plan.content_type is not ContentType.LAYER:
        fetch_layers(repository, source, [plan], StoppableReporter(reporter))
        return plan.descriptor.size
    count = 0

    def counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal count
        for chunk in chunks:
            reporter.at("layer.fetch")
            reporter.advance(len(chunk))
            count += len(chunk)
            yield chunk

    with source.blob(plan.descriptor) as chunks:
        pieces = decompressed(plan.media_type, counted(chunks), limit=DEFAULT_LIMIT)
        restore_contents(repository, gap, pieces, reporter)
    return count


class _AllThere(Exception):
    """Nothing is missing any more: the rest need not be read."""


def restore_contents(
    repository: Repository,
    gap: Gap,
    parts: Iterator[Buffer | OpenFile],
    reporter: Reporter,
    *,
    files: bool = False,
) -> None:
    """Store what is missing of a layer out of ``parts``, its tar, which are read no further than needed.

    With ``files`` the contents of over 64 bytes are files of their own among the parts, of which only those
    that are needed are read. Raises ``VerityMismatch`` where a content is not what it was,
    ``UnsupportedImage`` where the tar is another one, ``CorruptRepository``, and what ``parts`` and
    ``repository`` raise; what was stored until then is right.
    """
    with repository.open_stream(gap.plan.stream, gap.stream_id, gap.plan.content_type) as stream:
        order = (chunk for chunk in stream.chunks() if isinstance(chunk, ObjectId))
        picker = _Picker(repository, gap, order, parts, reporter)
        try:
            LayerSplitter(picker.fetch, picker.emit, picker.take if files else None).run()
        except _AllThere:
            return
        finally:
            picker.close()
    raise UnsupportedImage(f"layer {gap.plan.id} ends before contents that it had")


class _Picker:
    """Stands between a tar and the one who takes it apart, and keeps the contents that are missing.

    ``order`` are the ids of all contents of the layer, one after the other.
    """

    def __init__(
        self,
        repository: Repository,
        gap: Gap,
        order: Iterator[ObjectId],
        parts: Iterator[Buffer | OpenFile],
        reporter: Reporter,
    ) -> None:
        self._repository = repository
        self._name = gap.plan.id
        self._order = order
        self._left = set(gap.contents)
        self._parts = parts
        self._reporter = reporter
        # The large content that is being read, and where it goes if it is missing.
        self._large: ObjectId | None = None
        self._writer: ObjectWriter | None = None

    def close(self) -> None:
        """Drop what is not complete."""
        if self._writer is not None:
            self._writer.close()

    def fetch(self) -> Buffer | None:
        """The next bytes of the tar."""
        self._reporter.at("layer.read")
        part = next(self._parts, None)
        return _small(part) if isinstance(part, tuple) else part

    def take(self, size: int) -> None:
        """The content of ``size`` bytes that comes next is a file."""
        part, id_ = next(self._parts, None), self._next()
        if not isinstance(part, tuple) or part.size != size:
            raise UnsupportedImage("a content is not where it should be")
        if id_ not in self._left:
            return
        self._reporter.at("layer.store")
        try:
            found = fsverity.digest_fd(self._repository.algorithm, part.fd)
        except OSError as error:
            raise from_os_error(error, f"cannot read a file of layer {self._name}") from error
        self._check(id_, found)
        # What is damaged in the one place is to be had from the other the next time.
        self._repository.store_file(part.fd, size, Sharing.COPY)
        self._has(id_)

    def emit(self, part: Part, buffer: Buffer) -> None:
        """The next part of the tar."""
        if part is Part.CONTENT:
            id_ = self._next()
            if id_ in self._left:
                self._reporter.at("layer.store")
                self._check(id_, fsverity.digest(self._repository.algorithm, buffer))
                self._repository.store_object(buffer)
                self._has(id_)
        elif part is not Part.INLINE:
            self._piece(buffer, last=part is Part.LAST_PIECE)

    def _piece(self, buffer: Buffer, *, last: bool) -> None:
        if self._large is None:
            self._large = self._next()
            if self._large in self._left:
                self._writer = self._repository.object_writer()
        id_, writer = self._large, self._writer
        if writer is not None:
            self._reporter.at("layer.store")
            writer.write(buffer)
        if not last:
            return
        self._large = self._writer = None
        if writer is not None:
            with writer:
                writer.commit(id_)
            self._has(id_)

    def _next(self) -> ObjectId:
        id_ = next(self._order, None)
        if id_ is None:
            raise UnsupportedImage(f"layer {self._name} has more contents than it had")
        return id_

    def _check(self, wanted: ObjectId, found: ObjectId) -> None:
        if found != wanted:
            raise VerityMismatch(
                f"what should be object {wanted.hex()} of layer {self._name} has the digest {found.hex()}"
            )

    def _has(self, id_: ObjectId) -> None:
        self._left.discard(id_)
        if not self._left:
            raise _AllThere


def _small(part: OpenFile) -> bytes:
    """The content of a file that is no object of its own."""
    if part.size > INLINE_MAX:
        raise UnsupportedImage("a content is where it should not be")
    return os.pread(part.fd, part.size, 0)
