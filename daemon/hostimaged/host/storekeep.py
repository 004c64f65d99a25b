"""What of bootc's own containers-storage has to stay, and why; the rest of it goes with a collection.

An image stays if a deployment is of it, or bound to it, in whatever form that says so: by name, however it
is written, by the digest of its manifest or of a list that has it, by its configuration. So does what was
pulled into the repository and stays there, what a container uses, and what may be there for a deployment that
is about to be made. In doubt all of it stays. Facts: operations.md 7.2 D and 7.5, containers-storage.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError, ImageNotFound, ProgramMissing
from hostimaged.host import boundimages, storerecord
from hostimaged.host.imagefacts import ImageSource
from hostimaged.host.storeplan import NO_STORE, StorePlan
from hostimaged.ids import DeploymentId
from hostimaged.oci import pulls
from hostimaged.oci.boot_refs import boot_refs
from hostimaged.oci.reference import Transport
from hostimaged.oci.storage.contents import Contents
from hostimaged.oci.storage.names import StoreName
from hostimaged.oci.storage.naming import name_in_store
from hostimaged.oci.storage.store import Store, StoredImage, StoreMissing
from hostimaged.system.process import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.collectroots import Root, Roots
    from hostimaged.host.imgref import OriginReference
    from hostimaged.host.model import HostState
    from hostimaged.ids import ManifestDigest
    from hostimaged.system.paths import HostPaths

#: Seconds that an image stays that nobody is known to need: bootc fetches before it deploys.
GRACE: Final = 24 * 3600
#: Seconds that somebody else may hold a lock of the store; podman does while it unpacks a layer.
LOCK_TIMEOUT: Final = 10.0
#: Digits of an id in a text.
_SHORT: Final = 12
_IMAGE_ID: Final = re.compile(r"@[0-9a-f]{64}\Z")


@dataclass(slots=True)
class Wanted:
    """What has to stay, each with the reasons, for people."""

    names: list[tuple[StoreName, str]] = field(default_factory=list)
    #: By digest of a manifest, or of a list of manifests.
    digests: dict[str, list[str]] = field(default_factory=dict)
    #: By id of an image in a store, which is the digest of its configuration in hex.
    ids: dict[str, list[str]] = field(default_factory=dict)

    def add_name(self, name: StoreName, reason: str) -> None:
        """``name`` in any form stays, and so does the image of the digest in it."""
        self.names.append((name, reason))
        if name.digest:
            self.add_digest(name.digest, reason)

    def add_digest(self, digest: str, reason: str) -> None:
        """What has the manifest ``digest`` stays."""
        self.digests.setdefault(digest, []).append(reason)

    def add_id(self, image_id: str, reason: str) -> None:
        """The image ``image_id`` stays."""
        self.ids.setdefault(image_id, []).append(reason)

    def reasons(self, image: StoredImage) -> tuple[str, ...]:
        """Why ``image`` stays; () if it does not."""
        found = list(self.ids.get(image.id, ()))
        for digest in sorted(image.digests):
            found += self.digests.get(digest, ())
        found += [reason for name, reason in self.names if any(name.means(one) for one in image.names)]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class StoreSearch:
    """Where to look for what is needed. ``kept`` are the tags of ours that stay and are of no deployment."""

    paths: HostPaths
    repository: Repository
    state: HostState
    roots: Roots
    kept: Mapping[str, ManifestDigest]
    now: int

    def plan(self) -> StorePlan:
        """The plan for bootc's store. Never raises for damage, which is a doubt."""
        try:
            store = Store.open(self.paths.store, lock_timeout=LOCK_TIMEOUT)
        except StoreMissing:
            return NO_STORE
        except HostimageError as error:
            return StorePlan(doubts=(error.message,))
        with store:
            try:
                contents = Contents.read(store)
            except HostimageError as error:
                return StorePlan(doubts=(error.message,))
            wanted, doubts = self.wanted()
            plan = decide(contents, wanted, doubts, storerecord.read(self.paths.store_record), self.now)
        if plan.anything:
            try:
                find_program("podman")
            except ProgramMissing as error:
                return replace(plan, gone=(), layers=(), freed=0, doubts=(error.message,))
        return plan

    def wanted(self) -> tuple[Wanted, tuple[str, ...]]:
        """What has to stay in a store, and why that is not known for certain."""
        wanted = Wanted()
        doubts: list[str] = []
        images = ImageSource(self.repository)
        for root in self.roots.roots:
            doubts += self._add_root(wanted, images, root)
        if not wanted.names:
            doubts.append("no deployment tells the name of its image")
        doubts += self._add_pulled(wanted, images)
        return wanted, tuple(dict.fromkeys(doubts))

    # --- deployments ---------------------------------------------------------------------------------------

    def _add_root(self, wanted: Wanted, images: ImageSource, root: Root) -> Iterator[str]:
        """Add what the deployment ``root`` needs; gives what is in doubt."""
        who = f"deployment {root.id.value[:_SHORT]} ({', '.join(root.reasons)})"
        reason = f"the image of {who}"
        row = self.state.find(root.id)
        reference = None if row is None or row.origin is None else row.origin.reference
        if reference is not None:
            for name in names_of(reference):
                wanted.add_name(name, reason)
            if image_id := _image_id(reference):
                wanted.add_id(image_id, reason)
        facts = None if row is None else row.image
        if facts is not None and facts.config_digest is not None:
            wanted.add_id(facts.config_digest.hex, reason)
        elif root.manifest is None and reference is None:
            yield f"which image deployment {root.id} is of cannot be told"
        try:
            if root.manifest is not None:
                _add_manifest(wanted, images, root.manifest, reason)
        except HostimageError as error:
            yield error.message
        try:
            bound = boundimages.of_deployment(self.repository, root.id)
        except HostimageError as error:
            yield f"which images deployment {root.id} is bound to cannot be told: {error.message}"
            return
        _add_bound(wanted, bound, who)

    # --- what was pulled -----------------------------------------------------------------------------------

    def _add_pulled(self, wanted: Wanted, images: ImageSource) -> Iterator[str]:
        """Add what was pulled, pinned or tagged by us, and stays; and what its source called it."""
        rows: list[pulls.PullRow] = []
        with suppress(HostimageError):
            rows = pulls.load(self.paths.pulls)
        sources: dict[ManifestDigest, list[str]] = {}
        for row in rows:
            sources.setdefault(row.manifest_digest, []).append(str(row.source_digest))
        needed = {root.manifest for root in self.roots.roots if root.manifest is not None}
        for tag, digest in self.kept.items():
            try:
                _add_manifest(wanted, images, digest, f"tag {tag} keeps it")
            except ImageNotFound:
                # It leads nowhere, and goes.
                continue
            except HostimageError as error:
                yield error.message
            if digest not in needed:
                self._add_bound_of(wanted, images, digest, f"what tag {tag} keeps")
        for manifest in needed | set(self.kept.values()):
            for source in sources.get(manifest, ()):
                wanted.add_digest(source, f"it came as {manifest}")

    def _add_bound_of(self, wanted: Wanted, images: ImageSource, digest: ManifestDigest, who: str) -> None:
        """Of an image that is not deployed: they were fetched for a deployment that failed, or is to come."""
        with suppress(HostimageError):
            for object_id in boot_refs(images.open(digest).config_refs).values():
                with suppress(HostimageError):
                    deployment = DeploymentId.of_object(object_id)
                    _add_bound(wanted, boundimages.of_deployment(self.repository, deployment), who)
                    return


