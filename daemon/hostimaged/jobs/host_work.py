"""What operations on deployments do, inside a worker. Afterwards the daemon is told what there is now."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hostimaged.errors import HostimageError, NoSpace, PreconditionFailed
from hostimaged.ids import DeploymentId, ManifestDigest
from hostimaged.jobs import work
from hostimaged.progress import Phase, Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.collectplan import Rules
    from hostimaged.host.model import HostState
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
        retry_failed=operation.retry_failed,
        max_entries=operation.max_entries,
        bound_fetched=operation.bound_fetched,
    )
    with _change(paths, channel, operation.lock_timeout) as session:
        return stage_image(session, request)


def pull_bound(paths: HostPaths, operation: operations.PullBound, channel: Channel) -> dict[str, Any]:
    """Fetch the images that an image is bound to which is to be staged."""
    from hostimaged.composefs.repository import Repository
    from hostimaged.host import boundimages, boundstore
    from hostimaged.host.session import optional_verity

    with Repository.open(
        paths.repository,
        lock_timeout=operation.lock_timeout,
        insecure=optional_verity(paths),
        check=channel.check,
    ) as repository:
        bound = boundimages.of_deployment(repository, DeploymentId(operation.deployment))
    return boundstore.fetch(paths, bound, channel)


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


def collect(paths: HostPaths, operation: operations.Collect, channel: Channel) -> dict[str, Any]:
    """Collect garbage, or tell what that would remove; before the first pull there is none."""
    from hostimaged.composefs.repository import RepositoryMissing
    from hostimaged.host import collect as collection

    rules = _rules(operation)
    try:
        if not operation.dry_run:
            return _collect(paths, operation, channel, rules)
        with _reading(paths, channel, operation.lock_timeout) as repository:
            found = collection.dry_run(
                paths, repository, _state(paths, repository), rules, now=int(time.time()), reporter=channel
            )
            return found | {"dry-run": True}
    except RepositoryMissing:
        return {"result": "nothing"}


def _collect(
    paths: HostPaths, operation: operations.Collect, channel: Channel, rules: Rules
) -> dict[str, Any]:
    """A real collection; on a full disk one that first of all makes the room it takes."""
    from hostimaged.host import collect as collection

    try:
        with _session(paths, channel, operation.lock_timeout) as session:
            return collection.collect(session, rules)
    except NoSpace:
        with channel.alone():
            freed = collection.make_room(
                paths, rules, now=int(time.time()), lock_timeout=operation.lock_timeout, reporter=channel
            )
        if not freed:
            raise
        channel.message(f"the disk was full: {freed} bytes that nothing needs went first")
    with _session(paths, channel, operation.lock_timeout) as session:
        return collection.collect(session, rules)


def verify(paths: HostPaths, operation: operations.Verify, channel: Channel) -> dict[str, Any]:
    """Compare everything that is stored with its digests; the lock is held in slices.

    Damage is no failure of the job: the result tells of it. Before the first pull there is none.
    """
    from hostimaged.composefs.fsck_objects import object_sizes
    from hostimaged.composefs.repository import RepositoryMissing
    from hostimaged.host.damage import verification_of
    from hostimaged.host.session import optional_verity
    from hostimaged.jobs.slices import reading
    from hostimaged.oci import fsck

    channel.phase(Phase.VERIFYING)
    try:
        with reading(
            paths.repository, channel, lock_timeout=operation.lock_timeout, insecure=optional_verity(paths)
        ) as (repository, slices):
            sizes = object_sizes(repository.fileno())
            channel.totals(sum(sizes), 0)
            report = fsck.check(
                repository,
                give_up=channel.check,
                breaks=slices,
                advance=lambda directory: channel.advance(sizes[directory]),
            )
            return verification_of(paths, repository, report, _InSlices(slices)).as_dict()
    except RepositoryMissing:
        return {"ok": True, "text": "there is no repository yet"}


def repair(paths: HostPaths, operation: operations.Repair, channel: Channel) -> dict[str, Any]:
    """Get again what is damaged, or tell what that would be; before the first pull there is nothing.

    The shared lock is held throughout, as what is got again need not be referred to yet; in slices in a dry
    run.
    """
    from hostimaged.composefs.repository import Repository, RepositoryMissing
    from hostimaged.host.repair import repair as repair_repository
    from hostimaged.host.session import optional_verity
    from hostimaged.jobs.slices import reading

    insecure = optional_verity(paths)
    timeout = operation.lock_timeout
    try:
        if operation.dry_run:
            with reading(paths.repository, channel, lock_timeout=timeout, insecure=insecure) as (
                repository,
                slices,
            ):
                told = _InSlices(slices)
                return repair_repository(paths, repository, told, dry_run=True, breaks=slices).as_dict()
        with Repository.open(
            paths.repository, lock_timeout=timeout, insecure=insecure, check=channel.check
        ) as repository:
            return repair_repository(paths, repository, channel).as_dict()
    except RepositoryMissing:
        return {"ok": True, "text": "there is no repository yet"}
    finally:
        if operation.changes:
            with suppress(HostimageError):
                work.scan_after(paths, channel)


def explain(paths: HostPaths, operation: operations.Explain, channel: Channel) -> dict[str, Any]:
    """Tell why something is kept."""
    from hostimaged.composefs.repository import RepositoryMissing
    from hostimaged.errors import ImageNotFound
    from hostimaged.host.explain import Question
    from hostimaged.host.explain import explain as answer

    try:
        with _reading(paths, channel, operation.lock_timeout) as repository:
            state = _state(paths, repository)
            question = Question(paths, repository, state, _rules(operation), operation.what, int(time.time()))
            return answer(question, channel)
    except RepositoryMissing:
        raise ImageNotFound("there is no repository yet") from None


def _rules(operation: operations.Collect | operations.Explain) -> Rules:
    from hostimaged.host.collectplan import Rules

    return Rules(operation.tracked, operation.keep_pulled, operation.minimum_free)


def _state(paths: HostPaths, repository: Repository) -> HostState:
    from hostimaged.host.read import read_host

    return read_host(paths, repository)


@contextmanager
def _reading(paths: HostPaths, channel: Channel, lock_timeout: float) -> Iterator[Repository]:
    """The repository with its shared lock, held to the end: what is counted must not change meanwhile."""
    from hostimaged.host.session import optional_verity
    from hostimaged.jobs.slices import reading

    with reading(paths.repository, channel, lock_timeout=lock_timeout, insecure=optional_verity(paths)) as (
        repository,
        _,
    ):
        yield repository


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
    from hostimaged.composefs.repository import OldRepository, RepositoryMissing
    from hostimaged.host.upgrade import upgrade

    upgraded: dict[str, Any] = {}
    try:
        _settle(paths, operation, channel)
    except RepositoryMissing:
        pass
    except OldRepository:
        upgraded = upgrade(paths, channel, lock_timeout=operation.lock_timeout)
        _settle(paths, operation, channel)
    return {"result": "recovered", **upgraded}


def _settle(paths: HostPaths, operation: operations.Recover, channel: Channel) -> None:
    from hostimaged.host.recover import settle

    with _change(paths, channel, operation.lock_timeout) as session:
        settle(session)


def soft_reboot(paths: HostPaths, operation: operations.SoftReboot, channel: Channel) -> dict[str, Any]:
    """Prepare what boots next for a soft reboot."""
    from hostimaged.host import softreboot
    from hostimaged.jobs.operations import NOT_NEEDED, PREPARED, SOFT_REBOOT

    with _session(paths, channel, operation.lock_timeout) as session:
        return {SOFT_REBOOT: PREPARED if softreboot.prepare(session) else NOT_NEEDED}
