"""What is on this host, as plain data for the status cache: deployments, images, repository, problems.

The deployments' part of the native status document (``status.schema.json``), and the whole findings of a
scan. Nothing here takes a lock, writes, or raises for damage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.errors import HostimageError
from hostimaged.host import bootc_v1
from hostimaged.host.model import Problem, ProblemId, Role
from hostimaged.host.read import read_host
from hostimaged.host.texts import shown
from hostimaged.oci.scan import scan_repository

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostimaged.host.model import Deployment, HostState
    from hostimaged.system.paths import HostPaths


def scan(
    paths: HostPaths,
    *,
    esp: Path | None = None,
    reclaimable: Callable[[Repository, HostState], int | None] | None = None,
) -> dict[str, Any]:
    """Everything that the status cache has (``bus.findings.Findings``).

    The repository is opened once. ``esp``: where the caller has mounted the ESP, if it is not mounted.
    ``reclaimable`` finds out how many bytes a collection of garbage would free, which takes long.
    """
    problems: list[Problem] = []
    try:
        repository = Repository.open_unlocked(paths.repository)
    except RepositoryMissing:
        repository = None
    except HostimageError as error:
        repository = None
        problems.append(Problem(ProblemId.REPOSITORY, error.message))
    try:
        found = scan_repository(paths, repository)
        state = read_host(paths, repository, esp=esp, soft_reboots=True)
        if reclaimable is not None and repository is not None and found["repository"] is not None:
            found["repository"]["reclaimable"] = reclaimable(repository, state)
    finally:
        if repository is not None:
            repository.close()
    deployed = {str(row.manifest_digest) for row in state.visible}
    for image in found["images"]:
        image["deployed"] = image.get("manifest-digest") in deployed
    found["problems"] += [_problem(problem) for problem in (*problems, *state.problems)]
    return found | deployments(state) | {"bootc": bootc_v1.document(state)}


def deployments(state: HostState) -> dict[str, Any]:
    """``deployments``, ``rollback-queued``, ``unsettled`` and ``host`` of the findings.

    ``unsettled``: there is a staged set that nothing will activate, as after a power cut.
    """
    return {
        "unsettled": state.marker is None and state.sets.staged is not None,
        "deployments": [_row(row, place) for place, row in enumerate(state.visible)],
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


def _row(row: Deployment, place: int) -> dict[str, Any]:
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
        "problems": [_problem(problem) for problem in row.problems],
    }


def _problem(problem: Problem) -> dict[str, str]:
    return {"id": str(problem.id), "severity": str(problem.severity), "text": shown(problem.text)}