def _add_manifest(wanted: Wanted, images: ImageSource, digest: ManifestDigest, reason: str) -> None:
    """Add the image ``digest``, however it is known; raises as ``ImageSource.open``."""
    wanted.add_digest(str(digest), reason)
    wanted.add_id(images.open(digest).config_digest.hex, reason)


def _add_bound(wanted: Wanted, bound: Iterable[boundimages.BoundImage], who: str) -> None:
    for image in bound:
        wanted.add_name(image.name, f"bound to {who} by {image.unit}")


def names_of(reference: OriginReference) -> Iterator[StoreName]:
    """The names that an image has in a store which was pulled from ``reference``."""
    # bootc's own, for other transports than registries; and ours.
    yield StoreName(reference.image_text)
    if reference.image is not None:
        yield StoreName.parse(name_in_store(reference.image))
    if reference.transport is Transport.DOCKER:
        yield StoreName.parse(reference.name)
    elif reference.transport is Transport.CONTAINERS_STORAGE:
        # As it was written: what lacks a registry may be any's.
        name = _IMAGE_ID.sub("", reference.name.rpartition("]")[2])
        if name:
            yield StoreName.parse(name)


def _image_id(reference: OriginReference) -> str:
    """The id of an image in a store that a reference names, or ""."""
    if reference.transport is not Transport.CONTAINERS_STORAGE:
        return ""
    found = _IMAGE_ID.search(reference.name)
    return "" if found is None else found[0][1:]


