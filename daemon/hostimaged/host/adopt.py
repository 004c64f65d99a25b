"""Takes over deployments that an older bootc made: names their manifests, and keeps them by tags.

The one function here writes; it is for mutating jobs, which hold the job lock and the repository's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostimaged.errors import HostimageError, from_os_error
from hostimaged.host.model import Role
from hostimaged.host.origin import origin_name, read_origin
from hostimaged.host.statedirs import state_directory
from hostimaged.host.tags import bootc_tag
from hostimaged.oci.images import manifest_stream, tag
from hostimaged.system import durable

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.ids import DeploymentId, ManifestDigest
    from hostimaged.system.paths import HostPaths


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was done for a deployment; ``problem`` if it could not be."""

    id: DeploymentId
    tagged: bool = False
    named: bool = False
    problem: str = ""


def adopt(paths: HostPaths, repository: Repository, state: HostState) -> list[Adopted]:
    """Give what is missing to each deployment whose manifest the repository proves; what was done.

    That is the tag ``localhost/bootc-…`` and, in its origin, ``manifest_digest``; in this order, so that an
    origin never names what may be collected. ``state`` was read from ``repository``. Doing it again does
    nothing. One that cannot be adopted does not keep others from it. Nothing is done for what people do not
    see, as it may be about to go.
    """
    done = [_adopt(paths, repository, row) for row in state.deployments if row.role is not Role.HIDDEN]
    return [each for each in done if each is not None]


def _adopt(paths: HostPaths, repository: Repository, row: Deployment) -> Adopted | None:
    digest = row.manifest_digest
    if digest is None or row.origin is None or row.image is None or not row.image.proven:
        return None
    tagged = False
    try:
        if repository.has_stream(manifest_stream(digest)) is None:
            return None
        tagged = tag(repository, bootc_tag(digest), digest)
        named = row.origin.manifest_digest is None and _name(paths, row.id, digest, repository)
    except HostimageError as error:
        return Adopted(row.id, tagged, problem=error.message)
    return Adopted(row.id, tagged, named) if tagged or named else None


def _name(paths: HostPaths, id_: DeploymentId, digest: ManifestDigest, repository: Repository) -> bool:
    """Write the digest into the origin, read again; says whether that was needed."""
    path = state_directory(paths, id_)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            origin = read_origin(directory, id_)
        finally:
            os.close(directory)
        if origin is None or origin.manifest_digest is not None:
            return False
        # What the origin names must outlive a crash: the tag first.
        repository.sync()
        durable.replace_file(path / origin_name(id_), origin.with_manifest_digest(digest).serialise())
    except OSError as error:
        raise from_os_error(error, f"cannot write the origin of {id_}") from error
    return True
