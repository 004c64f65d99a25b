"""The first of two stages of a pull: an image from its source into the store of the host, by podman.

Order of work: manifest and configuration, by the way of every pull; whether its files can be shared with the
repository, and whether there is room for what is missing, before anything is downloaded; the store, if there
is none; what podman does; and what it left is looked at. The repository's shared lock is held meanwhile, so
that no collector is at work in the store. A fetch that is killed leaves whole layers at most, and no image;
the next one uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository, Sharing, SharingImpossible
from hostimaged.errors import ImageNotFound, PreconditionFailed, from_os_error
from hostimaged.ids import ManifestDigest, SourceDigest
from hostimaged.oci.layers import plan_layers, stored_layer
from hostimaged.oci.models import parse_config, parse_manifest
from hostimaged.oci.policy import requirement
from hostimaged.oci.reference import Transport
from hostimaged.oci.source import DEFAULT_PATIENCE, open_source
from hostimaged.oci.space import require_space
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.feed import Feeding
from hostimaged.oci.storage.naming import name_in_store
from hostimaged.oci.storage.places import StorageName
from hostimaged.oci.storage.source import StorageSource
from hostimaged.oci.storage.store import StoreDamaged
from hostimaged.oci.storage.transfer import Copying, Downloading, Transfer
from hostimaged.progress import Phase
from hostimaged.system.durable import replace_file
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hostimaged.composefs.repository import Verity
    from hostimaged.ids import ConfigDigest, DiffId
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.models import Manifest
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.source import FetchedManifest, ImageSource, Patience
    from hostimaged.oci.storage.owned import Labeller
    from hostimaged.oci.storage.podman import Podman
    from hostimaged.oci.storage.store import Store, StoredImage
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = (
    "fetch.started",
    "fetch.resolved",
    "fetch.planned",
    *owned.FAULT_POINTS,
    "fetch.fetched",
    "fetch.named",
)
#: What is unpacked takes at least as much as what is downloaded, which podman keeps until all is unpacked.
_COPIES: Final = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """How an image is fetched. ``imports``: it is brought into the repository then, as ``sharing`` says.

    ``expect_digest``: the digest that its manifest must have. ``signed``: the signature policy has to demand
    a signature. ``local_first``: one that root's own store has under the name is copied from there, without
    asking its source. ``minimum_free`` and ``accept``: as in ``pull_image``.
    """

    reference: ImageReference
    sharing: Sharing = Sharing.AUTO
    expect_digest: str | None = None
    signed: bool = False
    imports: bool = True
    local_first: bool = False
    minimum_free: int = 0
    accept: Callable[[ManifestDigest], None] | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is in the store now. Bytes are counted as transferred; ``layers_present`` and what is not among
    ``bytes_fetched`` were there before.
    """

    reference: ImageReference
    name: str
    image_id: str
    manifest_digest: SourceDigest
    layers_total: int
    layers_present: int
    bytes_total: int
    bytes_fetched: int

    def as_dict(self) -> dict[str, Any]:
        """For the bus: strings, booleans and numbers."""
        return {
            "reference": str(self.reference),
            "unified": True,
            "stored-as": self.name,
            "image-id": self.image_id,
            "source-digest": str(self.manifest_digest),
            "layers-total": self.layers_total,
            "layers-present": self.layers_present,
            "bytes-total": self.bytes_total,
            "bytes-fetched": self.bytes_fetched,
        }


def fetch_image(
    paths: HostPaths,
    wanted: Wanted,
    *,
    verity: Verity,
    lock_timeout: float,
    reporter: Reporter,
    patience: Patience = DEFAULT_PATIENCE,
    label: Labeller | None = None,
) -> Fetched:
    """Fetch an image into the store of ``paths``, which is made if there is none, beside a repository.

    Before: the caller holds the job lock, and calls from a thread that lives until this returns. After: the
    image has its name in the store, and all its layers. When it raises, no name leads to anything else than
    before. ``label``: see ``owned.ensure``.

    Raises ``SharingImpossible``, before anything is downloaded, where files would have to be copied and
    ``wanted.sharing`` is not ``Sharing.COPY``; the errors of sources, of podman and of repositories.
    """
    reporter.phase(Phase.RESOLVING)
    reporter.at("fetch.started")
    repository, _ = Repository.ensure(
        paths.repository,
        verity=verity,
        lock_timeout=lock_timeout,
        check=lambda: reporter.at("fetch.locking"),
    )
    with repository:
        repository.check_writable()
        if wanted.imports and wanted.sharing is not Sharing.COPY:
            _require_sharing(repository, paths.store)
        with private_directory(paths.temporary, "fetch-") as work_dir:
            fetch = _Fetch(paths, wanted, repository, work_dir, reporter, lock_timeout, patience)
            return fetch.run(label)


