"""The layers of a pull: which are stored already, and fetching the others side by side."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.repository import Sharing
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, CorruptRepository, UnsupportedImage, VerityMismatch, printable
from hostimaged.ids import DiffId
from hostimaged.oci.decompress import DEFAULT_LIMIT, TAR_LAYERS, Compression, decompressed
from hostimaged.oci.images import layer_stream
from hostimaged.oci.source import UnpackedSource
from hostimaged.system.syscalls import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hostimaged.composefs.repository import How, Repository
    from hostimaged.composefs.repository.store_pool import StorePool
    from hostimaged.ids import ObjectId
    from hostimaged.oci.entries import KeptEntries
    from hostimaged.oci.models import Descriptor, ImageConfig, Manifest
    from hostimaged.oci.source import BlobSource
    from hostimaged.progress import Phase, Reporter

#: Named points of ``Reporter.at``: a layer is about to be named (``layer_import``), and one is stored.
FAULT_POINTS: Final = ("layer.verified", "layer.stored")


#: Bytes to fetch, compressed, from which on helpers save more time than they take to start; otherwise that
#: shows while they are stored.
_WORTH_HELPERS: Final = 8 << 20
#: Processors that are used at most: storage feeds no more, and each takes a helper and a layer of some 30 MB.
_MAX_PROCESSORS: Final = 8
#: Bytes of the largest buffers that come and go, generously, and what may lie idle between two of them.
_BUFFER: Final = 4 << 20
_KEPT: Final = 16 << 20
#: Type of a layer that is a bare tar.
UNCOMPRESSED: Final = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer to have: where its bytes come from, and the ``id`` that names it in the repository.

    ``id`` is the digest of the tar, or for the blobs of artifacts that of the blob itself.
    """

    descriptor: Descriptor
    id: DiffId
    content_type: ContentType

    @property
    def is_bare(self) -> bool:
        """Whether the blob has the digest of the tar: then it is the tar, and its source verifies both."""
        return self.descriptor.digest == str(self.id)

    @property
    def media_type(self) -> str:
        """How the blob is to be read.

        A bare tar is one whatever its descriptor says: skopeo copies images out of containers-storage
        uncompressed, and leaves the types in the manifest as they were.
        """
        return UNCOMPRESSED if self.is_bare else self.descriptor.media_type

    @property
    def stream(self) -> str:
        """Its stream name."""
        return layer_stream(self.id)


def plan_layers(manifest: Manifest, config: ImageConfig | None) -> tuple[LayerPlan, ...]:
    """The layers of an image in its order, lowest first; ``config`` is None for an artifact.

    Raises ``UnsupportedImage`` where manifest and configuration disagree, or a layer is not a tar.
    """
    if config is None:
        return tuple(
            LayerPlan(layer, layer.as_digest(DiffId), _artifact_type(layer.media_type))
            for layer in manifest.layers
        )
    diff_ids = config.diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise UnsupportedImage(
            f"the manifest has {len(manifest.layers)} layers, the image configuration {len(diff_ids)}"
        )
    for layer in manifest.layers:
        if layer.media_type not in TAR_LAYERS:
            raise UnsupportedImage(f"layers of type {printable(layer.media_type)} are not supported")
    return tuple(
        LayerPlan(layer, diff_id, ContentType.LAYER)
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    )


def _artifact_type(media_type: str) -> ContentType:
    # A stream is named by the digest of its content. In an artifact that is the blob as it is, so only an
    # uncompressed tar can be a layer of that name; composefs-rs splits compressed ones as well, under a
    # digest that they do not have.
    if TAR_LAYERS.get(media_type) is Compression.NONE:
        return ContentType.LAYER
    return ContentType.BLOB


def stored_layer(repository: Repository, plan: LayerPlan) -> ObjectId | None:
    """Stream id of the layer if it is stored and all its objects are there; None to fetch it (again).

    Objects are looked for, not read: their content is the business of a check of the repository.
    """
    try:
        stream_id = repository.has_stream(plan.stream)
        if stream_id is None:
            return None
        with repository.open_stream(plan.stream, stream_id, plan.content_type) as stream:
            complete = all(map(repository.has_object, stream.object_refs))
    except (CorruptRepository, VerityMismatch):
        return None
    return stream_id if complete else None


