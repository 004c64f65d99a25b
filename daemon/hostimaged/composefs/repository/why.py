"""Why something is in a repository: the ways that lead to it from its references.

The same reach as that of ``gc.mark``, told instead of counted. Nothing is changed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import Image
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.fsverity import FsVerityError
from hostimaged.composefs.repository.gc import read_tables
from hostimaged.composefs.repository.links import IMAGES, STREAMS, Links, read_links
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.errors import HostimageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hostimaged.composefs.repository.repository import Repository
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter

#: Ways told; a base layer has one per image made of it.
MAX_CHAINS: Final = 1000


@dataclass(frozen=True, slots=True)
class Why:
    """What keeps one thing."""

    #: Each a shortest way from a reference, or an added root, to the thing: paths in the repository, the
    #: object being the last. Sorted; at most ``MAX_CHAINS``.
    chains: tuple[tuple[str, ...], ...]
    #: Whether there is anything of that name.
    found: bool
    #: What could not be read, and might keep it as well.
    unreadable: tuple[str, ...]


def why(
    repository: Repository,
    name: str,
    *,
    roots: Collection[str] = (),
    without_refs: Collection[str] = (),
    reporter: Reporter,
) -> Why:
    """What keeps ``name``: an object or image (its id in hex), or a stream (its name).

    ``roots`` and ``without_refs`` are as for ``gc.mark``, and so are the points of ``reporter``
    (``why.mark``). Never raises for damage.
    """
    return _Search(repository, frozenset(roots), frozenset(without_refs), reporter).run(name)


@dataclass(slots=True)
class _Node:
    """A stream or root image: the streams it leads to, and whether it keeps the object sought."""

    below: tuple[ObjectId, ...] = ()
    keeps: bool = False


@dataclass(slots=True)
class _Roots:
    """How a name is reached from outside."""

    name: str
    ways: list[tuple[str, ...]] = field(default_factory=list)


class _Search:
    """One question."""

    def __init__(
        self, repository: Repository, roots: frozenset[str], without: frozenset[str], reporter: Reporter
    ) -> None:
        self._repository = repository
        self._roots = roots
        self._without = without
        self._reporter = reporter
        self._nodes: dict[ObjectId, _Node] = {}
        self._names: dict[ObjectId, str] = {}
        self._unreadable: set[str] = set()

    def run(self, name: str) -> Why:
        images, streams = self._links(IMAGES), self._links(STREAMS)
        sought = self._sought(name, images, streams)
        if sought is None:
            return Why((), found=False, unreadable=tuple(sorted(self._unreadable)))
        self._names = {id_: name for name, id_ in streams.entries.items()}
        last = f"{OBJECTS}/{sought.pathname}"
        chains: list[tuple[str, ...]] = []
        for root in self._rooted(images):
            path = f"{IMAGES}/{root.name}"
            if self._image_keeps(images.entries[root.name], sought, path):
                chains += [(*way, path, last) for way in root.ways]
        for root in self._rooted(streams):
            inside = self._way(streams.entries[root.name], sought)
            if inside is not None:
                chains += [(*way, *inside, last) for way in root.ways]
        found = bool(chains) or self._repository.has_object(sought)
        return Why(tuple(sorted(chains)[:MAX_CHAINS]), found, tuple(sorted(self._unreadable)))

    def _point(self) -> None:
        self._reporter.at("why.mark")

    def _links(self, category: str) -> Links:
        links = read_links(
            self._repository.fileno(),
            self._repository.algorithm,
            category,
            without=self._without,
            check=self._point,
        )
        self._unreadable.update(links.unreadable)
        return links

    def _sought(self, name: str, images: Links, streams: Links) -> ObjectId | None:
        for links in (streams, images):
            if name in links.entries:
                return links.entries[name]
        try:
            return fsverity.parse_hex(self._repository.algorithm, name)
        except FsVerityError:
            return None

    def _rooted(self, links: Links) -> Iterator[_Roots]:
        """The root names of a category, each with what makes it one."""
        rooted: dict[str, _Roots] = {}
        for name in self._roots & links.entries.keys():
            rooted.setdefault(name, _Roots(name)).ways.append(())
        for path, name in links.references.items():
            if name in links.entries:
                rooted.setdefault(name, _Roots(name)).ways.append((path,))
        yield from rooted.values()

    def _image_keeps(self, id_: ObjectId, sought: ObjectId, path: str) -> bool:
        if id_ == sought:
            return True
        self._point()
        try:
            data = self._repository.read_object(id_, MAX_IMAGE)
            return sought in Image(data, self._repository.algorithm, name=path).objects()
        except HostimageError:
            self._unreadable.add(path)
            return False

    def _way(self, start: ObjectId, sought: ObjectId) -> tuple[str, ...] | None:
        """The streams, by path, from the one in ``start`` to one that is, or that keeps, ``sought``."""
        came_from: dict[ObjectId, ObjectId | None] = {start: None}
        pending = deque([start])
        while pending:
            id_ = pending.popleft()
            if id_ == sought or self._node(id_, sought).keeps:
                way = []
                at: ObjectId | None = id_
                while at is not None:
                    way.append(f"{STREAMS}/{self._names[at]}")
                    at = came_from[at]
                return tuple(reversed(way))
            for below in self._node(id_, sought).below:
                if below not in came_from:
                    came_from[below] = id_
                    pending.append(below)
        return None

    def _node(self, id_: ObjectId, sought: ObjectId) -> _Node:
        """What the stream in an object leads to; each is read once."""
        node = self._nodes.get(id_)
        if node is not None:
            return node
        self._point()
        try:
            with read_tables(self._repository, id_) as stream:
                named = set(stream.named_refs.values())
                below = tuple(sorted(named & self._names.keys()))
                # A stream that is sought is reached by its own name, a step further.
                keeps = sought in stream.object_refs or (sought in named and sought not in self._names)
                node = _Node(below, keeps)
        except HostimageError:
            self._unreadable.add(f"{STREAMS}/{self._names[id_]}")
            node = _Node()
        self._nodes[id_] = node
        return node
