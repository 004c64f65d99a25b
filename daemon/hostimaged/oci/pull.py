"""Pulling an image: from its name to a tag in the repository.

Order of work: manifest, configuration, layers side by side, EROFS images, config stream, manifest stream,
tag, row. All bytes are verified against the digests that name them before any name points to them; what is
stored is not fetched again. The repository's shared lock is held from first to last byte, so that no
collector removes what no name points to yet. A pull that is killed anywhere leaves whole things only, and
the next one uses them.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import How, Repository, Sharing, SharingImpossible
from hostimaged.errors import (
    CorruptRepository,
    ImageNotFound,
    NoSpace,
    PreconditionFailed,
    VerityMismatch,
    from_os_error,
)
from hostimaged.ids import ManifestDigest
from hostimaged.oci import commit, images, layers, pulls
from hostimaged.oci.commit import Commit, Contents
from hostimaged.oci.layers import StoppableReporter, Tally, fetch_layers, plan_layers, stored_layer
from hostimaged.oci.models import parse_config, parse_manifest
from hostimaged.oci.source import DEFAULT_PATIENCE, UnpackedSource, open_source
from hostimaged.progress import Phase
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.composefs.erofs.format import Format
    from hostimaged.composefs.repository import Verity
    from hostimaged.ids import ConfigDigest, DiffId, ObjectId, SourceDigest
    from hostimaged.oci.entries import KeptEntries
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.models import ImageConfig, Manifest
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.source import ImageSource, Patience
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``, in the order of work; between two of them lies one effect. Some come once
#: for each layer or image, ``shared.stored`` only where another image has the same configuration.
FAULT_POINTS: Final = (
    "pull.started",
    "pull.opened",
    "pull.resolved",
    "pull.planned",
    *layers.FAULT_POINTS,
    "pull.layers",
    *commit.FAULT_POINTS,
    "pull.recorded",
)


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull achieved. Bytes are counted as transferred; ``changed`` is False if all was there already.

    ``source_digest`` differs from ``manifest_digest`` where the manifest was converted to OCI.
    ``shared`` tells objects and bytes that came from files of a store, by how.
    ``layers_present`` of the ``layers_total`` layers of the manifest were stored before.
    """

    reference: ImageReference
    manifest_digest: ManifestDigest
    source_digest: SourceDigest
    config_digest: ConfigDigest
    tag: str
    version: str
    artifact: bool
    changed: bool
    layers_total: int
    layers_present: int
    bytes_total: int
    bytes_fetched: int
    image_ids: dict[Format, ObjectId] = field(default_factory=dict)
    shared: dict[How, tuple[int, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the bus: strings, booleans, numbers and lists of strings."""
        return {
            "reference": str(self.reference),
            "manifest-digest": str(self.manifest_digest),
            "source-digest": str(self.source_digest),
            "config-digest": str(self.config_digest),
            "tag": self.tag,
            "version": self.version,
            "artifact": self.artifact,
            "image-ids": [id_.hex() for id_ in self.image_ids.values()],
            "changed": self.changed,
            "layers-total": self.layers_total,
            "layers-present": self.layers_present,
            "bytes-total": self.bytes_total,
            "bytes-fetched": self.bytes_fetched,
            **self._sharing(),
        }

    def _sharing(self) -> dict[str, int]:
        if not self.shared:
            return {}
        found: dict[str, int] = {}
        for how in (How.REFLINKED, How.LINKED, How.COPIED):
            objects, size = self.shared.get(how, (0, 0))
            found |= {f"objects-{how}": objects, f"bytes-{how}": size}
        return found


def pull_image(
    paths: HostPaths,
    reference: ImageReference,
    *,
    expect_digest: str | None,
    verity: Verity,
    lock_timeout: float,
    reporter: Reporter,
    patience: Patience = DEFAULT_PATIENCE,
    signed: bool = False,
    sharing: Sharing = Sharing.AUTO,
    opener: Callable[[Reporter], ImageSource] | None = None,
) -> PullResult:
    """Pull ``reference`` into the repository of ``paths``, which is made if there is none (with ``verity``).

    Before: the caller holds the job lock, and calls from a thread that lives until this returns. After: the
    image is stored in the formats of the repository, tagged, and has a row in ``pulls.json``, all on the
    device. When it raises, no name points to anything that is not whole and verified, and repeating it goes
    on where it stopped. With ``expect_digest`` the digest of the manifest, here or at the source, must be
    that one. A registry that is out of reach for a moment is asked again, within ``patience``. ``signed``:
    the signature policy has to demand a signature of the image. ``sharing``: how files of containers-storage
    become objects. ``opener`` opens what was fetched from ``reference`` before, and is no longer to be asked.

    Raises ``SharingImpossible`` where they would have to be copied and must not be;
    ``PreconditionFailed``; ``LockTimeout``, ``ReadOnly``, ``NoSpace``,
    ``CorruptRepository`` and others of the repository; ``ImageNotFound``, ``RegistryAuth``, ``NetworkError``,
    ``SignatureRejected``, ``DigestMismatch`` and others of the source; ``UnsupportedImage``; ``Cancelled``.
    """
    stoppable = StoppableReporter(reporter)
    stoppable.phase(Phase.RESOLVING)
    stoppable.at("pull.started")
    repository, _ = Repository.ensure(
        paths.repository,
        verity=verity,
        lock_timeout=lock_timeout,
        # Waiting for another process is no step of the work.
        check=lambda: stoppable.at("pull.locking"),
    )
    with repository:
        repository.check_writable()
        stoppable.at("pull.opened")
        with private_directory(paths.temporary, "pull-") as work_dir:
            with (
                open_source(
                    reference, paths, work_dir, stoppable, patience, signed=signed, lock_timeout=lock_timeout
                )
                if opener is None
                else opener(stoppable)
            ) as source:
                pull = _Pull(repository, reference, stoppable, sharing)
                image, layers_found = pull.fetch(source, expect_digest)
            result = pull.commit(image, layers_found)
        _record(paths, result, stoppable)
    return result


def _record(paths: HostPaths, result: PullResult, reporter: Reporter) -> None:
    row = pulls.PullRow(str(result.reference), result.manifest_digest, result.source_digest, int(time.time()))
    try:
        pulls.record(paths.pulls, row)
    except pulls.NewerPulls as error:
        # The image is there all the same, and a tag without a row is understood.
        reporter.message(error.message)
    reporter.at("pull.recorded")


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What a name turned out to be: manifest and configuration, verified, and what is to be fetched."""

    digest: ManifestDigest
    source_digest: SourceDigest
    raw: bytes
    manifest: Manifest
    raw_config: bytes
    config: ImageConfig | None
    config_stored: bool
    plans: tuple[LayerPlan, ...]
    stored: dict[DiffId, ObjectId]
    missing: tuple[LayerPlan, ...]

    @property
    def fetch_size(self) -> int:
        """Bytes that are not stored yet, the configuration among them."""
        layers_size = sum(plan.descriptor.size for plan in self.missing)
        return layers_size + (0 if self.config_stored else self.manifest.config.size)


class _Pull:
    """One pull into an open repository."""

    def __init__(
        self,
        repository: Repository,
        reference: ImageReference,
        reporter: StoppableReporter,
        sharing: Sharing,
    ) -> None:
        self._repository = repository
        self._reference = reference
        self._reporter = reporter
        self._sharing = sharing
        self._tally = Tally()
        # A layer that was just imported need not be read back.
        self._kept: KeptEntries | None = None

    def fetch(
        self, source: ImageSource, expect_digest: str | None
    ) -> tuple[_Resolved, dict[DiffId, ObjectId]]:
        """All that needs the source; gives the image and the stream ids of its layers."""
        image = self._resolve(source, expect_digest)
        self._reporter.at("pull.resolved")
        shares = self._shares(source)
        self._begin(image, 0 if shares else image.fetch_size)
        if image.missing and image.config is not None:
            from hostimaged.oci.entries import KeptEntries

            self._kept = KeptEntries()
        fetched = fetch_layers(
            self._repository, source, image.missing, self._reporter, self._kept, self._sharing, self._tally
        )
        return image, image.stored | fetched

    def commit(self, image: _Resolved, found: dict[DiffId, ObjectId]) -> PullResult:
        """All that comes after the layers, but for the row."""
        self._reporter.at("pull.layers")
        self._reporter.phase(Phase.IMPORTING)
        contents = Contents(
            image.digest,
            image.raw,
            image.manifest.config_digest,
            image.raw_config,
            tuple((str(plan.id), found[plan.id]) for plan in image.plans),
            artifact=image.config is None,
        )
        commitment = Commit(self._repository, contents, self._reporter, self._kept)
        commitment.run()
        return self._result(image, commitment)

    def _resolve(self, source: ImageSource, expect_digest: str | None) -> _Resolved:
        fetched = source.manifest()
        raw, source_digest = fetched.raw, fetched.source_digest
        digest = ManifestDigest.of_hash(hashlib.sha256(raw).hexdigest())
        if expect_digest is not None and expect_digest not in (str(digest), str(source_digest)):
            raise PreconditionFailed(
                f"the manifest of {self._reference} is {source_digest}, not the expected {expect_digest}"
            )
        manifest = parse_manifest(raw)
        if manifest.is_container:
            images.check_formats(self._repository)
        raw_config = self._stored_config(manifest.config_digest)
        config_stored = raw_config is not None
        if raw_config is None:
            raw_config = source.config(manifest.config)
        config = parse_config(raw_config) if manifest.is_container else None
        plans = plan_layers(manifest, config)
        # A layer may be in an image twice, and is fetched once.
        distinct = {plan.id: plan for plan in plans}
        looked_up = {plan.id: stored_layer(self._repository, plan) for plan in distinct.values()}
        stored = {name: id_ for name, id_ in looked_up.items() if id_ is not None}
        missing = tuple(plan for plan in distinct.values() if plan.id not in stored)
        return _Resolved(
            digest, source_digest, raw, manifest, raw_config, config, config_stored, plans, stored, missing
        )

    def _stored_config(self, digest: ConfigDigest) -> bytes | None:
        try:
            return images.read_config(self._repository, digest).raw
        except (ImageNotFound, CorruptRepository, VerityMismatch):
            return None

    def _shares(self, source: ImageSource) -> bool:
        """Whether files of the source need not be copied; raises ``SharingImpossible`` if they must not."""
        if self._sharing is Sharing.COPY or not isinstance(source, UnpackedSource):
            return False
        if self._repository.can_share(source.root).any:
            return True
        if self._sharing is Sharing.REQUIRE:
            raise SharingImpossible(
                f"files of containers-storage in {source.root} can neither be cloned nor linked into "
                f"{self._repository.path}"
            )
        return False

    def _begin(self, image: _Resolved, needed: int) -> None:
        """Make room for ``needed`` bytes sure and say how much there is to do.

        The configuration is in hand already.
        """
        total = image.manifest.total_size
        # Two blobs of one layer: the one that is not needed counts as there.
        self._reporter.totals(total, max(total - image.fetch_size, 0))
        if not image.config_stored:
            self._reporter.advance(image.manifest.config.size)
        self._check_space(needed)
        self._reporter.at("pull.planned")
        self._reporter.phase(Phase.PULLING)

    def _check_space(self, missing: int) -> None:
        """What is fetched takes at least its compressed size; how much more, only unpacking tells."""
        path = self._repository.path
        try:
            status = os.statvfs(path)
        except OSError as error:
            raise from_os_error(error, f"cannot look at the repository at {path}") from error
        free = status.f_bavail * status.f_frsize
        if missing > free:
            raise NoSpace(
                f"{self._reference} needs at least {missing} bytes more in {path}, where {free} are free"
            )

    def _result(self, image: _Resolved, commitment: Commit) -> PullResult:
        return PullResult(
            self._reference,
            image.digest,
            image.source_digest,
            image.manifest.config_digest,
            images.pull_tag(image.digest),
            images.image_version(image.manifest, image.config),
            artifact=image.config is None,
            changed=commitment.changed or bool(image.missing),
            layers_total=len(image.plans),
            layers_present=sum(plan.id in image.stored for plan in image.plans),
            bytes_total=image.manifest.total_size,
            bytes_fetched=image.fetch_size,
            image_ids=commitment.image_ids,
            shared=self._tally.how,
        )
