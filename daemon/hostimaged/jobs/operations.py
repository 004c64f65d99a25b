"""What a worker process can be told to do, and which privileges it takes (``privileges``).

An operation is plain data with everything that it needs: a worker asks nobody. Two equal operations do the
same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hostimaged.errors import InvalidArgs, UnsupportedImage
from hostimaged.host.updatepolicy import UpdatePolicy  # noqa: TC001 (pydantic reads annotations)
from hostimaged.jobs.privileges import Profile
from hostimaged.oci.reference import MAX_LENGTH, ImageReference, Transport

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

#: An order is a few strings.
MAX_ORDER: Final = 64 << 10

#: What came of a staging before which other images have to be fetched (as in ``host.stage``).
BOUND_MISSING: Final = "bound-missing"

#: In the result of a job that a soft reboot was to follow: whether what boots next is prepared, or what runs.
SOFT_REBOOT: Final = "soft-reboot"
PREPARED: Final = "prepared"
NOT_NEEDED: Final = "not-needed"


_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class _Operation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether jobs of this kind change something: see ``changes``.
    mutating: ClassVar[bool] = True
    #: Whether it writes below the physical root though it is not mutating.
    writes: ClassVar[bool] = False
    #: Whether a background job of this kind is stopped, and queued again, for any job of a user.
    gives_way: ClassVar[bool] = False

    @property
    def changes(self) -> bool:
        """Whether the job lock is held for the whole operation, and only one such job runs."""
        return self.mutating

    @property
    def one_per_user(self) -> bool:
        """Whether each user but root may have one job of this kind wait or run."""
        return False

    @property
    def identity(self) -> Hashable:
        """What makes two requests ask for the same thing; settings of the daemon do not."""
        return self

    def then(self, result: Mapping[str, Any]) -> Operation | None:
        """What the same job does next, in a worker with privileges of its own; ``result`` is what came."""
        del result
        return None


class _OfImage(_Operation):
    """Something with the image ``reference`` at its source."""

    kind: str
    reference: str = Field(max_length=MAX_LENGTH)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.reference)

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return self.reference

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        transport = ImageReference.parse(self.reference).transport
        return Profile.PULL_STORAGE if transport is Transport.CONTAINERS_STORAGE else Profile.PULL


class _Fetch(_OfImage):
    """Fetch the image ``reference`` into the repository, if ``minimum_free`` MiB stay free.

    ``unified``: first into the store of the host, by podman, and from there in a worker of fewer privileges.
    """

    expect_digest: str | None = Field(default=None, max_length=128)
    verity: Literal["require", "opportunistic"] = "require"
    sharing: Literal["copy", "auto", "require"] = "auto"
    retry_failed: bool = False
    minimum_free: int = Field(default=0, ge=0)
    unified: bool = False
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (
            self.kind,
            self.reference,
            self.expect_digest,
            self.sharing,
            self.retry_failed,
            self.unified,
        )

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.STORE if self.unified else super().profile

    def then(self, result: Mapping[str, Any]) -> Operation | None:
        """See ``_Operation``."""
        if not self.unified:
            return self._after(result)
        if not {"image-id", "source-digest"} <= result.keys():
            return self.model_copy(update={"unified": False})  # type: ignore[return-value]
        return Import(
            reference=self.reference,
            image_id=str(result["image-id"]),
            source_digest=str(result["source-digest"]),
            fetched=bool(result["bytes-fetched"]),
            verity=self.verity,
            sharing=self.sharing,
            retry_failed=self.retry_failed,
            minimum_free=self.minimum_free,
            lock_timeout=self.lock_timeout,
            **self._staging(),
        )

    def _after(self, result: Mapping[str, Any]) -> Operation | None:
        del result
        return None

    def _staging(self) -> dict[str, Any]:
        return {}


class Pull(_Fetch):
    """Fetch the image ``reference`` into the repository."""

    kind: Literal["pull"] = "pull"


class _Update(_Fetch):
    """Fetch an image, and then stage it: two workers, as only the second needs privileges over the host."""

    download_only: bool = False
    allow_downgrade: bool = False
    max_entries: int = Field(default=2, ge=2, le=10)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (super().identity, self.download_only, self.allow_downgrade)

    def _staging(self) -> dict[str, Any]:
        return {
            "stages": True,
            "download_only": self.download_only,
            "allow_downgrade": self.allow_downgrade,
            "max_entries": self.max_entries,
        }

    def _after(self, result: Mapping[str, Any]) -> Operation | None:
        """Raises ``UnsupportedImage`` for what is no operating system."""
        if result.get("artifact"):
            raise UnsupportedImage(f"{self.reference} is an artifact, not an operating system")
        return Stage(
            manifest_digest=str(result["manifest-digest"]),
            reference=self.reference,
            download_only=self.download_only,
            allow_downgrade=self.allow_downgrade,
            retry_failed=self.retry_failed,
            max_entries=self.max_entries,
            lock_timeout=self.lock_timeout,
        )


class Upgrade(_Update):
    """Fetch and stage the newest of the tracked image; or unlock what was staged for download only."""

    kind: Literal["upgrade"] = "upgrade"
    from_downloaded: bool = False

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (super().identity, self.from_downloaded)

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.HOST if self.from_downloaded else super().profile

    def then(self, result: Mapping[str, Any]) -> Operation | None:
        """See ``_Operation``."""
        return None if self.from_downloaded else super().then(result)


class Switch(_Update):
    """Fetch and stage another image, which updates follow from then on."""

    kind: Literal["switch"] = "switch"


class Import(_Update):
    """Bring an image of the store of the host into the repository: the second part of a unified pull.

    ``source_digest``: of its manifest where it came from. ``fetched``: the first part had to fetch something.
    """

    kind: Literal["import"] = "import"
    image_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    source_digest: str = Field(max_length=128)
    fetched: bool = False
    stages: bool = False

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.PULL_STORAGE

    def _after(self, result: Mapping[str, Any]) -> Operation | None:
        return super()._after(result) if self.stages else None


class Unify(_OfImage):
    """Have the image that updates follow in the store of the host, or no image of a deployment any more."""

    kind: Literal["unify"] = "unify"
    reference: str = Field(default="", max_length=MAX_LENGTH)
    unified: bool
    verity: Literal["require", "opportunistic"] = "require"
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.reference, self.unified)

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.STORE


class _HostOperation(_Operation):
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return tuple(self.model_dump(exclude={"lock_timeout"}).items())

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return str(getattr(self, "deployment", None) or "")

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.HOST


class Stage(_HostOperation):
    """Stage an image of the repository under the reference that updates follow."""

    kind: Literal["stage"] = "stage"
    manifest_digest: str = Field(max_length=128)
    reference: str = Field(max_length=MAX_LENGTH)
    download_only: bool = False
    allow_downgrade: bool = False
    retry_failed: bool = False
    max_entries: int = Field(default=2, ge=2, le=10)
    bound_fetched: bool = False

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return self.reference

    def then(self, result: Mapping[str, Any]) -> Operation | None:
        """See ``_Operation``: nothing is staged before the images are there that it is bound to."""
        if result.get("result") != BOUND_MISSING:
            return None
        return PullBound(
            deployment=str(result["deployment"]),
            stage=self.model_copy(update={"bound_fetched": True}),
            lock_timeout=self.lock_timeout,
        )


class PullBound(_HostOperation):
    """Fetch the images that ``deployment`` is bound to, which is staged then. Never the first of a job."""

    kind: Literal["bound"] = "bound"
    deployment: _Id
    stage: Stage

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.STORE

    def then(self, result: Mapping[str, Any]) -> Operation | None:
        """See ``_Operation``."""
        del result
        return self.stage


class Rollback(_HostOperation):
    """Choose what boots next: the rollback deployment, the one that runs, or ``deployment``."""

    kind: Literal["rollback"] = "rollback"
    action: Literal["rollback", "cancel", "default"] = "rollback"
    deployment: _Id | None = None


class Unstage(_HostOperation):
    """Take back what is staged."""

    kind: Literal["unstage"] = "unstage"


class Delete(_HostOperation):
    """Remove a deployment."""

    kind: Literal["delete"] = "delete"
    deployment: _Id


class Pin(_HostOperation):
    """Keep a deployment, or let it go."""

    kind: Literal["pin"] = "pin"
    deployment: _Id
    pinned: bool


class KernelArguments(_HostOperation):
    """Change the kernel arguments of what boots next."""

    kind: Literal["kargs"] = "kargs"
    add: tuple[str, ...] = Field(default=(), max_length=64)
    remove: tuple[str, ...] = Field(default=(), max_length=64)


class SoftReboot(_HostOperation):
    """Prepare what boots next for a soft reboot: the last thing a job does whose callers want one."""

    kind: Literal["soft-reboot"] = "soft-reboot"


class Recover(_HostOperation):
    """Finish or take back what was interrupted."""

    kind: Literal["recover"] = "recover"


class _Rules(_HostOperation):
    """What the settings say of images that are pulled (``hostimaged.host.collectplan.Rules``)."""

    tracked: str = Field(default="", max_length=MAX_LENGTH)
    keep_pulled: int = Field(default=30, ge=0)
    minimum_free: int = Field(default=0, ge=0)


class Collect(_Rules):
    """Remove what no deployment, pin or tag needs; or only tell what that would be."""

    gives_way = True

    kind: Literal["collect"] = "collect"
    dry_run: bool = False

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.dry_run)

    @property
    def changes(self) -> bool:
        """See ``_Operation``."""
        return not self.dry_run

    @property
    def one_per_user(self) -> bool:
        """See ``_Operation``."""
        return self.dry_run

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN if self.dry_run else Profile.HOST


class Explain(_Rules):
    """Tell why ``what`` is kept: an object, an image, a stream or a deployment."""

    mutating = False

    kind: Literal["explain"] = "explain"
    what: str = Field(max_length=MAX_LENGTH)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.what)

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return self.what

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


class Repair(_HostOperation):
    """Get again what is damaged in the repository; or only tell what that would be."""

    kind: Literal["repair"] = "repair"
    dry_run: bool = False

    @property
    def changes(self) -> bool:
        """See ``_Operation``."""
        return not self.dry_run

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs: images may come out of containers-storage."""
        return Profile.SCAN if self.dry_run else Profile.PULL_STORAGE


