"""What each kind of job does with the repository: the one table of it.

The lock of the repository is shared by whoever adds or reads content, and exclusive to whoever removes some
or writes what boots (``Repository``). A job that reads for an hour must not keep another from a moment of
exclusiveness, so readers of ours hold the lock in slices, and pause when they are asked to.
"""

from __future__ import annotations

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


#: By kind of job, those that later versions will have included.
ACCESS: Final = {
    "check": Access.UNLOCKED,
    "scan": Access.UNLOCKED,
    "verify": Access.SLICES,
    "diff": Access.SLICES,
    "explain": Access.SLICES,
    "pull": Access.SHARED,
    "upgrade": Access.ALONE,
    "stage": Access.ALONE,
    "switch": Access.ALONE,
    "rollback": Access.ALONE,
    "unstage": Access.ALONE,
    "delete": Access.ALONE,
    "collect": Access.ALONE,
    "repair": Access.ALONE,
    "pin": Access.ALONE,
    "kargs": Access.ALONE,
    "unify": Access.ALONE,
    "recover": Access.ALONE,
}
