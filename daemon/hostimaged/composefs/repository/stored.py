"""What became of a content that was stored, and how it may come into the repository."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostimaged.ids import ObjectId


class Sharing(StrEnum):
    """How the content of a file of another store becomes an object."""

    #: It is copied.
    COPY = "copy"
    #: It shares its blocks (reflink) or is the same file (hard link); where neither can be, it is copied.
    AUTO = "auto"
    #: As ``AUTO``, but nothing is copied.
    REQUIRE = "require"


class How(StrEnum):
    """How an object came into the repository."""

    #: It was there.
    PRESENT = "present"
    COPIED = "copied"
    REFLINKED = "reflinked"
    LINKED = "linked"


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is in the repository now, and how it got there."""

    id: ObjectId
    how: How

    @property
    def is_new(self) -> bool:
        """Whether it was not there before."""
        return self.how is not How.PRESENT
