"""What is on this host: the facts of the status document, read without a lock and without changing anything.

The result is plain data for the status cache: ``repository`` (``algorithm``, ``formats``, ``secure``,
``used`` in bytes) or None, ``images`` (a row for each tag, see ``bus.status.ImageRow``), ``problems``
(``id``, ``severity``, ``text``). Damage costs a row its details or adds a problem; it is never raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.errors import HostimageError
from hostimaged.oci import pulls
from hostimaged.oci.images import list_images, pull_tag

if TYPE_CHECKING:
    from hostimaged.oci.images import ImageRow
    from hostimaged.oci.pulls import PullRow
    from hostimaged.system.paths import HostPaths

_ERROR: Final = "error"
_WARNING: Final = "warning"


def scan(paths: HostPaths) -> dict[str, Any]:
    """Read the repository and the list of pulls; see the module for the result. Never raises for damage."""
    try:
        with Repository.open_unlocked(paths.repository) as opened:
            return scan_repository(paths, opened)
    except RepositoryMissing:
        # Before the first pull.
        return scan_repository(paths, None)
    except HostimageError as error:
        found = scan_repository(paths, None)
        found["problems"].append(_problem("repository", _ERROR, error))
        return found


def scan_repository(paths: HostPaths, opened: Repository | None, *, used: bool = True) -> dict[str, Any]:
    """As ``scan``, of a repository that is open; None: there is none. ``used`` may be left out."""
    problems: list[dict[str, str]] = []
    rows = _pulls(paths, problems)
    repository: dict[str, Any] | None = None
    images: list[dict[str, Any]] = []
    if opened is not None:
        try:
            images = [_image(row, rows) for row in list_images(opened)]
            repository = _repository(opened, problems, used=used)
        except HostimageError as error:
            problems.append(_problem("repository", _ERROR, error))
    return {"repository": repository, "images": images, "problems": problems}


def _pulls(paths: HostPaths, problems: list[dict[str, str]]) -> list[PullRow]:
    try:
        return pulls.load(paths.pulls)
    except HostimageError as error:
        problems.append(_problem("pulls", _WARNING, error))
        return []


def _repository(repository: Repository, problems: list[dict[str, str]], *, used: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "algorithm": repository.algorithm.label,
        "formats": [kind.label for kind in repository.formats.in_order()],
        "secure": repository.secure,
    }
    if used:
        try:
            found["used"] = repository.used_bytes()
        except HostimageError as error:
            problems.append(_problem("objects", _ERROR, error))
    return found


def _image(row: ImageRow, rows: list[PullRow]) -> dict[str, Any]:
    digest = row.manifest_digest
    found: dict[str, Any] = {
        "tag": row.tag,
        "manifest-digest": None if digest is None else str(digest),
        "config-digest": None if row.config_digest is None else str(row.config_digest),
        "version": row.version or None,
        "size": row.size,
        "image-ids": [id_.hex() for id_ in row.image_ids.values()] or None,
        "artifact": row.artifact,
        "deployed": False,
        "problem": row.problem or None,
    }
    if digest is not None and row.tag == pull_tag(digest):
        pulled = next((pull for pull in reversed(rows) if pull.manifest_digest == digest), None)
        if pulled is not None:
            found["reference"] = pulled.reference
            found["source-digest"] = str(pulled.source_digest)
            found["pulled"] = pulled.time
        elif row.tagged is not None:
            found["pulled"] = max(int(row.tagged), 0)
    return {key: value for key, value in found.items() if value is not None}


def _problem(subject: str, severity: str, error: HostimageError) -> dict[str, str]:
    return {"id": subject, "severity": severity, "text": error.message}
