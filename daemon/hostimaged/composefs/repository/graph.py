"""What leads to what in a repository: references to images and streams, and these to objects.

Looked at for some objects that are sought, so that of a million others nothing is remembered. The reach is
that of ``gc``; nothing is changed, and damage is noted, never raised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hostimaged.composefs.erofs import Image
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.repository.gc import read_tables
from hostimaged.composefs.repository.links import IMAGES, STREAMS, Links, read_links
from hostimaged.errors import HostimageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hostimaged.composefs.repository.repository import Repository
    from hostimaged.ids import ObjectId


@dataclass(frozen=True, slots=True)
class Node:
    """A stream: those that it names, and what it keeps of the objects sought, streams aside."""

    below: tuple[ObjectId, ...] = ()
    holds: frozenset[ObjectId] = frozenset()


@dataclass(slots=True)
class Root:
    """A name that is a root: the object it leads to, and the references to it; () is an added root."""

    name: str
    id: ObjectId
    ways: list[tuple[str, ...]] = field(default_factory=list)


class Graph:
    """The repository as seen by one question; ``roots`` and ``without`` are as for ``gc.mark``.

    ``point`` is called between two reads and may raise, or give up the lock for a while.
    """

    def __init__(
        self,
        repository: Repository,
        point: Callable[[], None],
        *,
        roots: Collection[str] = (),
        without: Collection[str] = (),
    ) -> None:
        self._repository = repository
        self._point = point
        self._roots = frozenset(roots)
        #: Paths of what could not be read, and might keep anything.
        self.unreadable: set[str] = set()
        self.images = self._links(IMAGES, frozenset(without))
        self.streams = self._links(STREAMS, frozenset(without))
        #: Names of streams by their objects.
        self.names = {id_: name for name, id_ in self.streams.entries.items()}
        self._sought: frozenset[ObjectId] = frozenset()
        self._nodes: dict[ObjectId, Node] = {}

    def seek(self, sought: Collection[ObjectId]) -> None:
        """Say which objects are sought, before nodes are looked at."""
        self._sought = frozenset(sought)
        self._nodes.clear()

    def _links(self, category: str, without: frozenset[str]) -> Links:
        algorithm = self._repository.algorithm
        links = read_links(self._repository.fileno(), algorithm, category, without=without, check=self._point)
        self.unreadable.update(links.unreadable)
        return links

    def roots(self, links: Links) -> list[Root]:
        """The root names of ``images`` or ``streams``, each with what makes it one."""
        rooted: dict[str, Root] = {}

        def add(name: str, way: tuple[str, ...]) -> None:
            if name in links.entries:
                rooted.setdefault(name, Root(name, links.entries[name])).ways.append(way)

        for name in sorted(self._roots):
            add(name, ())
        for path, name in links.references.items():
            add(name, (path,))
        return list(rooted.values())

    def image_holds(self, root: Root) -> frozenset[ObjectId]:
        """What a root image keeps of the objects sought."""
        found = self._sought & {root.id}
        if found == self._sought:
            return found
        self._point()
        path = f"{IMAGES}/{root.name}"
        try:
            data = self._repository.read_object(root.id, MAX_IMAGE)
            return found | (self._sought & Image(data, self._repository.algorithm, name=path).objects())
        except HostimageError:
            self.unreadable.add(path)
            return found

    def node(self, id_: ObjectId) -> Node:
        """The stream in an object, which has a name; each is read once."""
        node = self._nodes.get(id_)
        if node is not None:
            return node
        self._point()
        try:
            with read_tables(self._repository, id_) as stream:
                named = frozenset(stream.named_refs.values())
                below = tuple(sorted(named & self.names.keys()))
                holds = self._sought & (named - self.names.keys())
                holds |= self._sought.intersection(stream.object_refs)
                node = Node(below, holds)
        except HostimageError:
            self.unreadable.add(f"{STREAMS}/{self.names[id_]}")
            node = Node()
        self._nodes[id_] = node
        return node
