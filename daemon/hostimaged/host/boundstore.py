"""Bound images in bootc's own containers-storage: which are there, and fetching those that are not.

As in bootc an image that is there by its name is not fetched again, whatever its registry has under that name
now. Facts: bootc 1.16 (logically bound images). What an image is bound to is read in ``boundimages``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import HostimageError, ImageNotFound, ProgramMissing
from hostimaged.host import storerecord
from hostimaged.host.storelabels import labeller
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.names import StoreName
from hostimaged.oci.storage.store import Store, StoreMissing
from hostimaged.progress import Phase
from hostimaged.system.process import find_program
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.host.boundimages import BoundImage
    from hostimaged.oci.storage.podman import Podman
    from hostimaged.oci.storage.store import StoredImage
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``: after each image, and those of ``owned.ensure`` before.
FAULT_POINTS: Final = ("bound.fetched",)
#: Seconds that a lock of the store is waited for by what only looks at it.
LOCK_TIMEOUT: Final = 10.0


def missing(paths: HostPaths, bound: Iterable[BoundImage]) -> tuple[BoundImage, ...]:
    """Those of ``bound`` that are not in the store, all of them if there is none.

    Raises ``LockTimeout``, and ``StoreDamaged`` or ``StorageError`` if the store cannot be read.
    """
    wanted = tuple(bound)
    if not wanted:
        return ()
    there = _images(paths, LOCK_TIMEOUT)
    return tuple(image for image in wanted if find(there, image.name) is None)


def presence(
    paths: HostPaths, bound: Iterable[BoundImage], *, lock_timeout: float
) -> list[tuple[BoundImage, bool | None]]:
    """Each of ``bound``, and whether it is in the store; None if nobody can tell. Never raises for damage."""
    wanted = tuple(bound)
    try:
        there = _images(paths, lock_timeout) if wanted else ()
    except HostimageError:
        return [(image, None) for image in wanted]
    return [(image, find(there, image.name) is not None) for image in wanted]


def fetch(paths: HostPaths, bound: Iterable[BoundImage], reporter: Reporter) -> dict[str, Any]:
    """Put those of ``bound`` into the store that are not there, making it if need be.

    The result has ``bound-fetched``, their names, if there were any. The caller holds the job lock. Raises
    ``ProgramMissing`` without podman, what sources of images raise, ``NoSpace``, ``ReadOnly``,
    ``StorageError``, ``LockTimeout``, ``Cancelled``; then images before the one that failed are there.
    """
    wanted = missing(paths, bound)
    if not wanted:
        return {}
    # Before a store is made that nothing would fill.
    try:
        find_program("podman")
    except ProgramMissing:
        detail = f"it would fetch {wanted[0].image}, which the image is bound to"
        raise ProgramMissing(detail, program="podman") from None
    reporter.phase(Phase.PULLING)
    with private_directory(paths.temporary, "bound-") as work:
        owned.ensure(paths, work, reporter.at, labeller(paths))
        with owned.podman(paths, work, lambda: reporter.at("bound.podman")) as podman:
            for count, image in enumerate(wanted, 1):
                reporter.message(f"fetching {image.image}, bound image {count} of {len(wanted)}")
                _pull(podman, image, reporter)
                _remember(paths, image)
                reporter.at("bound.fetched")
    return {"bound-fetched": [image.image for image in wanted]}


def _pull(podman: Podman, image: BoundImage, reporter: Reporter) -> None:
    reference = ImageReference.parse(f"docker://{image.name.normal}")
    podman.run(["image", "pull", "--", image.image], reference=reference)


def _remember(paths: HostPaths, image: BoundImage) -> None:
    """Note that we put it there, so that it goes as soon as nothing needs it; it must be there."""
    with Store.open(paths.store, lock_timeout=LOCK_TIMEOUT) as store:
        found = find(store.images(), image.name)
        if found is None or not found.complete:
            raise ImageNotFound(f"podman pulled {image.image}, but it is not in {paths.store}")
    storerecord.write(paths.store_record, storerecord.read(paths.store_record) | {found.id})


def find(there: Iterable[StoredImage], name: StoreName) -> StoredImage | None:
    """The image that is called ``name``, or is of the digest in it."""
    return next((image for image in there if _is(image, name)), None)


def _is(image: StoredImage, name: StoreName) -> bool:
    if any(name.means(one) for one in image.names):
        return True
    if not name.digest or name.digest not in image.digests:
        return False
    # The same digest under another name of the same repository; podman would find it by that as well.
    return any(StoreName.parse(one).repository == name.repository for one in image.names)


def _images(paths: HostPaths, lock_timeout: float) -> tuple[StoredImage, ...]:
    try:
        with Store.open(paths.store, lock_timeout=lock_timeout) as store:
            return store.images()
    except StoreMissing:
        return ()
