"""A set of object ids that stays small when there are a million of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

#: Bytes of a digest that are kept.
_KEPT: Final = 8


class ObjectSet:
    """Objects that are to stay.

    Only the first eight bytes of each id are kept, which takes a third of the memory: two ids that agree in
    them count as one. Who makes such a pair on purpose gets an object kept that nothing needs; none is ever
    taken for one that nothing needs.
    """

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def add(self, id_: bytes) -> None:
        """Have ``id_`` in it."""
        self._keys.add(int.from_bytes(id_[:_KEPT], sys.byteorder))

    def update(self, ids: Collection[bytes]) -> None:
        """Have all of ``ids`` in it, which are equally long."""
        if ids:
            joined = b"".join(ids)
            self.update_joined(joined, len(joined) // len(ids))

    def update_joined(self, joined: bytes, size: int) -> None:
        """Have the ids in it that ``joined`` is made of, ``size`` bytes each."""
        self._keys.update(_heads(joined, size))

    def absent(self, joined: bytes, size: int) -> list[int]:
        """Positions of the ids, ``size`` bytes each, in ``joined`` that are not in it."""
        keys = self._keys
        return [place for place, key in enumerate(_heads(joined, size)) if key not in keys]

    def __contains__(self, id_: bytes) -> bool:
        return int.from_bytes(id_[:_KEPT], sys.byteorder) in self._keys

    def __len__(self) -> int:
        return len(self._keys)


def _heads(joined: bytes, size: int) -> list[int]:
    # Eight bytes at a time, and of those the first of each id: at the speed of C.
    return memoryview(joined).cast("Q")[:: size // _KEPT].tolist()
