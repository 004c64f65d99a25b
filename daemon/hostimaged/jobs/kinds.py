"""Kinds of jobs: what each does with the repository, and what it is called meanwhile. The one table of them.

The lock of the repository is shared by whoever adds or reads content, and exclusive to whoever removes some
or writes what boots (``Repository``). A job that reads for an hour must not keep another from a moment of
exclusiveness, so readers of ours hold the lock in slices, and pause when they are asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Access(Enum):
    """How a job uses the lock of the repository."""

    #: Not at all: it looks without the lock, and reads again what is gone.
    UNLOCKED = "unlocked"
    #: Shared, in slices: it pauses when another job asks for the repository alone.
    SLICES = "slices"
    #: Shared, from its first byte to its last: what it adds is not referenced before.
    SHARED = "shared"
    #: Shared or not at all, and exclusive in phases for which it asks (``Channel.alone``).
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job. ``state``: what the daemon is doing while one runs (property State of the Manager)."""

    access: Access
    state: str


#: By kind of job, those that later versions will have included.
KINDS: Final = {
    "check": Kind(Access.UNLOCKED, "checking"),
    "scan": Kind(Access.UNLOCKED, "checking"),
    "verify": Kind(Access.SLICES, "verifying"),
    "diff": Kind(Access.SLICES, "checking"),
    "explain": Kind(Access.SLICES, "checking"),
    "pull": Kind(Access.SHARED, "pulling"),
    "upgrade": Kind(Access.ALONE, "pulling"),
    "stage": Kind(Access.ALONE, "staging"),
    "switch": Kind(Access.ALONE, "pulling"),
    "rollback": Kind(Access.ALONE, "staging"),
    "unstage": Kind(Access.ALONE, "staging"),
    "delete": Kind(Access.ALONE, "collecting"),
    "collect": Kind(Access.ALONE, "collecting"),
    "repair": Kind(Access.ALONE, "verifying"),
    "pin": Kind(Access.ALONE, "staging"),
    "kargs": Kind(Access.ALONE, "staging"),
    "unify": Kind(Access.SHARED, "pulling"),
    "recover": Kind(Access.ALONE, "staging"),
    # Never jobs of their own: what jobs go on, or end, with.
    "import": Kind(Access.SHARED, "pulling"),
    "bound": Kind(Access.ALONE, "pulling"),
    "soft-reboot": Kind(Access.ALONE, "staging"),
}
