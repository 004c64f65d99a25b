"""Garbage collection of a repository: what can be reached from its references stays, the rest goes.

What is reached is what composefs-rs 0.9 reaches, and the counts are its own (``cfsctl gc``):

* Roots are the names that references lead to, and names in ``images`` or ``streams`` that the caller adds.
* A root image keeps its object and every object that it needs. A stream keeps its object and those in its
  table; each stream it names is kept with what that keeps, any other object it names only for itself.
* Objects that nothing keeps go, and with them the names that lead to them.

Where composefs-rs stops, this goes on or keeps more. A reference to a name that is gone is pruned, and told.
What is reached but cannot be read is *damage*: nothing is swept then, as nobody knows what it keeps. That the
content of a stream or image is what its name says is checked before it is believed.

Which references there should be is for ``hostimaged.host`` to say.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.erofs import possible_objects
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.repository.links import IMAGES, STREAMS, Links, leads_somewhere, read_links
from hostimaged.composefs.repository.live import ObjectSet
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.composefs.splitstream import SplitStream
from hostimaged.errors import CorruptRepository, HostimageError, from_os_error, printable
from hostimaged.system import durable, syscalls

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hostimaged.composefs.repository.repository import Repository
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_HEX: Final = re.compile(r"[0-9a-fA-F]+\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is reached but cannot be read, so that what it keeps is not known."""

    #: ``image``, ``stream``, ``name`` (of which it cannot be told what it leads to) or ``directory``.
    kind: str
    #: Its path in the repository.
    name: str
    #: What is wrong, for people.
    text: str


@dataclass(frozen=True, slots=True)
class Marked:
    """What stays. Good for as long as the lock is held under which it was made."""

    objects: ObjectSet
    #: Names in ``images`` and ``streams`` that lead to an object that stays.
    images: frozenset[str]
    streams: frozenset[str]
    damage: tuple[Damage, ...]
    #: References that lead nowhere, as paths in the repository.
    dangling: tuple[str, ...]
    #: References that were taken as if they were not there.
    without_refs: frozenset[str]


@dataclass(frozen=True, slots=True)
class GcResult:
    """What was removed, or would be. Bytes are lengths of files; names and references count as pruned."""

    objects_removed: int = 0
    objects_bytes: int = 0
    images_pruned: int = 0
    streams_pruned: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "objects-removed": self.objects_removed,
            "objects-bytes": self.objects_bytes,
            "images-pruned": self.images_pruned,
            "streams-pruned": self.streams_pruned,
        }


def mark(
    repository: Repository,
    *,
    roots: Collection[str] = (),
    without_refs: Collection[str] = (),
    reporter: Reporter,
) -> Marked:
    """Find out what stays.

    ``roots``: names in ``images`` or ``streams`` that count as referred to; those that are missing do not
    matter. ``without_refs``: references, as ``streams/refs/...``, to be taken as if they were not there.
    Damage is reported, never raised. Between two points of ``reporter`` (``gc.mark``) the lock may be given
    up: what others remove then is no damage.
    """
    return _Marking(repository, frozenset(roots), frozenset(without_refs), reporter).run()


def read_tables(repository: Repository, id_: ObjectId) -> SplitStream:
    """The stream in an object, whose digest was checked; raises as ``open_stream`` does."""
    return SplitStream(repository.open_verified(id_), repository.algorithm, name=f"stream {id_.hex()}")


