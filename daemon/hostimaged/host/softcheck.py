"""Whether a deployment can be reached by a soft reboot from the one that runs, and if not, why.

Facts: boot-entries.md 12 (bootc 1.16): the same kernel, the same arguments, the same SELinux policy.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError, PreconditionFailed
from hostimaged.host.arguments import cmdline_of
from hostimaged.host.model import Deployment, Role, SoftReboot

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.boot.files import ImageFiles
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.system.paths import HostPaths

_CONFIG: Final = "selinux/config"
_MAX_CONFIG: Final = 64 << 10
_POLICY: Final = b"policy."
#: In ``usr``: systemd has soft reboots since 254.
_TARGET: Final = "lib/systemd/system/soft-reboot.target"


class SoftRebootCheck:
    """Compares deployments with the booted one, whose facts are read once."""

    def __init__(
        self, paths: HostPaths, repository: Repository | None, dirs: BootDirs, booted: Deployment | None
    ) -> None:
        self._paths = paths
        self._repository = repository
        self._dirs = dirs
        self._booted = booted
        self._policy: str | None = None

    def check(self, target: Deployment) -> SoftReboot:
        """Whether ``target`` can be reached; what cannot be read makes it not so. Never raises."""
        try:
            reason = self._obstacle(target)
        except HostimageError as error:
            reason = error.message
        return SoftReboot(not reason, reason)

    def _obstacle(self, target: Deployment) -> str:
        booted = self._booted
        if booted is None:
            return "no deployment runs"
        if target.role is Role.BOOTED:
            return "it runs already"
        if target.boot_digest is None or booted.boot_digest is None:
            return "it is not known whether it has the same kernel"
        if target.boot_digest != booted.boot_digest:
            return "it has another kernel or initrd"
        if not cmdline_of(self._dirs, booted).same_parameters(cmdline_of(self._dirs, target)):
            return "its kernel arguments are others"
        if not target.bootable:
            return "it is not complete"
        return self._selinux(target)

    def _selinux(self, target: Deployment) -> str:
        if self._paths.selinux_enforce is None or not self._paths.selinux_enforce.exists():
            return ""
        if self._repository is None:
            return "its SELinux policy cannot be read"
        # Few hosts have both, another deployment of the same kernel and SELinux.
        from hostimaged.boot.files import DirectoryFiles, TreeFiles
        from hostimaged.host.etctree import open_image_tree

        if self._policy is None:
            self._policy = policy_digest(DirectoryFiles(self._paths.etc), "")
        image = TreeFiles(open_image_tree(self._repository, target.id), self._repository)
        same = policy_digest(image, "etc/") == self._policy
        return "" if same else "its SELinux policy is another"


def require_systemd(usr: Path) -> None:
    """Raises ``PreconditionFailed`` if systemd of the running host knows no soft reboots."""
    if not (usr / _TARGET).exists():
        raise PreconditionFailed("this host's systemd has no soft reboot: it needs version 254")


def policy_digest(files: ImageFiles, etc: str) -> str:
    """sha256 of the newest binary policy of the type that the configuration names, "" without one.

    ``etc`` is what the paths of ``files`` have before ``selinux/``. Raises ``UnsupportedImage`` or
    ``StorageError``.
    """
    config = files.read(f"{etc}{_CONFIG}", _MAX_CONFIG)
    kind = None if config is None else _policy_type(config)
    if kind is None:
        return ""
    directory = f"{etc}selinux/{kind}/policy"
    versions = {
        int(name.removeprefix(_POLICY)): name
        for name in files.names(directory)
        if name.startswith(_POLICY) and name.removeprefix(_POLICY).isdigit() and len(name) < 20
    }
    if not versions:
        return ""
    fd = files.open(f"{directory}/{os.fsdecode(versions[max(versions)])}")
    if fd is None:
        return ""
    with os.fdopen(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _policy_type(config: bytes) -> str | None:
    """SELINUXTYPE, None if it is missing or no plain name."""
    found = None
    for line in config.decode("utf-8", "replace").split("\n"):
        key, equals, value = line.partition("=")
        if equals and key.strip().upper() == "SELINUXTYPE":
            found = value.strip()
    return found if found and "/" not in found and found not in (".", "..") else None
