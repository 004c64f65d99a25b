"""What a worker process can be told to do, and with which privileges.

An operation is plain data with everything that it needs: a worker asks nobody. Two equal operations do the
same.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hostimaged.errors import InvalidArgs
from hostimaged.oci.reference import MAX_LENGTH, ImageReference, Transport
from hostimaged.system.syscalls import Capability

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

#: An order is a few strings.
MAX_ORDER: Final = 64 << 10


class Profile(StrEnum):
    """Privileges of a worker, chosen before it reads its first byte of input."""

    SCAN = "scan"
    PULL = "pull"
    PULL_STORAGE = "pull-storage"


#: Capabilities a worker keeps; all others leave its bounding set too. Everything we write belongs to root,
#: whose files need no capability. DAC_READ_SEARCH: a repository, layout, archive or auth file may belong to
#: another user. containers-storage is read by skopeo, which mounts layers and enters user namespaces.
CAPABILITIES: Final[Mapping[Profile, frozenset[Capability]]] = {
    Profile.SCAN: frozenset({Capability.DAC_READ_SEARCH}),
    Profile.PULL: frozenset({Capability.DAC_READ_SEARCH}),
    Profile.PULL_STORAGE: frozenset(
        {
            Capability.CHOWN,
            Capability.DAC_OVERRIDE,
            Capability.DAC_READ_SEARCH,
            Capability.FOWNER,
            Capability.FSETID,
            Capability.MKNOD,
            Capability.SETFCAP,
            Capability.SETGID,
            Capability.SETUID,
            Capability.SYS_ADMIN,
            Capability.SYS_CHROOT,
        }
    ),
}


class _Operation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether the job lock is held for the whole operation, and only one such job runs.
    mutating: ClassVar[bool] = True
    #: Whether a background job of this kind is stopped, and queued again, for any job of a user.
    gives_way: ClassVar[bool] = False

    @property
    def identity(self) -> Hashable:
        """What makes two requests ask for the same thing; settings of the daemon do not."""
        return self


class Pull(_Operation):
    """Fetch the image ``reference`` into the repository."""

    kind: Literal["pull"] = "pull"
    reference: str = Field(max_length=MAX_LENGTH)
    expect_digest: str | None = Field(default=None, max_length=128)
    verity: Literal["require", "opportunistic"] = "require"
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)

    @property
    def identity(self) -> Hashable:
        """See ``_Operation``."""
        return (self.kind, self.reference, self.expect_digest)

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return self.reference

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return _fetching(self.reference)


class Check(_Operation):
    """Find out what ``reference`` is at its source now, and how much of it is missing; changes nothing."""

    mutating = False
    gives_way = True

    kind: Literal["check"] = "check"
    reference: str = Field(max_length=MAX_LENGTH)
    lock_timeout: float = 0.0

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
        return _fetching(self.reference)


class Scan(_Operation):
    """Read the state of the host; changes nothing and takes no lock."""

    mutating = False

    kind: Literal["scan"] = "scan"
    lock_timeout: float = 0.0

    @property
    def target(self) -> str:
        """What the job works on, for people."""
        return ""

    @property
    def profile(self) -> Profile:
        """Privileges that the operation needs."""
        return Profile.SCAN


def _fetching(reference: str) -> Profile:
    transport = ImageReference.parse(reference).transport
    return Profile.PULL_STORAGE if transport is Transport.CONTAINERS_STORAGE else Profile.PULL


Operation = Annotated[Check | Pull | Scan, Field(discriminator="kind")]


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