def _require_sharing(repository: Repository, store: Path) -> None:
    if not repository.can_share(store).any:
        raise SharingImpossible(
            f"files of containers-storage at {store} could neither be cloned nor linked into "
            f"{repository.path}: nothing is downloaded"
        )


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What the name turned out to be; ``missing`` are digests and sizes of blobs that are to be fetched, and
    ``here`` are layers of the repository that the store lacks, if these need not be.
    """

    digest: SourceDigest
    raw: bytes
    raw_config: bytes
    plans: tuple[LayerPlan, ...]
    here: tuple[LayerPlan, ...]
    manifest: Manifest
    layers_total: int
    layers_present: int
    missing: dict[str, int]
    #: The image in the store, if it is all there.
    stored: StoredImage | None

    @property
    def fetch_size(self) -> int:
        """Bytes that are to be fetched, the configuration among them."""
        if self.stored is not None:
            return 0
        return sum(self.missing.values()) + self.manifest.config.size


class _Fetch:
    """One fetch; the store is open where there is one."""

    def __init__(
        self,
        paths: HostPaths,
        wanted: Wanted,
        repository: Repository,
        work_dir: Path,
        reporter: Reporter,
        lock_timeout: float,
        patience: Patience,
    ) -> None:
        self._paths = paths
        self._repository = repository
        self._wanted = wanted
        self._reference = wanted.reference
        self._name = name_in_store(wanted.reference)
        self._work_dir = work_dir
        self._reporter = reporter
        self._lock_timeout = lock_timeout
        self._patience = patience
        self._transfer: Transfer | None = None

    def run(self, label: Labeller | None) -> Fetched:
        """See ``fetch_image``."""
        resolved = self._resolve()
        self._reporter.at("fetch.resolved")
        self._begin(resolved)
        self._reporter.at("fetch.planned")
        if resolved.stored is None:
            owned.ensure(self._paths, self._work_dir, self._reporter.at, label)
            with owned.podman(self._paths, self._work_dir, self._check, self._reference.real_path) as podman:
                before = self._names()
                transfer = self._transfer or self._other_transfer(resolved)
                image_id = transfer.run(podman, self._name, resolved.missing, self._reporter)
                self._reporter.at("fetch.fetched")
                self._rename(podman, image_id, before)
        elif self._name not in resolved.stored.names:
            image_id = resolved.stored.id
            with owned.podman(self._paths, self._work_dir, self._check) as podman:
                podman.tag(image_id, self._name)
        else:
            image_id = resolved.stored.id
        self._reporter.at("fetch.named")
        return self._result(resolved, image_id)

    def _other_transfer(self, resolved: _Resolved) -> Transfer:
        """The way into the store of what is in no other store."""
        if self._reference.transport is not Transport.DOCKER:
            return Copying.from_source(self._paths, self._reference, resolved.manifest.config_digest)
        return self._feeding(resolved) if resolved.here else Downloading(self._reference)

    def _check(self) -> None:
        self._reporter.at("fetch.waiting")

    # --- before --------------------------------------------------------------------------------------------

    def _resolve(self) -> _Resolved:
        with self._open() as source:
            fetched = source.manifest()
            expected = self._wanted.expect_digest
            if expected not in (None, str(fetched.source_digest), str(SourceDigest.of_content(fetched.raw))):
                raise PreconditionFailed(
                    f"the manifest of {self._reference} is {fetched.source_digest}, not the expected "
                    f"{expected}"
                )
            manifest = parse_manifest(fetched.raw)
            raw_config = source.config(manifest.config)
        plans = plan_layers(manifest, parse_config(raw_config) if manifest.is_container else None)
        stored, present = self._stored(fetched.source_digest, manifest.config_digest)
        if stored is None and self._wanted.accept is not None:
            self._wanted.accept(ManifestDigest.of_content(fetched.raw))
        lacking = {plan.id: plan for plan in plans if plan.id not in present}
        here = self._here(lacking.values(), fetched)
        missing = {
            plan.descriptor.digest: plan.descriptor.size for plan in lacking.values() if plan not in here
        }
        total = len(manifest.layers)
        return _Resolved(
            fetched.source_digest,
            fetched.raw,
            raw_config,
            plans,
            here,
            manifest,
            total,
            total - sum(layer.digest in missing for layer in manifest.layers),
            missing,
            stored,
        )

    def _open(self) -> ImageSource:
        """The image at its source, for its manifest and configuration; decides how it is fetched."""
        local = self._local()
        if local is not None:
            try:
                found = StorageSource(
                    self._reference,
                    self._paths.containers.storage,
                    {},
                    lock_timeout=self._lock_timeout,
                    check=self._check,
                    wanted=local,
                )
            except ImageNotFound:
                pass
            else:
                self._transfer = Copying.from_store(self._paths, self._reference, found.image)
                return found
        source = open_source(
            self._reference,
            self._paths,
            self._work_dir,
            self._reporter,
            self._patience,
            look=True,
            signed=self._wanted.signed,
            lock_timeout=self._lock_timeout,
        )
        if isinstance(source, StorageSource):
            self._transfer = Copying.from_store(self._paths, self._reference, source.image)
        return source

    def _local(self) -> StorageName | None:
        """The image in root's own store, if it may be taken from there: signatures are not kept with it."""
        named = self._reference.named
        if not self._wanted.local_first or self._wanted.signed or named is None:
            return None
        if not self._accepts_anything():
            return None
        return StorageName(None, str(named), "")

    def _here(self, lacking: Iterable[LayerPlan], fetched: FetchedManifest) -> tuple[LayerPlan, ...]:
        """Those of the layers that are in the repository, if they can be taken from there.

        Not where signatures are asked for, which podman has to see with the image as it is; and a converted
        manifest is not that of the image.
        """
        if self._transfer is not None or self._reference.transport is not Transport.DOCKER:
            return ()
        if SourceDigest.of_content(fetched.raw) != fetched.source_digest or not self._accepts_anything():
            return ()
        return tuple(plan for plan in lacking if stored_layer(self._repository, plan) is not None)

    def _accepts_anything(self) -> bool:
        return requirement(self._paths.containers.policy, self._reference).accepts_anything

    def _stored(
        self, digest: SourceDigest, config: ConfigDigest
    ) -> tuple[StoredImage | None, dict[DiffId, Any]]:
        """The image in the store, if all of it is there, and the layers of the store.

        Where signatures are asked for podman has to see the image in any case; it fetches no layer again.
        """
        store = self._store()
        if store is None:
            return None, {}
        with store:
            layers: dict[DiffId, Any] = dict(store.layers())
            if not self._accepts_anything():
                return None, layers
            candidates = [
                image for image in store.images() if str(digest) in image.digests or image.id == config.hex
            ]
            return next(filter(_is_complete, candidates), None), layers

    def _store(self) -> Store | None:
        return owned.open_store(self._paths, lock_timeout=self._lock_timeout, check=self._check)

    def _begin(self, resolved: _Resolved) -> None:
        """Make room for what is missing sure, and say how much there is to do."""
        total = resolved.manifest.total_size
        if self._wanted.imports:
            self._reporter.importing(0, max(total, 1))
        self._reporter.totals(total, max(total - resolved.fetch_size, 0))
        needed = _COPIES * sum(resolved.missing.values()) if resolved.stored is None else 0
        place = self._paths.store if owned.exists(self._paths) else self._paths.repository
        require_space(self._reference, place, needed, self._wanted.minimum_free)
        if resolved.stored is None:
            self._reporter.advance(resolved.manifest.config.size)
        self._reporter.phase(Phase.PULLING)

    def _feeding(self, resolved: _Resolved) -> Transfer:
        return Feeding(
            self._paths.containers,
            self._reference,
            self._repository,
            resolved.raw,
            (resolved.manifest.config_digest, resolved.raw_config),
            resolved.plans,
            resolved.here,
            lambda: open_source(self._reference, self._paths, self._work_dir, self._reporter, self._patience),
        )

    # --- after ---------------------------------------------------------------------------------------------

    def _rename(self, podman: Podman, image_id: str, before: frozenset[str]) -> None:
        """See to it that the image has its name, and no new one that podman made of a path."""
        names = self._image(image_id).names
        if self._name not in names:
            podman.tag(image_id, self._name)
            podman.untag(image_id, *(name for name in names if name not in before))

    def _names(self) -> frozenset[str]:
        """All names in the store."""
        store = self._store()
        if store is None:
            return frozenset()
        with store:
            return frozenset(name for image in store.images() for name in image.names)

    def _image(self, image_id: str) -> StoredImage:
        store = self._store()
        found = None
        if store is not None:
            with store:
                found = store.find(image_id)
                if found is not None and not found.complete:
                    found = None
        if found is None:
            raise StoreDamaged(
                root=self._paths.store, detail=f"podman left no whole image of {self._reference}"
            )
        return found

    def _result(self, resolved: _Resolved, image_id: str) -> Fetched:
        store = self._store()
        if store is None:
            raise StoreDamaged(root=self._paths.store, detail="it is gone")
        with store:
            image = store.find(image_id)
            if image is None or not image.complete or self._name not in image.names:
                raise StoreDamaged(root=store.root, detail=f"there is no whole image {self._name}")
            digest = resolved.digest
            if str(digest) in image.digests:
                pass
            elif image.id == resolved.manifest.config_digest.hex and digest == SourceDigest.of_content(
                resolved.raw
            ):
                # The same configuration, so the same image; its manifest is kept for the import.
                _keep_manifest(self._paths.fetched_manifest, resolved.raw)
            else:
                # The name means another image than a moment ago, or podman wrote a manifest of its own.
                digest = SourceDigest.of_content(image.manifest())
        if digest != resolved.digest and self._wanted.expect_digest is not None:
            raise PreconditionFailed(
                f"the manifest of {self._reference} is {digest} now, not the expected "
                f"{self._wanted.expect_digest}"
            )
        return Fetched(
            self._reference,
            self._name,
            image_id,
            digest,
            resolved.layers_total,
            resolved.layers_present,
            resolved.manifest.total_size,
            resolved.fetch_size,
        )


def _keep_manifest(path: Path, raw: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, raw)
    except OSError as error:
        raise from_os_error(error, f"cannot write {path}") from error


def _is_complete(image: StoredImage) -> bool:
    try:
        return image.complete
    except StoreDamaged:
        return False
