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
    from hostimaged.composefs.repository import Verity
    from hostimaged.oci.pull import pull_image
    from hostimaged.oci.reference import ImageReference

    try:
        result = pull_image(
            paths,
            ImageReference.parse(operation.reference),
            expect_digest=operation.expect_digest,
            verity=Verity(operation.verity),
            lock_timeout=operation.lock_timeout,
            reporter=channel,
        )
    finally:
        # A failure here must not hide the outcome; the daemon scans again if it was told nothing.
        with suppress(HostimageError):
            scan(paths, None, channel)
    return result.as_dict()


def check(paths: HostPaths, operation: operations.Check, channel: Channel) -> dict[str, Any]:
    """Look for a newer image."""
    from hostimaged.oci.check import check_image
    from hostimaged.oci.reference import ImageReference

    return check_image(paths, ImageReference.parse(operation.reference), channel).as_dict()


def scan(paths: HostPaths, operation: operations.Scan | None, channel: Channel) -> None:
    """Read the state of the host; at the end of a job, which has no ``operation`` for it, sizes as well."""
    from hostimaged.host.status import scan as scan_host

    reclaimable = None if operation is not None else partial(_reclaimable, paths, channel)
    channel.status(scan_host(paths, reclaimable=reclaimable))


def _reclaimable(paths: HostPaths, channel: Channel, repository: Repository, state: HostState) -> int | None:
    """Bytes that a collection of garbage would free; None if that cannot be told, or the job is to stop."""
    from hostimaged import config
    from hostimaged.host.collect import dry_run
    from hostimaged.host.collectplan import Rules

    settings, _ = config.load(paths.settings)
    rules = Rules(settings.tracked_image, settings.keep_pulled, settings.minimum_free)
    try:
        found = dry_run(paths, repository, state, rules, now=int(time.time()), reporter=channel)
    except HostimageError:
        return None
    return int(found["objects-bytes"])
