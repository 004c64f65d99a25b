"""Gets again what is damaged of the images in a repository, from where they were pulled.

The caller holds the repository's shared lock, and has distrusted the damaged objects: everything that reads
takes them for missing. So an image is repaired by the steps of a pull, of which those do something whose
result is missing: manifest and configuration, of each layer what is missing of it, EROFS images. All
bytes are verified against the digests that the image has always had, wherever they come from; a damaged file
stays until its replacement takes its name. Stopped anywhere, nothing is worse than before, and the next
repair goes on.

An image is completed without its source as far as that goes: EROFS images are made of the layers that are
there, and what other stores of this machine have is taken from them (``local_layers``). From the source only
layers are fetched of which something is missing, and no more of them than up to the last content that is
(``layer_repair``). Images made for booting are the business of ``hostimaged.host.repair``.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import (
    Cancelled,
    CorruptRepository,
    HostimageError,
    ImageNotFound,
    NoSpace,
    PreconditionFailed,
    ReadOnly,
    UnsupportedImage,
    VerityMismatch,
)
from hostimaged.ids import ManifestDigest
from hostimaged.oci import images
from hostimaged.oci.commit import Commit, Contents
from hostimaged.oci.layer_repair import fill_from_blob, find_gap, restore_contents
from hostimaged.oci.layers import StoppableReporter, fetch_layers, plan_layers, stored_layer
from hostimaged.oci.models import MAX_CONFIG, MAX_MANIFEST, parse_config, parse_manifest
from hostimaged.oci.reference import ImageReference, Transport
from hostimaged.oci.source import DEFAULT_PATIENCE, UnpackedSource, open_source
from hostimaged.progress import Phase
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ConfigDigest, DiffId, ObjectId, OciDigest
    from hostimaged.oci.layer_repair import Gap
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.local_layers import LocalLayers
    from hostimaged.oci.models import ImageConfig, Manifest
    from hostimaged.oci.pulls import PullRow
    from hostimaged.oci.source import ImageSource, Patience
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``; those of fetching layers and of storing an image come between them.
FAULT_POINTS: Final = ("repair.image", "repair.resolved", "repair.layers", "repair.stored")
#: What is wrong with one thing that is stored.
_DAMAGE: Final = (CorruptRepository, ImageNotFound, VerityMismatch)
#: What would go wrong with every source.
_FATAL: Final = (Cancelled, NoSpace, ReadOnly)


@dataclass(slots=True)
class ImageRepair:
    """What was done for one image, or in a dry run would be."""

    manifest_digest: ManifestDigest
    #: Layers fetched, by diff_id, be it in part, and the bytes of all that was fetched; in a dry run at most.
    layers: list[str] = field(default_factory=list)
    size: int = 0
    #: Other stores of this machine that had something of it.
    local: list[str] = field(default_factory=list)
    #: Where from; "" if nothing had to be fetched.
    source: str = ""
    #: What stood in the way; "" if nothing did.
    problem: str = ""


class _SourceNeeded(Exception):
    """The image cannot be completed from what is stored."""


def references_of(rows: Iterable[PullRow], digest: ManifestDigest) -> list[ImageReference]:
    """Where a manifest was pulled from, the newest first: in a registry by its digest, then by its name.

    A name may mean another image by now, of the same repository though, which has the layers still.
    """
    found: dict[ImageReference, None] = {}
    for row in reversed(list(rows)):
        if row.manifest_digest != digest:
            continue
        with suppress(HostimageError):
            reference = ImageReference.parse(row.reference)
            for each in with_digest(reference, str(row.source_digest)):
                found[each] = None
    return list(found)


def with_digest(reference: ImageReference, digest: str) -> list[ImageReference]:
    """``reference`` by its digest, where its transport knows that, and as it is."""
    named = reference.named
    if reference.transport is not Transport.DOCKER or named is None or named.digest:
        return [reference]
    return [ImageReference.parse(f"docker://{named.repository}@{digest}"), reference]


class ImageRepairer:
    """Completes the images of a repository one by one.

    ``references`` tells where a manifest can be had; what it gives is tried in its order, after ``local``.
    With ``dry_run`` nothing is written or fetched, and no source is asked; that a place of this machine has a
    layer is believed.
    """

    def __init__(
        self,
        paths: HostPaths,
        repository: Repository,
        references: Callable[[ManifestDigest], Sequence[ImageReference]],
        local: LocalLayers,
        reporter: Reporter,
        *,
        dry_run: bool = False,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        self._paths = paths
        self._repository = repository
        self._references = references
        self._local = local
        self._reporter = reporter
        self._dry_run = dry_run
        self._patience = patience

    def run(self) -> list[ImageRepair]:
        """Repair every tagged image that is not whole; never raises for what is wrong with one of them.

        Raises ``Cancelled``, ``NoSpace`` and ``ReadOnly``.
        """
        done = []
        for digest in sorted(set(images.tags(self._repository).values())):
            self._reporter.at("repair.image")
            if not self._is_whole(digest):
                done.append(self._repair(digest))
        return done

    def _is_whole(self, digest: ManifestDigest) -> bool:
        """Whether nothing of an image is missing, boot images aside."""
        repository = self._repository
        try:
            image = images.open_image(repository, digest)
            plans = plan_layers(image.manifest, image.config)
        except HostimageError:
            return False
        layers = image.layers
        if image.config is not None and not all(
            images.has_image(repository, id_) for id_ in image.image_ids.values()
        ):
            return False
        return all(
            str(plan.id) in layers
            and repository.has_object(layers[str(plan.id)])
            and stored_layer(repository, plan) is not None
            for plan in plans
        )

    def _repair(self, digest: ManifestDigest) -> ImageRepair:
        outcome = ImageRepair(digest)
        try:
            try:
                self._complete(outcome, None)
            except _SourceNeeded as error:
                self._from_sources(outcome, str(error))
        except _FATAL:
            raise
        except HostimageError as error:
            outcome.problem = error.message
        return outcome

    def _from_sources(self, outcome: ImageRepair, missing: str) -> None:
        """Complete an image with the first of its sources that has what is missing."""
        references = self._references(outcome.manifest_digest)
        if not references:
            raise ImageNotFound(f"{missing}, and nobody knows where the image came from")
        if self._dry_run:
            outcome.source = str(references[0])
            return
        problems = []
        for reference in references:
            stoppable = StoppableReporter(self._reporter)
            try:
                with (
                    private_directory(self._paths.temporary, "repair-") as work_dir,
                    open_source(reference, self._paths, work_dir, stoppable, self._patience) as source,
                ):
                    self._complete(outcome, source)
            except _FATAL:
                raise
            except HostimageError as error:
                problems.append(error.message)
            else:
                outcome.source = str(reference)
                return
        raise ImageNotFound("; ".join(problems))

    def _complete(self, outcome: ImageRepair, source: ImageSource | None) -> None:
        """All steps; raises ``_SourceNeeded`` if something is missing and there is no ``source``."""
        outcome.layers.clear()
        outcome.size = 0
        raw_manifest = self._manifest(outcome.manifest_digest, source)
        manifest = parse_manifest(raw_manifest)
        raw_config = self._config(manifest, source, outcome)
        config = parse_config(raw_config) if manifest.is_container else None
        plans = plan_layers(manifest, config)
        gaps = self._gaps(plans, outcome, local=source is None)
        self._reporter.at("repair.resolved")
        if gaps:
            outcome.layers += [str(gap.plan.id) for gap in gaps]
            if source is None:
                outcome.size += sum(gap.plan.descriptor.size for gap in gaps)
                raise _SourceNeeded(f"layers are damaged: {', '.join(outcome.layers)}")
            self._reporter.phase(Phase.PULLING)
            self._fetch(gaps, source, outcome)
        self._reporter.at("repair.layers")
        if not self._dry_run:
            self._store(manifest, raw_manifest, raw_config, plans, self._layers(plans), config)

    def _gaps(self, plans: Sequence[LayerPlan], outcome: ImageRepair, *, local: bool) -> list[Gap]:
        """What is missing of the layers, each once; if ``local``, after what this machine has is put back."""
        gaps = []
        for plan in {plan.id: plan for plan in plans}.values():
            gap = find_gap(self._repository, plan)
            if gap is None:
                continue
            place = ""
            if local:
                place = (
                    self._local.place_of(gap) if self._dry_run else self._local.fill(self._repository, gap)
                )
            if not place:
                gaps.append(gap)
            elif place not in outcome.local:
                outcome.local.append(place)
        return gaps

    def _fetch(self, gaps: Sequence[Gap], source: ImageSource, outcome: ImageRepair) -> None:
        """Get what is missing of layers from the source of the image."""
        repository = self._repository
        whole = []
        for gap in gaps:
            if not gap.is_partial or gap.plan.content_type is not ContentType.LAYER:
                whole.append(gap.plan)
                continue
            try:
                if isinstance(source, UnpackedSource):
                    with source.unpacked(gap.plan.id) as layer:
                        restore_contents(repository, gap, layer.parts, self._reporter, files=True)
                else:
                    outcome.size += fill_from_blob(repository, source, gap, self._reporter)
                self._reporter.at("layer.stored")
            except (UnsupportedImage, VerityMismatch):
                # The name leads to the stream of another layer.
                whole.append(gap.plan)
        outcome.size += sum(plan.descriptor.size for plan in whole)
        fetch_layers(repository, source, whole, StoppableReporter(self._reporter))

    def _store(
        self,
        manifest: Manifest,
        raw_manifest: bytes,
        raw_config: bytes,
        plans: Sequence[LayerPlan],
        found: dict[DiffId, ObjectId],
        config: ImageConfig | None,
    ) -> None:
        self._reporter.phase(Phase.IMPORTING)
        contents = Contents(
            ManifestDigest.of_hash(hashlib.sha256(raw_manifest).hexdigest()),
            raw_manifest,
            manifest.config_digest,
            raw_config,
            tuple((str(plan.id), found[plan.id]) for plan in plans),
            artifact=config is None,
        )
        Commit(self._repository, contents, self._reporter).store()
        self._repository.sync()
        self._reporter.at("repair.stored")

    def _manifest(self, digest: ManifestDigest, source: ImageSource | None) -> bytes:
        with suppress(*_DAMAGE):
            return images.read_manifest(self._repository, digest).raw
        if source is None:
            raw = self._document(digest, MAX_MANIFEST, f"manifest {digest} is damaged")
        else:
            raw = source.manifest().raw
        actual = ManifestDigest.of_hash(hashlib.sha256(raw).hexdigest())
        if actual != digest:
            raise PreconditionFailed(f"the source has another image by now, with the manifest {actual}")
        # If that is all that was missing of its stream, what this refers to is known again.
        self._repository.store_object(raw)
        return raw

    def _config(self, manifest: Manifest, source: ImageSource | None, outcome: ImageRepair) -> bytes:
        digest: ConfigDigest = manifest.config_digest
        with suppress(*_DAMAGE):
            return images.read_config(self._repository, digest).raw
        if source is None:
            raw = self._document(digest, MAX_CONFIG, f"configuration {digest} is damaged")
        else:
            raw = source.config(manifest.config)
            outcome.size += len(raw)
        self._repository.store_object(raw)
        return raw

    def _document(self, digest: OciDigest, limit: int, damage: str) -> bytes:
        """A manifest or configuration out of another store of this machine."""
        raw = None if self._dry_run else self._local.document(digest, limit)
        if raw is None:
            raise _SourceNeeded(damage)
        return raw

    def _layers(self, plans: Sequence[LayerPlan]) -> dict[DiffId, ObjectId]:
        """Stream ids of the layers, all of which are whole by now."""
        found: dict[DiffId, ObjectId] = {}
        for plan in plans:
            id_ = stored_layer(self._repository, plan)
            if id_ is None:
                raise CorruptRepository(f"layer {plan.id} is damaged still")
            found[plan.id] = id_
        return found