def fetch_layers(
    repository: Repository,
    source: BlobSource,
    plans: Sequence[LayerPlan],
    reporter: StoppableReporter,
    kept: KeptEntries | None = None,
    sharing: Sharing = Sharing.AUTO,
    tally: Tally | None = None,
) -> dict[DiffId, ObjectId]:
    """Fetch and store ``plans``, each of another id, as many at once as processors are used; their stream
    ids. The entries of the layers are put into ``kept``; ``tally`` counts objects made of files.

    The largest come first, so that the last ones to end are short. Every layer that is named is complete and
    verified, whatever happens to the others. The first error stops the rest and is raised.
    """
    if not plans:
        return {}
    if isinstance(source, UnpackedSource):
        return _fetch_unpacked(repository, source, plans, reporter, kept, sharing, tally or Tally())
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from hostimaged.composefs.repository.store_pool import WORTH, StorePool

    # Thousands of buffers of up to a MiB each: a tenth of the time would go into new pages for them.
    keep_freed_memory(_BUFFER, _KEPT)
    ordered = sorted(plans, key=lambda plan: plan.descriptor.size, reverse=True)
    processors = min(len(os.sched_getaffinity(0)), _MAX_PROCESSORS)
    large = sum(plan.descriptor.size for plan in plans) >= _WORTH_HELPERS
    workers = min(processors, len(ordered))
    found: dict[DiffId, ObjectId] = {}
    # Helpers do not know which objects this process takes for missing.
    helpers = 0 if repository.distrusted else processors - 1
    with (
        StorePool(repository, helpers, worth=0 if large else WORTH) as store,
        ThreadPoolExecutor(workers, thread_name_prefix="layer") as pool,
    ):
        futures = {
            pool.submit(_fetch, repository, source, plan, reporter, store, kept): plan for plan in ordered
        }
        try:
            for future in as_completed(futures):
                found[futures[future].id] = future.result()
                reporter.at("layer.stored")
        except BaseException:
            reporter.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def _fetch_unpacked(
    repository: Repository,
    source: UnpackedSource,
    plans: Sequence[LayerPlan],
    reporter: StoppableReporter,
    kept: KeptEntries | None,
    sharing: Sharing,
    tally: Tally,
) -> dict[DiffId, ObjectId]:
    """Layers that need no unpacking, one after the other: there is nothing to wait for."""
    from hostimaged.oci.unpacked_import import import_unpacked

    found: dict[DiffId, ObjectId] = {}
    for plan in plans:
        if plan.content_type is not ContentType.LAYER:
            raise UnsupportedImage(f"{plan.id} is no layer of a container image")
        with source.unpacked(plan.id) as layer:
            found[plan.id], how = import_unpacked(repository, layer.parts, plan.id, reporter, sharing, kept)
        tally.add(how)
        reporter.advance(plan.descriptor.size)
        reporter.at("layer.stored")
    return found


class Tally:
    """How many objects, and bytes of them, came into the repository in which way."""

    def __init__(self) -> None:
        self.how: dict[How, tuple[int, int]] = {}

    def add(self, how: Mapping[How, tuple[int, int]]) -> None:
        """Add what one layer needed."""
        for way, (objects, size) in how.items():
            before = self.how.get(way, (0, 0))
            self.how[way] = before[0] + objects, before[1] + size


def _fetch(
    repository: Repository,
    source: BlobSource,
    plan: LayerPlan,
    reporter: StoppableReporter,
    store: StorePool,
    kept: KeptEntries | None,
) -> ObjectId:
    with source.blob(plan.descriptor) as chunks:
        counted = _counted(chunks, reporter)
        if plan.content_type is ContentType.LAYER:
            from hostimaged.oci.layer_import import import_layer

            pieces = decompressed(plan.media_type, counted, limit=DEFAULT_LIMIT)
            layer = import_layer(repository, pieces, plan.id, reporter, store, kept, verified=plan.is_bare)
            return layer.stream_id
        return _store_blob(repository, counted, plan)


def _store_blob(repository: Repository, chunks: Iterator[bytes], plan: LayerPlan) -> ObjectId:
    """Store a blob as it is: one object, and a stream of nothing else."""
    size = 0
    with repository.object_writer() as blob:
        for chunk in chunks:
            blob.write(chunk)
            size += len(chunk)
        stored = blob.commit()
    with repository.new_stream(ContentType.BLOB) as writer:
        writer.external(stored.id, size)
        return repository.write_stream(plan.stream, writer)


def _counted(chunks: Iterator[bytes], reporter: Reporter) -> Iterator[bytes]:
    for chunk in chunks:
        reporter.at("layer.fetch")
        reporter.advance(len(chunk))
        yield chunk


class StoppableReporter:
    """Passes everything on to another reporter, until ``stop``: from then on ``at`` raises ``Cancelled``.

    How the failure of one thread of a job ends the others.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every thread that comes to a named point end."""
        self._stopped.set()

    def at(self, point: str) -> None:
        """See ``Reporter.at``."""
        if self._stopped.is_set():
            raise Cancelled
        self._reporter.at(point)

    def phase(self, phase: Phase) -> None:
        """Pass on."""
        self._reporter.phase(phase)

    def totals(self, total: int, cached: int) -> None:
        """Pass on."""
        self._reporter.totals(total, cached)

    def advance(self, count: int) -> None:
        """Pass on."""
        self._reporter.advance(count)

    def importing(self, done: int, total: int) -> None:
        """Pass on."""
        self._reporter.importing(done, total)

    def generating(self, done: int, total: int) -> None:
        """Pass on."""
        self._reporter.generating(done, total)

    def message(self, text: str) -> None:
        """Pass on."""
        self._reporter.message(text)
