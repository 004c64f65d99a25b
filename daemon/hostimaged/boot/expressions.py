"""Regular expressions over bytes as trees, whatever syntax they were written in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias


@dataclass(frozen=True, slots=True)
class Literal:
    """These bytes, at least one."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Set:
    """One byte of a set, given as 256 bits."""

    bits: int


@dataclass(frozen=True, slots=True)
class Concat:
    """Its items one after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alternate:
    """Any one of its items."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """``node`` at least ``low`` and at most ``high`` times (None: any number)."""

    node: Node
    low: int
    high: int | None


class Place(Enum):
    """A condition on a position, which takes no bytes."""

    START = auto()
    END = auto()
    WORD_EDGE = auto()
    NO_WORD_EDGE = auto()
    WORD_START = auto()
    WORD_END = auto()


@dataclass(frozen=True, slots=True)
class Look:
    """What follows (``ahead``) or precedes matches ``node``, or does not (``negative``)."""

    node: Node
    ahead: bool
    negative: bool


Node: TypeAlias = Literal | Set | Concat | Alternate | Repeat | Place | Look

#: All bytes, as a set.
ANY: Final = (1 << 256) - 1


def bits_of(members: bytes) -> int:
    """The set of these bytes."""
    bits = 0
    for byte in members:
        bits |= 1 << byte
    return bits
