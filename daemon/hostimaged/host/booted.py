"""Which deployment runs: from the kernel's command line and the mount of ``/``.

Facts: deployments.md 7 (bootc 1.16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot.cmdline import Cmdline
from hostimaged.boot.esp import Mount, mount_at
from hostimaged.errors import BootLoaderError, InvalidArgs, from_os_error
from hostimaged.ids import DeploymentId

if TYPE_CHECKING:
    from hostimaged.system.paths import HostPaths

#: The kernel's own limit is 4 KiB at most.
MAX_CMDLINE: Final = 64 << 10
_PLAIN: Final = "composefs:"
_TRANSIENT: Final = "transient:composefs="


@dataclass(frozen=True, slots=True)
class Booted:
    """The deployment that runs.

    ``optional``: fs-verity may be missing on this host (the ``?`` of the command line, which a soft reboot
    does not change). ``transient``: changes to its root vanish. ``cmdline_id``: what the firmware booted;
    another one after a soft reboot.
    """

    id: DeploymentId
    optional: bool = False
    transient: bool = False
    cmdline_id: DeploymentId | None = None

    @property
    def soft_rebooted(self) -> bool:
        """Whether it was reached without the firmware."""
        return self.cmdline_id not in (None, self.id)


def read_booted(paths: HostPaths, table: list[Mount]) -> Booted | None:
    """The deployment that runs; None on a host that does not run, or not from composefs.

    ``table`` is the table of mounts. Raises ``BootLoaderError`` if the kernel was told to boot one, and what
    is mounted is none: then nobody knows what runs. Raises ``StorageError``.
    """
    text = read_cmdline(paths)
    return None if text is None else booted_from(text, mount_at(table, b"/"))


def read_cmdline(paths: HostPaths) -> str | None:
    """The arguments of the running kernel; None on a host that does not run. Raises ``StorageError``."""
    if paths.cmdline is None:
        return None
    try:
        with paths.cmdline.open("rb") as file:
            return file.read(MAX_CMDLINE).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, "cannot read the kernel command line") from error


def booted_from(cmdline: str, root: Mount | None) -> Booted | None:
    """As ``read_booted``, from the command line and what is mounted at ``/``."""
    argument = Cmdline.parse(cmdline).composefs()
    if argument is None:
        return None
    found = None if root is None else root_of(root.source)
    if found is None:
        raise BootLoaderError("the kernel was told to boot a deployment, but / is not mounted from one")
    id_, transient = found
    return Booted(id_, argument.optional, transient, argument.id)


def root_source(id_: DeploymentId, *, transient: bool) -> str:
    """What the root of a deployment is called in the table of mounts."""
    return f"{_TRANSIENT if transient else _PLAIN}{id_}"


def root_of(source: str) -> tuple[DeploymentId, bool] | None:
    """Of which deployment a mount is the root, and whether changes to it vanish; None if of none."""
    for prefix in (_PLAIN, _TRANSIENT):
        if source.startswith(prefix):
            try:
                return DeploymentId(source.removeprefix(prefix).removeprefix("?")), prefix is _TRANSIENT
            except InvalidArgs:
                return None
    return None
