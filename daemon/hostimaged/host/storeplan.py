"""What a collection does to bootc's containers-storage; ``storekeep`` decides it, ``storecollect`` does it.

Nothing of containers-storage is imported here: most hosts have no such store, and collect without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hostimaged.oci.storage.store import StoredImage

#: Names that a result tells.
_TOLD: Final = 100


@dataclass(frozen=True, slots=True)
class StorePlan:
    """What a collection does to the store: images that stay, with the reasons, and those that go.

    ``layers`` are the highest of layers that nobody has, which go too, and ``spared`` those that may be of a
    pull that was interrupted, or is under way. ``freed``: bytes that all this frees. ``doubts``: why nothing
    goes. ``needed``: ids of those that deployments need, or what was pulled. ``exists`` is False where there
    is no store.
    """

    stay: tuple[tuple[StoredImage, tuple[str, ...]], ...] = ()
    gone: tuple[StoredImage, ...] = ()
    layers: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    freed: int = 0
    doubts: tuple[str, ...] = ()
    needed: frozenset[str] = frozenset()
    exists: bool = True

    @property
    def anything(self) -> bool:
        """Whether anything goes."""
        return bool(self.gone or self.layers)

    @property
    def names(self) -> list[str]:
        """What goes, for people."""
        return [image.called for image in self.gone]

    def told(self) -> dict[str, Any]:
        """What a result says of the store; nothing where there is nothing to say.

        ``store-images`` that go, the number of ``store-layers`` beside them, ``store-bytes`` that this frees,
        and ``store-kept``: why nothing goes.
        """
        found: dict[str, Any] = {}
        if self.gone:
            found["store-images"] = self.names[:_TOLD]
        if self.layers:
            found["store-layers"] = len(self.layers)
        if self.anything:
            found["store-bytes"] = self.freed
        if self.doubts:
            found["store-kept"] = list(self.doubts[:_TOLD])
        return found


NO_STORE: Final = StorePlan(exists=False)
