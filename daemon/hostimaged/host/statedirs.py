"""State directories of deployments (``state/deploy/<id>``): built aside, put in place and taken away whole.

A directory is built in a private one of this job, on the same file system, and renamed: what bears the name
of a deployment is complete. It is removed the other way round. Facts: deployments.md 2.1 (bootc 1.16).
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from hostimaged.errors import InvalidArgs
from hostimaged.host import bootfs
from hostimaged.host.bootfs import told
from hostimaged.host.origin import origin_name
from hostimaged.ids import DeploymentId
from hostimaged.system import durable, syscalls

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.host.origin import Origin
    from hostimaged.system.paths import HostPaths

#: The one ``/var`` of all deployments, as the link in each of them has it.
VAR_LINK: Final = "../../os/default/var"
ETC: Final = "etc"
VAR: Final = "var"


def state_directory(paths: HostPaths, id_: DeploymentId) -> Path:
    """The directory of a deployment."""
    return paths.deployments / str(id_)


def origins(paths: HostPaths) -> list[Path]:
    """Where the origins of all deployments are, or would be. Raises ``StorageError``."""
    deploy = paths.deployments
    with told(f"cannot read {deploy}"):
        try:
            names = os.listdir(deploy)
        except FileNotFoundError:
            return []
    found = []
    for name in names:
        with suppress(InvalidArgs):
            found.append(deploy / name / origin_name(DeploymentId(name)))
    return found


def shared_var(paths: HostPaths) -> Path:
    """The ``/var`` of all deployments."""
    return paths.physical_root / "state/os/default/var"


def begin(paths: HostPaths, work: Path, id_: DeploymentId) -> Path:
    """A new directory for ``id_`` in ``work``, with the link to ``/var`` and an empty ``etc``.

    Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    built = work / str(id_)
    with told(f"cannot make the state of the deployment in {paths.temporary}"):
        shared_var(paths).mkdir(0o755, parents=True, exist_ok=True)
        built.mkdir(0o755)
        (built / ETC).mkdir(0o755)
        (built / VAR).symlink_to(VAR_LINK)
    return built


def finish(paths: HostPaths, built: Path, id_: DeploymentId, origin: Origin) -> None:
    """Write the origin into what ``begin`` made and put it in place, durably.

    Raises ``StorageError`` if there is a directory of that name.
    """
    deploy = paths.deployments
    with told(f"cannot make {state_directory(paths, id_)}"):
        durable.replace_file(built / origin_name(id_), origin.serialise())
        deploy.mkdir(0o755, parents=True, exist_ok=True)
        with bootfs.directory(deploy) as target, bootfs.directory(built.parent) as source:
            # The whole tree, /etc above all: a name must not survive a crash that its content does not.
            durable.sync_filesystem(source)
            durable.publish_name(target, built.name, str(id_), source=source)


def rewrite_origin(paths: HostPaths, id_: DeploymentId, origin: Origin) -> None:
    """Replace the origin of a deployment, durably. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``."""
    path = state_directory(paths, id_) / origin_name(id_)
    with told(f"cannot write {path}"):
        durable.replace_file(path, origin.serialise())


def remove(paths: HostPaths, work: Path, id_: DeploymentId) -> bool:
    """Take the state directory of ``id_`` away, durably; says whether it was there.

    It goes through ``work``, a private directory of this job: under its own name it is whole or not there.
    """
    path = state_directory(paths, id_)
    if not os.path.lexists(path):
        return False
    with told(f"cannot remove {path}"):
        temporary = durable.temporary_name("removed-")
        with bootfs.directory(path.parent) as source, bootfs.directory(work) as target:
            durable.publish_name(target, path.name, temporary, source=source)
            durable.sync_directory(source)
        try:
            bootfs.remove_tree(work / temporary)
        except PermissionError:
            _make_changeable(work / temporary)
            bootfs.remove_tree(work / temporary)
    return True


def _make_changeable(tree: Path) -> None:
    """Take the attributes of files by which an administrator kept others from changing them (chattr(1))."""
    for parent, _directories, files, parent_fd in os.fwalk(tree):
        del parent
        _take_attributes(".", parent_fd, os.O_DIRECTORY)
        for name in files:
            _take_attributes(name, parent_fd, 0)


def _take_attributes(name: str, parent: int, flags: int) -> None:
    # What is no file has none: links are not opened (ELOOP), sockets cannot be, devices must not be.
    with suppress(OSError):
        if not flags and not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=parent)
        try:
            syscalls.make_changeable(fd)
        finally:
            os.close(fd)