# --- the decision ------------------------------------------------------------------------------------------


def decide(
    contents: Contents, wanted: Wanted, doubts: tuple[str, ...], known: frozenset[str], now: int
) -> StorePlan:
    """The plan for a store that has ``contents``. ``known`` are the ids that ``storerecord`` has.

    ``doubts``: why it is not certain that ``wanted`` is all. ``now`` is in seconds since the epoch.
    """
    reasons = {image.id: list(wanted.reasons(image)) for image in contents.images}
    needed = frozenset(image for image, found in reasons.items() if found)
    try:
        _add_listed(contents, reasons)
    except HostimageError as error:
        doubts = (*doubts, error.message)
    for image in contents.images:
        found = reasons[image.id]
        if image.id in contents.in_use:
            found.append("a container uses it")
        elif not found and image.id not in known and now - contents.changed(image) < GRACE:
            found.append("it is new: a deployment may be about to need it")
    stay = tuple((image, tuple(reasons[image.id])) for image in contents.images if reasons[image.id])
    gone = tuple(image for image in contents.images if not reasons[image.id])
    if doubts:
        return StorePlan(stay, doubts=doubts, needed=needed)
    old = tuple(top for top in contents.loose if now - contents.layer_changed(top) >= GRACE)
    return StorePlan(
        stay,
        gone,
        layers=old,
        spared=tuple(top for top in contents.loose if top not in old),
        freed=contents.freed({image.id for image in gone}, old),
        needed=needed,
    )


def _add_listed(contents: Contents, reasons: dict[str, list[str]]) -> None:
    """Keep the images of the lists that stay."""
    listed: dict[str, str] = {}
    for image in contents.images:
        if reasons[image.id] and not image.tops:
            listed.update(dict.fromkeys(_instances(image), f"part of the list {image.called}, which stays"))
    for image in contents.images:
        reasons[image.id] += sorted({listed[digest] for digest in image.digests if digest in listed})


def _instances(image: StoredImage) -> Iterator[str]:
    """Digests of the manifests of a list; of what is none, nothing."""
    try:
        document = json.loads(image.manifest())
    except (ValueError, RecursionError):
        return
    manifests = document.get("manifests") if isinstance(document, dict) else None
    for each in manifests if isinstance(manifests, list) else ():
        if isinstance(each, dict) and isinstance(each.get("digest"), str):
            yield each["digest"]


def find(plan: StorePlan, what: str) -> StoredImage:
    """The image of the store that ``what`` names: a name, an id or the beginning of one, or a digest.

    Raises ``ImageNotFound``.
    """
    images = [*(image for image, _ in plan.stay), *plan.gone]
    text = what.removeprefix("docker://").removeprefix("containers-storage:")
    name, identifier = StoreName.parse(text), text.removeprefix("sha256:")
    tests: tuple[Callable[[StoredImage], bool], ...] = (
        lambda image: image.id == identifier,
        lambda image: any(name.means(one) for one in image.names),
        lambda image: text in image.digests,
        lambda image: len(identifier) >= _SHORT and image.id.startswith(identifier),
    )
    for test in tests:
        for image in images:
            if test(image):
                return image
    raise ImageNotFound(f"there is no image {what!r} in the store")
