"""What is on this host, as plain data for the status cache: deployments, images, repository, problems.

The deployments' part of the native status document (``status.schema.json``), and the whole findings of a
scan. Nothing here takes a lock, writes, or raises for damage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.errors import BootLoaderError, HostimageError, UnsupportedImage
from hostimaged.host import bootc_v1, bootcheck, boundimages, boundstore, espmount
from hostimaged.host.model import Problem, ProblemId, Role, Severity
from hostimaged.host.read import read_host
from hostimaged.host.sizes import contents_of
from hostimaged.host.texts import shown
from hostimaged.host.unified import stored_names
from hostimaged.oci.scan import scan_repository
from hostimaged.system.boot import read_boot_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.host.boundimages import BoundImage
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.ids import DeploymentId
    from hostimaged.system.paths import HostPaths

    _Presence: TypeAlias = tuple[BoundImage, bool | None]
    Bound: TypeAlias = dict[DeploymentId, list[_Presence] | Problem]

#: Seconds that a lock of bootc's store is waited for: a status must not be late for podman's sake.
_STORE_TIMEOUT: Final = 0.5


def scan(
    paths: HostPaths,
    *,
    whole: bool = False,
    used: bool = True,
    reclaimable: Callable[[Repository, HostState], int | None] | None = None,
) -> dict[str, Any]:
    """Everything that the status cache has (``bus.findings.Findings``).

    The repository is opened once, and so is the ESP, which is given back. ``whole``: not without the ESP;
    raises ``BootLoaderError`` if it cannot be mounted, which else is a problem. ``used``: whether to find out
    how much the objects take, and ``reclaimable`` how many bytes a collection of garbage would free; both
    take long.
    """
    problems: list[Problem] = []
    try:
        paths = espmount.seek(paths)
    except BootLoaderError as error:
        if whole:
            raise
        problems.append(Problem(ProblemId.BOOT_DIRECTORY, error.message))
        paths = replace(paths, esp_sought=True)
    try:
        return _scan(paths, problems, used=used, reclaimable=reclaimable)
    finally:
        espmount.release(paths)


def _scan(
    paths: HostPaths,
    problems: list[Problem],
    *,
    used: bool,
    reclaimable: Callable[[Repository, HostState], int | None] | None,
) -> dict[str, Any]:
    try:
        repository = Repository.open_unlocked(paths.repository)
    except RepositoryMissing:
        repository = None
    except HostimageError as error:
        repository = None
        problems.append(Problem(ProblemId.REPOSITORY, error.message))
    try:
        found = scan_repository(paths, repository, used=used)
        state = read_host(paths, repository, soft_reboots=True)
        bound = _bound(paths, repository, state)
        found["contents"] = "" if repository is None else contents_of(repository, state)
        if reclaimable is not None and repository is not None and found["repository"] is not None:
            found["repository"]["reclaimable"] = reclaimable(repository, state)
    finally:
        if repository is not None:
            repository.close()
    deployed = {str(row.manifest_digest) for row in state.visible}
    for image in found["images"]:
        image["deployed"] = image.get("manifest-digest") in deployed
    found["problems"] += [_problem(problem) for problem in (*problems, *state.problems)]
    found["stored-names"] = stored_names(paths)
    found["rollback-ordered"] = state.rollback_queued and _is_ordered(paths, state)
    return found | deployments(state, bound) | {"bootc": bootc_v1.document(state)}


def _is_ordered(paths: HostPaths, state: HostState) -> bool:
    """Whether what boots next was chosen since the boot, of us; not the default that somebody booted past."""
    expected, default = bootcheck.read_expected(paths), state.default_deployment
    return (
        expected is not None
        and default is not None
        and expected.deployment == default.id
        and expected.boot_id == read_boot_id(paths.boot_id)
    )


def _bound(paths: HostPaths, repository: Repository | None, state: HostState) -> Bound:
    """The images that deployments are bound to, or what is wrong with what says so.

    Where there is no image to look into, the deployment has a problem already.
    """
    found: Bound = {}
    if repository is None:
        return found
    for row in state.visible:
        try:
            images = boundimages.of_deployment(repository, row.id)
            found[row.id] = boundstore.presence(paths, images, lock_timeout=_STORE_TIMEOUT)
        except UnsupportedImage as error:
            found[row.id] = Problem(ProblemId.BOUND_IMAGES, error.message, Severity.WARNING)
        except HostimageError:
            continue
    return found


def deployments(state: HostState, bound: Bound | None = None) -> dict[str, Any]:
    """``deployments``, ``rollback-queued``, ``unsettled`` and ``host`` of the findings.

    ``unsettled``: there is a staged set that nothing will activate, as after a power cut. ``bound``: the
    images that deployments are bound to, and whether each is there.
    """
    known = bound or {}
    return {
        "unsettled": state.marker is None and state.sets.staged is not None,
        "deployments": [_row(row, place, known.get(row.id, [])) for place, row in enumerate(state.visible)],
        "rollback-queued": state.rollback_queued,
        "host": None if not state.visible else _host(state),
    }


def _host(state: HostState) -> dict[str, Any]:
    following = state.next_deployment
    booted = state.booted
    return {
        "bootloader": str(state.loader),
        "next": "" if following is None else str(following.id),
        "soft-rebooted": booted is not None and booted.soft_rebooted,
        "transient-root": booted is not None and booted.transient,
        "verity-optional": booted is not None and booted.optional,
        "usr-overlay": state.usr_overlay,
        "read-only": state.read_only,
    }


def _row(row: Deployment, place: int, known: list[_Presence] | Problem) -> dict[str, Any]:
    bound = [] if isinstance(known, Problem) else known
    problems = (*row.problems, known) if isinstance(known, Problem) else row.problems
    facts = row.image
    reference = None if row.origin is None else row.origin.reference
    files = [shown(entry.file_name) for entry in (row.live, row.staged) if entry is not None]
    return {
        "id": str(row.id),
        "image": "" if reference is None else reference.image_text,
        "image-digest": "" if row.manifest_digest is None else str(row.manifest_digest),
        "config-digest": "" if facts is None or facts.config_digest is None else str(facts.config_digest),
        "version": "" if facts is None else shown(facts.version),
        "timestamp": 0 if facts is None else facts.timestamp,
        "architecture": "" if facts is None else shown(facts.architecture),
        "boot-type": "" if row.boot_type is None else str(row.boot_type),
        "boot-digest": "" if row.boot_digest is None else str(row.boot_digest),
        "boot-entries": list(dict.fromkeys(files)),
        "kernel-arguments": shown(row.kernel_arguments),
        "booted": row.role is Role.BOOTED,
        "staged": row.role is Role.STAGED,
        "is-rollback": row.role is Role.ROLLBACK,
        "default": row.default,
        "pinned": row.pinned,
        "locked": row.locked,
        "soft-reboot-capable": row.soft_reboot.capable,
        "soft-reboot-obstacle": shown(row.soft_reboot.reason),
        "verity": str(row.verity),
        "order": place,
        "bound-images": [{"image": shown(image.image), "present": present} for image, present in bound],
        "problems": [_problem(problem) for problem in problems],
    }


def _problem(problem: Problem) -> dict[str, str]:
    return {
        "id": str(problem.id),
        "severity": str(problem.severity),
        "text": shown(espmount.public(problem.text)),
    }
