"""What operations on deployments do, inside a worker. Afterwards the daemon is told what there is now."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hostimaged.errors import HostimageError, PreconditionFailed
from hostimaged.ids import DeploymentId, ManifestDigest
from hostimaged.jobs import work
from hostimaged.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.host.session import Session
    from hostimaged.jobs import operations
    from hostimaged.jobs.channel import Channel
    from hostimaged.jobs.slices import Slices
    from hostimaged.system.paths import HostPaths


@contextmanager
def _session(paths: HostPaths, channel: Channel, lock_timeout: float) -> Iterator[Session]:
    """A session that has the repository for itself, as far as readers of ours are concerned."""
    from hostimaged.host.session import open_session

    try:
        with (
            channel.alone(),
            open_session(paths, channel, lock_timeout=lock_timeout) as session,
        ):
            yield session
    finally:
        # A failure here must not hide the outcome; the daemon scans again if it was told nothing.
        with suppress(HostimageError):
            work.scan_after(paths, channel)


@contextmanager
def _change(paths: HostPaths, channel: Channel, lock_timeout: float) -> Iterator[Session]:
    """A session that may change what boots next, and so what a soft reboot may start."""
    from hostimaged.host import softreboot

    with _session(paths, channel, lock_timeout) as session:
        try:
            yield session
        except Exception:
            # Half of it may be done: a staged deployment is gone, the new one is not there.
            with suppress(HostimageError):
                softreboot.cancel_outdated(session)
            raise
        softreboot.cancel_outdated(session)


class _InSlices(Silent):
    """Gives up the lock of the repository between steps of the work, where it is time to."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if self._slices.due():
            self._slices.take()


def upgrade(paths: HostPaths, operation: operations.Upgrade, channel: Channel) -> dict[str, Any]:
    """Fetch the image, which is staged then; or unlock what is staged."""
    if not operation.from_downloaded:
        return work.pull(paths, operation, channel)
    from hostimaged.host.stage import unlock

    with _change(paths, channel, operation.lock_timeout) as session:
        return unlock(session)


def stage(paths: HostPaths, operation: operations.Stage, channel: Channel) -> dict[str, Any]:
    """Stage an image of the repository."""
    from hostimaged.host.imgref import OriginReference
    from hostimaged.host.stage import StageRequest
    from hostimaged.host.stage import stage as stage_image
    from hostimaged.oci.reference import ImageReference

    request = StageRequest(
        ManifestDigest(operation.manifest_digest),
        OriginReference.of(ImageReference.parse(operation.reference)),
        locked=operation.download_only,
        allow_downgrade=operation.allow_downgrade,
        max_entries=operation.max_entries,
    )
    with _change(paths, channel, operation.lock_timeout) as session:
        return stage_image(session, request)


def unstage(paths: HostPaths, operation: operations.Unstage, channel: Channel) -> dict[str, Any]:
    """Take back what is staged."""
    from hostimaged.host.stage import unstage as take_back

    with _change(paths, channel, operation.lock_timeout) as session:
        return take_back(session)


def rollback(paths: HostPaths, operation: operations.Rollback, channel: Channel) -> dict[str, Any]:
    """Choose what boots next."""
    from hostimaged.host import reorder

    with _change(paths, channel, operation.lock_timeout) as session:
        match operation.action:
            case "rollback":
                return reorder.rollback(session)
            case "cancel":
                return reorder.cancel_rollback(session)
            case "default":
                if operation.deployment is None:
                    raise PreconditionFailed("no deployment is named")
                return reorder.make_default(session, DeploymentId(operation.deployment))


def delete(paths: HostPaths, operation: operations.Delete, channel: Channel) -> dict[str, Any]:
    """Remove a deployment."""
    from hostimaged.host import reorder

    with _change(paths, channel, operation.lock_timeout) as session:
        return reorder.delete(session, DeploymentId(operation.deployment))


def pin(paths: HostPaths, operation: operations.Pin, channel: Channel) -> dict[str, Any]:
    """Keep a deployment, or let it go."""
    from hostimaged.host.pins import set_pinned

    with _session(paths, channel, operation.lock_timeout) as session:
        return set_pinned(session, DeploymentId(operation.deployment), pinned=operation.pinned)


def kernel_arguments(
    paths: HostPaths, operation: operations.KernelArguments, channel: Channel
) -> dict[str, Any]:
    """Change the kernel arguments of what boots next."""
    from hostimaged.host import reorder

    with _change(paths, channel, operation.lock_timeout) as session:
        return reorder.set_kernel_arguments(session, operation.add, operation.remove)


def diff(paths: HostPaths, operation: operations.Diff, channel: Channel) -> dict[str, Any]:
    """Tell what is different between two deployments; the lock is held in slices.

    ``diff`` is the whole as JSON text (``hostimaged.host.diff``), beside it are its numbers.
    """
    from hostimaged.composefs.repository import Repository
    from hostimaged.host import diff as comparison
    from hostimaged.host import espmount
    from hostimaged.host.read import read_host
    from hostimaged.host.session import optional_verity
    from hostimaged.jobs.slices import reading

    old, new = DeploymentId(operation.deployment), DeploymentId(operation.other)
    # Before anything is waited for: others may want to write to the ESP.
    with Repository.open_unlocked(paths.repository) as repository, espmount.reached(paths) as found:
        both = comparison.Both.read(read_host(found, repository), old, new)
    with reading(
        paths.repository, channel, lock_timeout=operation.lock_timeout, insecure=optional_verity(paths)
    ) as (repository, slices):
        document = comparison.diff(repository, both, _InSlices(slices))
    numbers = {f"files-{key}": number for key, number in document["files"].items() if key != "list"}
    return {
        "diff": comparison.render(document),
        **numbers,
        "problems": document["problems"],
        "truncated": document["truncated"],
    }


def recover(paths: HostPaths, operation: operations.Recover, channel: Channel) -> dict[str, Any]:
    """Finish or take back what was interrupted; before the first pull there is nothing."""
    from hostimaged.composefs.repository import RepositoryMissing
    from hostimaged.host.recover import settle

    try:
        with _change(paths, channel, operation.lock_timeout) as session:
            settle(session)
    except RepositoryMissing:
        pass
    return {"result": "recovered"}


def soft_reboot(paths: HostPaths, operation: operations.SoftReboot, channel: Channel) -> dict[str, Any]:
    """Prepare what boots next for a soft reboot."""
    from hostimaged.host import softreboot
    from hostimaged.jobs.operations import NOT_NEEDED, PREPARED, SOFT_REBOOT

    with _session(paths, channel, operation.lock_timeout) as session:
        return {SOFT_REBOOT: PREPARED if softreboot.prepare(session) else NOT_NEEDED}
