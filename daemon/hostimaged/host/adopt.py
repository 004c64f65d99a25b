"""Takes over deployments that an older bootc made: names their manifests, and keeps them by tags.

The one function here writes; it is for mutating jobs, which hold the job lock and the repository's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostimaged.boot.pe import Uki
from hostimaged.errors import HostimageError, from_os_error
from hostimaged.host.model import BootType, Role
from hostimaged.host.origin import origin_name, read_origin
from hostimaged.host.statedirs import state_directory
from hostimaged.host.tags import tag_deployment
from hostimaged.oci.images import manifest_stream
from hostimaged.system import durable

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.host.origin import Origin
    from hostimaged.ids import BootDigest, DeploymentId
    from hostimaged.system.paths import HostPaths


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was done for a deployment: it got a tag, its origin names the manifest, or the boot digest of its
    UKI; ``problem`` if something could not be done.
    """

    id: DeploymentId
    tagged: bool = False
    named: bool = False
    digested: bool = False
    problem: str = ""


def adopt(paths: HostPaths, repository: Repository, state: HostState) -> list[Adopted]:
    """Give what is missing to each deployment; what was done.

    If the repository proves which manifest is its own, that is the tag ``localhost/bootc-…`` and, in its
    origin, ``manifest_digest``; in this order, so that an origin never names what may be collected. An origin
    of old gets the boot digest of its UKI. ``state`` was read from ``repository``. Doing it again does
    nothing. One that cannot be adopted does not keep others from it. Nothing is done for what people do not
    see, as it may be about to go.
    """
    shown = [row for row in state.deployments if row.role is not Role.HIDDEN and row.origin is not None]
    done = [_adopt(paths, repository, state.dirs, row) for row in shown]
    return [each for each in done if each is not None]


def _adopt(paths: HostPaths, repository: Repository, dirs: BootDirs, row: Deployment) -> Adopted | None:
    tagged = named = digested = False
    problem = ""
    try:
        digest = row.manifest_digest
        proven = row.image is not None and row.image.proven
        if digest is not None and proven and repository.has_stream(manifest_stream(digest)) is not None:
            tagged = tag_deployment(paths, repository, digest)
            named = _missing(row, "manifest_digest")
            if named:
                # What the origin names must outlive a crash: the tag first.
                repository.sync()
                _rewrite(paths, row.id, lambda origin: origin.with_manifest_digest(digest))
        boot_digest = _uki_digest(dirs, row)
        if boot_digest is not None:
            digested = True
            _rewrite(paths, row.id, lambda origin: origin.with_boot_digest(boot_digest))
    except HostimageError as error:
        problem = error.message
    if not (tagged or named or digested or problem):
        return None
    return Adopted(row.id, tagged, named and not problem, digested and not problem, problem)


def _missing(row: Deployment, key: str) -> bool:
    """Whether the origin lacks it; what is there and makes no sense is not ours to replace."""
    origin = row.origin
    return origin is not None and getattr(origin, key) is None and not origin.problems


def _uki_digest(dirs: BootDirs, row: Deployment) -> BootDigest | None:
    """The boot digest of a UKI, if the origin lacks it and it can be read."""
    if row.boot_type is not BootType.UKI or not _missing(row, "boot_digest") or row.entry is None:
        return None
    path = dirs.uki_file(row.entry.files[0])
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # Its row says so already.
        return None
    try:
        return Uki.read(fd, path.name).boot_digest
    finally:
        os.close(fd)


def _rewrite(paths: HostPaths, id_: DeploymentId, change: Callable[[Origin], Origin]) -> None:
    """Change the origin as it is now, durably."""
    path = state_directory(paths, id_)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            origin = read_origin(directory, id_)
        finally:
            os.close(directory)
        if origin is not None:
            durable.replace_file(path / origin_name(id_), change(origin).serialise())
    except OSError as error:
        raise from_os_error(error, f"cannot write the origin of {id_}") from error
