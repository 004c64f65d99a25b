"""What operations on the store of the host do, inside a worker."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hostimaged.errors import HostimageError
from hostimaged.jobs import work

if TYPE_CHECKING:
    from hostimaged.jobs import operations
    from hostimaged.jobs.channel import Channel
    from hostimaged.system.paths import HostPaths


def fetch(
    paths: HostPaths, operation: operations.Pull | operations.Upgrade | operations.Switch, channel: Channel
) -> dict[str, Any]:
    """Fetch an image into the store; ``unified`` False, with the reason, if it is to be pulled plainly."""
    from hostimaged.composefs.repository import Sharing, SharingImpossible, Verity
    from hostimaged.host.followed import demands_signature
    from hostimaged.host.storelabels import labeller
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.fetch import Wanted, fetch_image

    reference = ImageReference.parse(operation.reference)
    sharing = Sharing(operation.sharing)
    signed = demands_signature(paths, reference)
    wanted = Wanted(reference, sharing, operation.expect_digest, signed=signed)
    try:
        return fetch_image(
            paths,
            wanted,
            verity=Verity(operation.verity),
            lock_timeout=operation.lock_timeout,
            reporter=channel,
            label=labeller(paths),
        ).as_dict()
    except SharingImpossible as error:
        if sharing is Sharing.REQUIRE:
            raise
        channel.message(f"pulled without containers-storage: {error.message}")
        return {"unified": False, "not-unified": error.message}


def import_stored(paths: HostPaths, operation: operations.Import, channel: Channel) -> dict[str, Any]:
    """Bring what was fetched into the store into the repository.

    What was downloaded is told already, by the worker that did.
    """
    from hostimaged.composefs.repository import Sharing, Verity
    from hostimaged.ids import SourceDigest
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.imports import import_image

    try:
        result = import_image(
            paths,
            ImageReference.parse(operation.reference),
            operation.image_id,
            SourceDigest(operation.source_digest),
            verity=Verity(operation.verity),
            lock_timeout=operation.lock_timeout,
            reporter=channel,
            sharing=Sharing(operation.sharing),
        ).as_dict()
    finally:
        # A failure here must not hide the outcome; the daemon scans again if it was told nothing.
        with suppress(HostimageError):
            work.scan_after(paths, channel)
    for told in ("layers-total", "layers-present", "bytes-total", "bytes-fetched"):
        del result[told]
    return result | {"changed": result["changed"] or operation.fetched}


def unify(paths: HostPaths, operation: operations.Unify, channel: Channel) -> dict[str, Any]:
    """Have the image that updates follow in the store, or no image of a deployment any more."""
    from hostimaged.host import unified

    try:
        if operation.unified:
            return unified.begin(
                paths,
                operation.reference,
                verity=operation.verity,
                lock_timeout=operation.lock_timeout,
                reporter=channel,
            )
        return unified.end(paths, operation.reference, lock_timeout=operation.lock_timeout, reporter=channel)
    finally:
        with suppress(HostimageError):
            work.scan_after(paths, channel)
