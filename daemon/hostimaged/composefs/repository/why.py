"""Why something is in a repository: the ways that lead to it from its references.

The same reach as that of ``gc.mark``, told instead of counted. Nothing is changed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import FsVerityError
from hostimaged.composefs.repository.graph import Graph
from hostimaged.composefs.repository.links import IMAGES, STREAMS
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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
    graph = _graph(repository, roots, without_refs, reporter)
    sought = _sought(repository, name, graph)
    if sought is None:
        return Why((), found=False, unreadable=tuple(sorted(graph.unreadable)))
    graph.seek({sought})
    last = f"{OBJECTS}/{sought.pathname}"
    chains = [
        (*way, f"{IMAGES}/{root.name}", last)
        for root in graph.roots(graph.images)
        if graph.image_holds(root)
        for way in root.ways
    ]
    for root in graph.roots(graph.streams):
        inside = _way(graph, root.id, sought)
        if inside is not None:
            chains += [(*way, *inside, last) for way in root.ways]
    found = bool(chains) or repository.has_object(sought)
    return Why(tuple(sorted(chains)[:MAX_CHAINS]), found, tuple(sorted(graph.unreadable)))


def dependants(
    repository: Repository, ids: Collection[ObjectId], *, roots: Collection[str] = (), reporter: Reporter
) -> Mapping[ObjectId, tuple[str, ...]]:
    """For each of ``ids`` the references that keep it, as paths in the repository, sorted.

    An added root is told as the path of the name itself. What is only reached through a stream that cannot
    be read is not found: ask for that stream's object too.
    """
    graph = _graph(repository, roots, (), reporter)
    graph.seek(ids)
    found: dict[ObjectId, set[str]] = {id_: set() for id_ in ids}
    for links in (graph.images, graph.streams):
        for root in graph.roots(links):
            held = graph.image_holds(root) if links is graph.images else _held(graph, root.id, found.keys())
            paths = [way[0] if way else f"{links.category}/{root.name}" for way in root.ways]
            for id_ in held:
                found[id_].update(paths)
    return {id_: tuple(sorted(paths)) for id_, paths in found.items()}


def _graph(
    repository: Repository, roots: Collection[str], without: Collection[str], reporter: Reporter
) -> Graph:
    return Graph(repository, lambda: reporter.at("why.mark"), roots=roots, without=without)


def _sought(repository: Repository, name: str, graph: Graph) -> ObjectId | None:
    for links in (graph.streams, graph.images):
        if name in links.entries:
            return links.entries[name]
    try:
        return fsverity.parse_hex(repository.algorithm, name)
    except FsVerityError:
        return None


def _way(graph: Graph, start: ObjectId, sought: ObjectId) -> tuple[str, ...] | None:
    """The streams, by path, from the one in ``start`` to one that is, or that keeps, ``sought``."""
    came_from: dict[ObjectId, ObjectId | None] = {start: None}
    pending = deque([start])
    while pending:
        id_ = pending.popleft()
        if id_ == sought or graph.node(id_).holds:
            way = []
            at: ObjectId | None = id_
            while at is not None:
                way.append(f"{STREAMS}/{graph.names[at]}")
                at = came_from[at]
            return tuple(reversed(way))
        for below in graph.node(id_).below:
            if below not in came_from:
                came_from[below] = id_
                pending.append(below)
    return None


def _held(graph: Graph, start: ObjectId, sought: Collection[ObjectId]) -> set[ObjectId]:
    """Those of ``sought`` that the stream in ``start`` keeps, itself included."""
    walked = {start}
    pending = [start]
    held: set[ObjectId] = set()
    while pending:
        node = graph.node(pending.pop())
        held |= node.holds
        new = set(node.below) - walked
        walked |= new
        pending += new
    return held | (walked & set(sought))