class _Marking:
    """A mark phase under way."""

    def __init__(
        self, repository: Repository, roots: frozenset[str], without: frozenset[str], reporter: Reporter
    ) -> None:
        self._repository = repository
        self._root = repository.fileno()
        self._roots = roots
        self._without = without
        self._reporter = reporter
        self._objects = ObjectSet()
        self._damage: list[Damage] = []

    def run(self) -> Marked:
        images, streams = self._links(IMAGES), self._links(STREAMS)
        for name in self._roots_in(images):
            self._point()
            self._mark_image(name, images.entries[name])
        self._mark_streams(streams)
        dangling = [
            path
            for links in (streams, images)
            for path, name in links.references.items()
            if path in links.broken and (name not in links.entries or self._is_whole(links.entries[name]))
        ]
        return Marked(
            self._objects,
            frozenset(self._staying(images)),
            frozenset(self._staying(streams)),
            tuple(self._damage),
            tuple(sorted(dangling)),
            self._without,
        )

    def _point(self) -> None:
        self._reporter.at("gc.mark")

    def _links(self, category: str) -> Links:
        links = read_links(
            self._root, self._repository.algorithm, category, without=self._without, check=self._point
        )
        for path, text in links.unreadable.items():
            self._damage.append(Damage("directory", path, text))
        return links

    def _roots_in(self, links: Links) -> Iterator[str]:
        """Names that are referred to, or that the caller added, and that lead to an object."""
        wanted = self._roots | set(links.references.values())
        for name in sorted(wanted & links.strange):
            path = f"{links.category}/{name}"
            self._damage.append(Damage("name", path, f"{printable(path)} does not lead to an object"))
        yield from sorted(wanted & links.entries.keys())

    def _mark_image(self, name: str, id_: ObjectId) -> None:
        self._objects.add(id_)
        # The content is what its name says, so its structure is what some writer made it: not looked at.
        path = f"{IMAGES}/{name}"
        try:
            data = self._repository.read_object(id_, MAX_IMAGE)
            needed = possible_objects(data, self._repository.algorithm, name=path)
        except HostimageError as error:
            self._note("image", path, error)
        else:
            self._objects.update(needed)

    def _mark_streams(self, streams: Links) -> None:
        names = {id_: name for name, id_ in streams.entries.items()}
        pending = [streams.entries[name] for name in self._roots_in(streams)]
        walked = set()
        while pending:
            id_ = pending.pop()
            if id_ in walked:
                continue
            walked.add(id_)
            self._objects.add(id_)
            self._point()
            try:
                with read_tables(self._repository, id_) as stream:
                    objects, named = stream.object_table, set(stream.named_refs.values())
            except HostimageError as error:
                self._note("stream", f"{STREAMS}/{names[id_]}", error)
                continue
            self._objects.update_joined(objects, self._repository.algorithm.digest_size)
            self._objects.update(named)
            pending += named & names.keys()

    def _note(self, kind: str, path: str, error: HostimageError) -> None:
        """Note damage, unless the name was removed since it was listed."""
        try:
            os.stat(path, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError:
            pass
        self._damage.append(Damage(kind, path, f"{printable(path)} cannot be read: {error.message}"))

    def _staying(self, links: Links) -> Iterator[str]:
        for name, id_ in links.entries.items():
            if id_ in self._objects and self._is_whole(id_):
                yield name

    def _is_whole(self, id_: ObjectId) -> bool:
        return self._repository.has_object(id_)


def sweep(repository: Repository, marked: Marked, *, dry_run: bool, reporter: Reporter) -> GcResult:
    """Remove what does not stay; with ``dry_run`` say what that would be, in the same numbers.

    The exclusive lock is held, unless ``dry_run``, and was when ``marked`` was made. Order: references that
    lead nowhere, names, then, after these were synced, objects. So whatever is cut short, every name that is
    left leads to something whole, and sweeping again ends the work. ``reporter`` may stop it at each of its
    points ``gc.refs``, ``gc.links``, ``gc.synced`` and ``gc.objects``. What others put in the place of
    objects is left alone. Raises ``CorruptRepository`` where there is damage, before anything is removed;
    ``ReadOnly``, ``NoSpace`` and ``StorageError``.
    """
    if marked.damage:
        raise CorruptRepository(
            f"nothing can be collected, as nobody knows what is needed: {marked.damage[0].text}"
        )
    if not dry_run:
        if marked.without_refs:
            raise ValueError("references that are there were taken as if they were not")
        repository.check_writable()
    return _Sweep(repository, marked, reporter, dry_run=dry_run).run()


class _Sweep:
    """A sweep under way."""

    def __init__(self, repository: Repository, marked: Marked, reporter: Reporter, *, dry_run: bool) -> None:
        self._repository = repository
        self._root = repository.fileno()
        self._marked = marked
        self._reporter = reporter
        self._dry_run = dry_run
        self._touched: set[str] = set()

    def run(self) -> GcResult:
        try:
            pruned = self._prune_references()
            self._reporter.at("gc.refs")
            for category, stays in ((IMAGES, self._marked.images), (STREAMS, self._marked.streams)):
                pruned[category] += self._prune_names(category, stays)
            self._reporter.at("gc.links")
            for directory in sorted(self._touched):
                self._sync(directory)
            self._reporter.at("gc.synced")
            removed = size = 0
            for byte in range(256):
                some, length = self._sweep_objects(f"{byte:02x}")
                removed += some
                size += length
                self._reporter.at("gc.objects")
        except OSError as error:
            raise from_os_error(error, "cannot collect garbage of the repository") from error
        return GcResult(removed, size, pruned[IMAGES], pruned[STREAMS])

    def _prune_references(self) -> dict[str, int]:
        pruned = {IMAGES: 0, STREAMS: 0}
        for path in self._marked.dangling:
            pruned[path.partition("/")[0]] += self._unlink(path)
        return pruned

    def _prune_names(self, category: str, stays: frozenset[str]) -> int:
        links = read_links(
            self._root,
            self._repository.algorithm,
            category,
            without=self._marked.without_refs,
            check=lambda: self._reporter.at("gc.links"),
        )
        gone = [name for name in links.entries if name not in stays]
        # Not ours, but whoever looks for names that lead nowhere would stumble over them for ever.
        gone += [name for name in links.strange if self._is_broken_link(f"{category}/{name}")]
        return sum(self._unlink(f"{category}/{name}") for name in gone)

    def _is_broken_link(self, path: str) -> bool:
        try:
            status = os.stat(path, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISLNK(status.st_mode) and not leads_somewhere(self._root, path)

    def _unlink(self, path: str) -> int:
        """Remove a link; 1, or 0 if it was gone."""
        try:
            if self._dry_run:
                os.stat(path, dir_fd=self._root, follow_symlinks=False)
            else:
                os.unlink(path, dir_fd=self._root)
        except FileNotFoundError:
            return 0
        self._touched.add(path.rpartition("/")[0])
        return 1

    def _sync(self, directory: str) -> None:
        if not self._dry_run:
            fd = syscalls.open_beneath(self._root, directory, _DIRECTORY_FLAGS)
            try:
                durable.sync_directory(fd)
            finally:
                os.close(fd)

    def _sweep_objects(self, prefix: str) -> tuple[int, int]:
        """Number and bytes of what goes of one directory of objects."""
        try:
            directory = syscalls.open_beneath(self._root, f"{OBJECTS}/{prefix}", _DIRECTORY_FLAGS)
        except FileNotFoundError:
            return 0, 0
        removed = size = 0
        try:
            for name in self._dead(prefix, os.listdir(directory)):
                try:
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        continue
                    if not self._dry_run:
                        os.unlink(name, dir_fd=directory)
                except FileNotFoundError:
                    continue
                removed += 1
                size += status.st_size
        finally:
            os.close(directory)
        return removed, size

    def _dead(self, prefix: str, names: list[str]) -> list[str]:
        """Those of ``names`` that are of objects which do not stay."""
        length = self._repository.algorithm.hex_length - 2
        size = self._repository.algorithm.digest_size
        named = [name for name in names if len(name) == length]
        joined = _parsed(prefix, named)
        # Where it is shorter there was white space, which is skipped.
        if len(joined) != len(named) * size:
            named = [name for name in named if _HEX.match(name)]
            joined = _parsed(prefix, named)
        return [named[place] for place in self._marked.objects.absent(joined, size)]


def _parsed(prefix: str, names: list[str]) -> bytes:
    """The ids of objects one after the other; fewer bytes if any of ``names`` is none of one."""
    try:
        return bytes.fromhex(prefix + prefix.join(names)) if names else b""
    except ValueError:
        return b""
