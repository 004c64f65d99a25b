"""What each operation does, inside a worker: the seam between jobs and the code that does the work."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from hostimaged.errors import HostimageError

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.model import HostState
    from hostimaged.jobs import operations
    from hostimaged.jobs.channel import Channel
    from hostimaged.system.paths import HostPaths


def pull(
    paths: HostPaths, operation: operations.Pull | operations.Upgrade | operations.Switch, channel: Channel
) -> dict[str, Any]:
    """Fetch an image; whatever the outcome, tell the daemon what the repository holds now."""
    if operation.unified:
        from hostimaged.jobs.store_work import fetch

        return fetch(paths, operation, channel)
    from hostimaged.composefs.repository import Sharing, Verity
    from hostimaged.host import failedboots
    from hostimaged.host.followed import demands_signature
    from hostimaged.oci.pull import pull_image
    from hostimaged.oci.reference import ImageReference

    reference = ImageReference.parse(operation.reference)
    failed = () if operation.retry_failed else failedboots.read(paths)
    try:
        result = pull_image(
            paths,
            reference,
            expect_digest=operation.expect_digest,
            verity=Verity(operation.verity),
            lock_timeout=operation.lock_timeout,
            reporter=channel,
            signed=demands_signature(paths, reference),
            sharing=Sharing(operation.sharing),
            accept=lambda digest: failedboots.refuse(failed, digest),
            minimum_free=operation.minimum_free << 20,
        )
    finally:
        # A failure here must not hide the outcome; the daemon scans again if it was told nothing.
        with suppress(HostimageError):
            scan_after(paths, channel)
    return result.as_dict()


def check(paths: HostPaths, operation: operations.Check, channel: Channel) -> dict[str, Any]:
    """Look for a newer image."""
    from hostimaged.host.followed import demands_signature
    from hostimaged.oci.check import check_image
    from hostimaged.oci.reference import ImageReference

    reference = ImageReference.parse(operation.reference)
    return check_image(paths, reference, channel, signed=demands_signature(paths, reference)).as_dict()


def set_policy(paths: HostPaths, operation: operations.SetPolicy, _channel: Channel) -> None:
    """Choose how far updates go without being asked."""
    from hostimaged.host import updatepolicy

    updatepolicy.write(paths, operation.policy)


def scan(paths: HostPaths, operation: operations.Scan, channel: Channel) -> None:
    """Read the state of the host; then how much space is taken."""
    from hostimaged.host.status import scan as scan_host

    channel.status(scan_host(paths, used=False))
    from hostimaged.host.sizes import measure

    sizes = measure(paths, operation.known, channel)
    if sizes is not None:
        exclusive = {str(id_): size for id_, size in sizes.exclusive.items()}
        channel.sizes(sizes.contents, sizes.used, exclusive)


def scan_after(paths: HostPaths, channel: Channel) -> None:
    """Read the state of the host at the end of a job.

    Raises ``BootLoaderError`` where it takes more privileges than the job has to look at the boot entries:
    then the daemon, which was told nothing, scans itself.
    """
    from hostimaged.host.status import scan as scan_host

    channel.status(scan_host(paths, whole=True, reclaimable=partial(_reclaimable, paths, channel)))


def _reclaimable(paths: HostPaths, channel: Channel, repository: Repository, state: HostState) -> int | None:
    """Bytes that a collection of garbage would free; None if that cannot be told, or the job is to stop."""
    from hostimaged import config
    from hostimaged.host.collect import dry_run
    from hostimaged.host.collectplan import Rules

    settings, _ = config.load(paths.settings)
    # The store counts for nothing there.
    rules = Rules(settings.tracked_image, settings.keep_pulled, settings.minimum_free, store=False)
    try:
        found = dry_run(paths, repository, state, rules, now=int(time.time()), reporter=channel)
    except HostimageError:
        return None
    return int(found["objects-bytes"])
