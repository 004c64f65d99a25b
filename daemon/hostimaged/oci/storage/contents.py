"""What a store holds, read at one moment: who uses what, what is new, and what removing images would free."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hostimaged.oci.storage.leftovers import leftovers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from hostimaged.oci.storage.store import Store, StoredImage

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Bytes of a block in st_blocks.
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Contents:
    """Images of a store, the ids of those that containers use, layers with those below them, and the ids of
    layers that containers use or that nobody has.
    """

    store: Store
    images: tuple[StoredImage, ...]
    in_use: frozenset[str]
    parents: dict[str, str]
    layers_in_use: frozenset[str]
    #: The highest layers of what no image and no container has.
    loose: tuple[str, ...]

    @classmethod
    def read(cls, store: Store) -> Self:
        """All of ``store``. Raises as its methods do."""
        # In this order: what comes meanwhile is younger than the images that are seen.
        images = store.images()
        containers = store.containers()
        return cls(
            store,
            images,
            frozenset(image for image, _ in containers),
            {layer: facts.parent for layer, facts in store.layer_facts().items()},
            frozenset(layer for _, layer in containers),
            tuple(chain.top for chain in leftovers(store)),
        )

    def changed(self, image: StoredImage) -> float:
        """When something was last put to ``image``, in seconds since the epoch; what is gone is new."""
        return self._modified(f"overlay-images/{image.id}")

    def layer_changed(self, layer: str) -> float:
        """When a layer was made, in the same way."""
        return self._modified(f"overlay/{layer}")

    def _modified(self, path: str) -> float:
        with suppress(OSError):
            return os.stat(path, dir_fd=self.store.fileno(), follow_symlinks=False).st_mtime
        return float("inf")

    def freed(self, gone: Collection[str], loose: Iterable[str] = ()) -> int:
        """Bytes that are free once the images with these ids are gone, the layers that only they need, and
        those chains of ``loose``.

        Files that have a name elsewhere too, as objects of a repository, free nothing; those that share their
        blocks with others in another way count in full.
        """
        going = set(loose)
        kept = self._layers(image for image in self.images if image.id not in gone)
        kept |= self._below((*self.layers_in_use, *(top for top in self.loose if top not in going)))
        dead = (self._layers(image for image in self.images if image.id in gone) | self._below(going)) - kept
        places = [f"overlay/{layer}" for layer in dead] + [f"overlay-images/{image}" for image in gone]
        return _only_there(self.store.fileno(), places)

    def _layers(self, images: Iterable[StoredImage]) -> set[str]:
        return self._below(top for image in images for top in image.tops)

    def _below(self, tops: Iterable[str]) -> set[str]:
        """These layers and all below them."""
        found: set[str] = set()
        for layer in tops:
            while layer in self.parents and layer not in found:
                found.add(layer)
                layer = self.parents[layer]
        return found


def _only_there(root: int, places: Iterable[str]) -> int:
    """Bytes of the files of which all names are below ``places``."""
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    for status in _walk(root, places):
        key = status.st_dev, status.st_ino
        names, _, _ = seen.get(key, (0, 0, 0))
        links = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        seen[key] = names + 1, links, status.st_blocks * _BLOCK
    return sum(size for names, links, size in seen.values() if names >= links)


def _walk(root: int, places: Iterable[str]) -> Iterator[os.stat_result]:
    """The status of everything that is there; what a path is too long for is left out."""
    pending = list(places)
    while pending:
        place = pending.pop()
        with suppress(OSError):
            directory = os.open(place, _DIRECTORY, dir_fd=root)
            try:
                yield os.fstat(directory)
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(f"{place}/{entry.name}")
                        else:
                            yield entry.stat(follow_symlinks=False)
            finally:
                os.close(directory)
