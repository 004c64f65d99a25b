"""What each operation does, inside a worker: the seam between jobs and the code that does the work."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hostimaged.errors import HostimageError

if TYPE_CHECKING:
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
    """Read the state of the host; then, in a scan of its own (``operation``), how much space is taken."""
    from hostimaged.host.status import scan as scan_host

    channel.status(scan_host(paths, used=operation is None))
    if operation is None:
        return
    from hostimaged.host.sizes import measure

    sizes = measure(paths, operation.known, channel)
    if sizes is not None:
        exclusive = {str(id_): size for id_, size in sizes.exclusive.items()}
        channel.sizes(sizes.contents, sizes.used, exclusive)
