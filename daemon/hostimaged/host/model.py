"""What is installed on a host: one ordered list of deployments, each with what is known and what is wrong.

Values only: ``read`` makes them from what is on disk, operations write them out as a whole. Facts:
deployments.md 8 and boot-entries.md 9.3 (bootc 1.16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hostimaged.boot.resources import BootType
from hostimaged.errors import NoSuchDeployment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.boot.loader import Bootloader
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.host.booted import Booted
    from hostimaged.host.entries import BootSets, SetEntry
    from hostimaged.host.marker import Marker
    from hostimaged.host.origin import Origin
    from hostimaged.ids import BootDigest, ConfigDigest, DeploymentId, ManifestDigest

__all__ = [
    "BootType",
    "Deployment",
    "HostState",
    "ImageFacts",
    "Problem",
    "ProblemId",
    "Role",
    "Severity",
    "SoftReboot",
    "Verity",
    "rollback_queued",
]


class Severity(StrEnum):
    """How bad a problem is."""

    ERROR = "error"
    WARNING = "warning"


class ProblemId(StrEnum):
    """What can be wrong, with a deployment or with the host; part of the interface."""

    # Of a deployment.
    STATE_MISSING = "state-missing"
    ETC_MISSING = "etc-missing"
    VAR_MISSING = "var-missing"
    ORIGIN_MISSING = "origin-missing"
    ORIGIN_DAMAGED = "origin-damaged"
    IMAGE_MISSING = "image-missing"
    IMAGE_DAMAGED = "image-damaged"
    METADATA_MISSING = "metadata-missing"
    METADATA_DAMAGED = "metadata-damaged"
    ARTIFACT_MISSING = "artifact-missing"
    ENTRY_MISSING = "entry-missing"
    ENTRY_TWICE = "entry-twice"
    BOUND_IMAGES = "bound-images"
    # Of the host.
    REPOSITORY = "repository"
    BOOTED_UNKNOWN = "booted-unknown"
    BOOTED_NO_ENTRY = "booted-no-entry"
    BOOT_DIRECTORY = "boot-directory"
    ENTRIES_UNREADABLE = "boot-entries"
    ENTRY_DAMAGED = "boot-entry"
    MARKER_DAMAGED = "staged-marker"
    BOOT_TYPES_DIFFER = "boot-types"
    TOO_MANY_ENTRIES = "bootc-rollback"
    STATE_UNREADABLE = "deployment-state"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, in words for people; ``text`` names documented paths and ids alone."""

    id: ProblemId
    text: str
    severity: Severity = Severity.ERROR


class Role(StrEnum):
    """What a deployment is on this host."""

    BOOTED = "booted"
    #: Becomes the default at shutdown, unless it is locked.
    STAGED = "staged"
    #: What rolling back boots.
    ROLLBACK = "rollback"
    #: In the menu after that one, or pinned without an entry.
    OTHER = "other"
    #: Left over: an entry of a staged set without a marker, or a state directory without an entry.
    HIDDEN = "hidden"


class Verity(StrEnum):
    """Whether the boot image is what its name says."""

    OK = "ok"
    #: The file system does not vouch for it, and need not on this host.
    UNVERIFIED = "unverified"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Manifest and configuration of a deployment's image, as far as they are known.

    ``manifest_digest`` is None if it is that of an old deployment, and the repository does not prove which
    manifest it is; ``sidecar_digest`` then is the hex digest of what is beside its origin. ``version`` is
    "" and ``created`` "" if the image does not say. ``proven``: the repository has the manifest.
    """

    manifest_digest: ManifestDigest | None
    config_digest: ConfigDigest | None
    version: str = ""
    created: str = ""
    architecture: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    proven: bool = False
    sidecar_digest: str = ""

    @property
    def timestamp(self) -> int:
        """``created`` in microseconds since the epoch, 0 if it is unknown or before that."""
        from hostimaged.oci.times import microseconds

        return microseconds(self.created)


@dataclass(frozen=True, slots=True)
class SoftReboot:
    """Whether a deployment can be reached without the firmware, and why not."""

    capable: bool
    reason: str = ""


NOT_ASKED: Final = SoftReboot(capable=False, reason="it was not looked at")

#: With one of these a deployment does not start.
_FATAL: Final = frozenset(
    {
        ProblemId.STATE_MISSING,
        ProblemId.ETC_MISSING,
        ProblemId.IMAGE_MISSING,
        ProblemId.IMAGE_DAMAGED,
        ProblemId.ARTIFACT_MISSING,
    }
)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment. ``live`` and ``staged`` are its first entries in the two sets, None without one.

    ``default``: its live entry is the first of the menu. ``locked``: staged, and not to be activated at
    shutdown. ``boot_type`` is the origin's, else that of its entry.
    """

    id: DeploymentId
    role: Role
    live: SetEntry | None = None
    staged: SetEntry | None = None
    origin: Origin | None = None
    image: ImageFacts | None = None
    boot_type: BootType | None = None
    pinned: bool = False
    locked: bool = False
    default: bool = False
    verity: Verity = Verity.UNVERIFIED
    soft_reboot: SoftReboot = NOT_ASKED
    problems: tuple[Problem, ...] = ()

    @property
    def entry(self) -> SetEntry | None:
        """The entry that its next start would use: the staged one of a staged deployment, else the live."""
        if self.role is Role.STAGED:
            return self.staged or self.live
        return self.live or self.staged

    @property
    def boot_digest(self) -> BootDigest | None:
        """Digest of kernel and initrd, or of the UKI, if the origin has it."""
        return None if self.origin is None else self.origin.boot_digest

    @property
    def manifest_digest(self) -> ManifestDigest | None:
        """The manifest: that of the origin, else the one that the repository proves."""
        if self.origin is not None and self.origin.manifest_digest is not None:
            return self.origin.manifest_digest
        return None if self.image is None else self.image.manifest_digest

    @property
    def kernel_arguments(self) -> str:
        """The arguments in its entry, "" without one or with a UKI."""
        return "" if self.entry is None else self.entry.options

    @property
    def obstacle(self) -> Problem | None:
        """The first that is known to keep it from starting."""
        return next((problem for problem in self.problems if problem.id in _FATAL), None)

    @property
    def bootable(self) -> bool:
        """Whether nothing is known that would keep it from starting."""
        return self.obstacle is None