class Verify(_HostOperation):
    """Compare everything in the repository with its digests."""

    mutating = False

    kind: Literal["verify"] = "verify"

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


class Check(_OfImage):
    """Find out what ``reference`` is at its source now, and how much of it is missing; changes nothing."""

    mutating = False
    gives_way = True

    kind: Literal["check"] = "check"
    lock_timeout: float = 0.0


class Diff(_Operation):
    """Tell what changes from ``deployment`` to ``other``."""

    mutating = False

    kind: Literal["diff"] = "diff"
    deployment: _Id
    other: _Id
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.deployment, self.other)

    @property
    def one_per_user(self) -> bool:
        """See ``_Operation``."""
        return True

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return f"{self.deployment} {self.other}"

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


class SetPolicy(_Operation):
    """Choose how far updates go without being asked. No job: it waits for nothing and takes a moment."""

    mutating = False
    writes = True

    kind: Literal["policy"] = "policy"
    policy: UpdatePolicy
    lock_timeout: float = 0.0

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return str(self.policy)

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


class Scan(_Operation):
    """Read the state of the host; changes nothing and takes no lock.

    ``known``: the contents of the repository for which the sizes of deployments are known.
    """

    mutating = False

    kind: Literal["scan"] = "scan"
    known: str = Field(default="", max_length=128)
    lock_timeout: float = 0.0

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return ""

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


Operation = Annotated[
    Check
    | Diff
    | Pull
    | Scan
    | SetPolicy
    | Upgrade
    | Switch
    | Import
    | Unify
    | Stage
    | PullBound
    | Rollback
    | Unstage
    | Delete
    | Pin
    | KernelArguments
    | SoftReboot
    | Recover
    | Collect
    | Explain
    | Repair
    | Verify,
    Field(discriminator="kind"),
]


class Order(_Operation):
    """The message that starts a worker's work; ``root`` is the scratch root, None for the running host."""

    root: str | None
    operation: Operation


_order: Final = TypeAdapter(Order)


def parse_order(line: bytes) -> Order:
    """The order in ``line``; raises ``InvalidArgs``."""
    try:
        return _order.validate_json(line)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise InvalidArgs(f"order of a worker: {where}: {detail['msg']}") from None
