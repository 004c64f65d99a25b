"""Images that did not start: remembered, so that nothing takes them again by itself.

The check of a boot (``bootcheck``) writes down the deployment that was to run and does not, in
``state/hostimaged/failed-boots.json``::

    {"version": 1, "deployments": [
        {"deployment": "<deployment id>", "manifest-digest": "sha256:…", "time": 1767225600}]}

``manifest-digest`` is left out where it is not known, ``time`` is in seconds since the epoch. Once such a
deployment runs after all it is forgotten. Not here: what is to be booted, and whether it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import HostimageError, PreconditionFailed
from hostimaged.host.statefile import read_document, write_document
from hostimaged.ids import DeploymentId, ManifestDigest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.system.paths import HostPaths

VERSION: Final = 1
#: Deployments that are remembered, the newest: a host tries one image after the other.
MAX_FAILED: Final = 16
#: So many rows of two digests.
MAX_SIZE: Final = 16 << 10
_LAST_TIME: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class FailedBoot:
    """A deployment that was to boot and did not, at ``time`` seconds since the epoch."""

    deployment: DeploymentId
    manifest_digest: ManifestDigest | None
    time: int


def read(paths: HostPaths) -> tuple[FailedBoot, ...]:
    """What is remembered, the oldest first; a file that cannot be understood counts as none."""
    document = read_document(paths.failed_boots, MAX_SIZE, VERSION)
    if document is None:
        return ()
    try:
        return tuple(_rows(document["deployments"]))
    except (HostimageError, ValueError, KeyError, TypeError):
        return ()


def _rows(document: list[dict[str, Any]]) -> Iterator[FailedBoot]:
    for row in document[-MAX_FAILED:]:
        digest, time = dict(row).get("manifest-digest"), row["time"]
        if not isinstance(time, int) or not 0 <= time < _LAST_TIME:
            raise ValueError
        yield FailedBoot(
            DeploymentId(row["deployment"]), None if digest is None else ManifestDigest(digest), time
        )


def remember(
    paths: HostPaths, known: tuple[FailedBoot, ...], failed: FailedBoot | None, runs: DeploymentId
) -> None:
    """Add ``failed`` to what is ``known``, and forget the deployment that ``runs``; writes only what changes.

    Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    kept = [row for row in known if row.deployment != runs]
    if failed is not None:
        kept = [row for row in kept if row.deployment != failed.deployment] + [failed]
    if tuple(kept) == known:
        return
    rows = [
        {"deployment": str(row.deployment), "time": row.time}
        | ({} if row.manifest_digest is None else {"manifest-digest": str(row.manifest_digest)})
        for row in kept[-MAX_FAILED:]
    ]
    write_document(paths.failed_boots, {"version": VERSION, "deployments": rows})


def refuse(
    known: tuple[FailedBoot, ...], manifest_digest: ManifestDigest, deployment: DeploymentId | None = None
) -> None:
    """Raise ``PreconditionFailed`` for an image that did not start, or the deployment of it."""
    for row in known:
        if row.manifest_digest == manifest_digest or row.deployment == deployment:
            raise PreconditionFailed(
                f"the image {manifest_digest} did not start when it was last to be booted "
                f"(deployment {row.deployment}); it is taken again with the option retry-failed"
            )