@dataclass(frozen=True, slots=True)
class HostState:
    """A host at one moment.

    ``read_only``: the file system of the physical root cannot be written. ``usr_overlay``: readOnly or
    readWrite if something is mounted over /usr, which vanishes with the next reboot, else "".

    ``deployments``: first the staged one that the next shutdown activates, then those in the menu in its
    order, then a locked one, pinned ones without an entry, and hidden ones. ``dirs`` and ``sets`` are where
    the boot entries are and the two sets of them. ``booted`` is None on a host that does not run, or not from
    composefs; if it should be known and is not, there is a problem ``BOOTED_UNKNOWN``.
    """

    deployments: tuple[Deployment, ...]
    loader: Bootloader
    dirs: BootDirs
    sets: BootSets
    booted: Booted | None = None
    marker: Marker | None = None
    problems: tuple[Problem, ...] = ()
    read_only: bool = False
    usr_overlay: str = ""

    def find(self, id_: DeploymentId | None) -> Deployment | None:
        """The deployment ``id_``, hidden ones too."""
        return next((row for row in self.deployments if row.id == id_), None)

    def get(self, id_: DeploymentId) -> Deployment:
        """The deployment ``id_`` that people see; raises ``NoSuchDeployment``."""
        row = self.find(id_)
        if row is None or row.role is Role.HIDDEN:
            raise NoSuchDeployment(f"there is no deployment {id_}")
        return row

    def _with_role(self, role: Role) -> Deployment | None:
        return next((row for row in self.deployments if row.role is role), None)

    @property
    def booted_deployment(self) -> Deployment | None:
        """The one that runs."""
        return self._with_role(Role.BOOTED)

    @property
    def staged_deployment(self) -> Deployment | None:
        """The one that is staged, locked or not."""
        return self._with_role(Role.STAGED)

    @property
    def rollback_deployment(self) -> Deployment | None:
        """The one that rolling back boots."""
        return self._with_role(Role.ROLLBACK)

    @property
    def visible(self) -> tuple[Deployment, ...]:
        """Those that people see."""
        return tuple(row for row in self.deployments if row.role is not Role.HIDDEN)

    @property
    def default_deployment(self) -> Deployment | None:
        """The first of the menu: what a reset would boot now."""
        return next((row for row in self.deployments if row.default), None)

    @property
    def next_deployment(self) -> Deployment | None:
        """What an orderly reboot boots: the staged one unless it is locked, else the default."""
        staged = self.staged_deployment
        if staged is not None and not staged.locked:
            return staged
        return self.default_deployment

    @property
    def rollback_queued(self) -> bool:
        """Whether the next boot goes back: see the function."""
        default = self.default_deployment
        return rollback_queued(
            None if self.booted is None else self.booted.id,
            None if default is None else default.id,
            None if self.marker is None else self.marker.depl_id,
        )

    def has_problem(self, id_: ProblemId) -> bool:
        """Whether the host, not one of its deployments, has this problem."""
        return any(problem.id is id_ for problem in self.problems)


def rollback_queued(
    booted: DeploymentId | None, default: DeploymentId | None, staged: DeploymentId | None
) -> bool:
    """Whether a rollback is queued, for every boot loader and boot type.

    It is if the first of the menu is neither what runs nor what is staged.
    """
    return booted is not None and default is not None and default not in (booted, staged)
