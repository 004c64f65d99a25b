"""Privileges of worker processes: the capabilities that each kind of work keeps."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hostimaged.system.syscalls import Capability

if TYPE_CHECKING:
    from collections.abc import Mapping


class Profile(StrEnum):
    """Privileges of a worker, chosen before it reads its first byte of input."""

    SCAN = "scan"
    PULL = "pull"
    PULL_STORAGE = "pull-storage"
    STORE = "store"
    HOST = "host"


#: Capabilities a worker keeps; all others leave its bounding set too. Everything we write belongs to root,
#: whose files need no capability. DAC_READ_SEARCH: a repository, layout, archive or auth file may belong to
#: another user.
CAPABILITIES: Final[Mapping[Profile, frozenset[Capability]]] = {
    Profile.SCAN: frozenset({Capability.DAC_READ_SEARCH}),
    Profile.PULL: frozenset({Capability.DAC_READ_SEARCH}),
    # Deployments: trees of any owner, device nodes and attributes of any kind in their /etc, mounts.
    # SYS_ADMIN and SYS_CHROOT are also what it takes to enter the mount namespace of the host, where systemd
    # looks for the root that a soft reboot starts. To open that namespace takes SYS_PTRACE as well, which is
    # used before anything is read, and not kept. LINUX_IMMUTABLE: what an administrator protected with chattr
    # goes with its deployment.
    Profile.HOST: frozenset(
        {
            Capability.CHOWN,
            Capability.DAC_OVERRIDE,
            Capability.DAC_READ_SEARCH,
            Capability.FOWNER,
            Capability.FSETID,
            Capability.LINUX_IMMUTABLE,
            Capability.MAC_ADMIN,
            Capability.MKNOD,
            Capability.SETFCAP,
            Capability.SYS_ADMIN,
            Capability.SYS_CHROOT,
        }
    ),
    # podman: mounts that nobody else sees, and layers with files of any owner and kind, which it unpacks with
    # the layer as its root.
    Profile.STORE: frozenset(
        {
            Capability.CHOWN,
            Capability.DAC_OVERRIDE,
            Capability.DAC_READ_SEARCH,
            Capability.FOWNER,
            Capability.FSETID,
            Capability.MKNOD,
            Capability.SETFCAP,
            Capability.SYS_ADMIN,
            Capability.SYS_CHROOT,
        }
    ),
    # To make files of a store ours: hard links to those of any owner, and fs-verity on them.
    Profile.PULL_STORAGE: frozenset({Capability.DAC_OVERRIDE, Capability.DAC_READ_SEARCH, Capability.FOWNER}),
}
