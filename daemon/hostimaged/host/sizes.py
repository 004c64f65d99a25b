"""How much space a deployment takes alone: what deleting it and collecting garbage would free.

Counted are blocks, as ``Repository.used_bytes`` counts them: of objects, of the state directory, and of a
kernel or UKI that no other deployment's entries start. An object is a deployment's own if nothing but that
deployment leads to it. What leads to objects (composefs-rs 0.9, garbage collection):

* A deployment leads to its boot image and, by the tags that were made for it, pulled it or pinned it, to its
  manifest. Without a manifest in the repository, to all that its boot image needs.
* All other references, to streams and to images, lead to what they name.
* A stream leads to its objects, and to what it names; a stream that is named, to all of its own.

Where something that is led to cannot be read, nobody knows how much would be free. Nothing here takes a lock:
what is removed meanwhile counts as damage, and its removal is followed by another look.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import Image
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.repository import Repository
from hostimaged.errors import Cancelled, HostimageError, from_os_error
from hostimaged.host.read import read_host
from hostimaged.host.statedirs import state_directory
from hostimaged.host.tags import BOOTC_TAG, PIN_TAG
from hostimaged.oci.images import PULL_TAG, TAGS, decode_tag, manifest_stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from hostimaged.host.model import Deployment, HostState
    from hostimaged.ids import DeploymentId, ObjectId
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Tags that are there for the sake of a deployment, where there is one of their manifest.
_OWN_TAGS: Final = (BOOTC_TAG, PIN_TAG, PULL_TAG)
#: Directory of the references that keep boot images of deployments without a manifest.
_OWN_IMAGES: Final = "hostimaged"
_BLOCK: Final = 512  # unit of st_blocks
#: Bytes of an id by which objects are told apart here: half the memory, for numbers that decide nothing.
_SHORT: Final = 16
#: Objects between two looks whether to stop.
_STEP: Final = 1000


@dataclass(frozen=True, slots=True)
class Sizes:
    """What was measured, in bytes.

    ``used``: what all objects take. ``exclusive``: what would be free without each deployment; empty if that
    cannot be known. It holds as long as ``contents`` does (``Roots.contents``).
    """

    contents: str
    used: int
    exclusive: Mapping[DeploymentId, int]


def measure(paths: HostPaths, known: str, reporter: Reporter) -> Sizes | None:
    """Measure the host at ``paths``; None without a repository, or with one that cannot be read.

    With ``known`` contents nothing but ``used`` is measured. Raises what ``reporter`` raises at its point
    ``sizes``.
    """
    try:
        repository = Repository.open_unlocked(paths.repository)
    except HostimageError:
        return None
    with repository:
        state = read_host(paths, repository)
        contents = contents_of(repository, state)
        if contents and contents != known:
            try:
                used, exclusive = _exclusive(paths, repository, state, reporter)
                return Sizes(contents, used, exclusive)
            except Cancelled:
                raise
            except HostimageError:
                contents = ""
        try:
            return Sizes(contents, repository.used_bytes(), {})
        except HostimageError:
            return None


def contents_of(repository: Repository, state: HostState) -> str:
    """``Roots.contents`` of a host; "" if that cannot be read."""
    try:
        return _find_roots(repository, state).contents(repository)
    except HostimageError:
        return ""


@dataclass(frozen=True, slots=True)
class Roots:
    """What leads into a repository: names of streams and of images, by who leads there, as bits.

    The lowest bit is everybody else's, the one above that of the first deployment, and so on.
    """

    deployments: tuple[Deployment, ...]
    streams: Mapping[str, int]
    images: Mapping[str, int]

    def contents(self, repository: Repository) -> str:
        """A text that is the same as long as the sizes of objects are: the roots by their content.

        Raises as reading does.
        """
        total = hashlib.sha256()
        for row in self.deployments:
            total.update(f"{row.id}\n".encode())
        for name, bits in sorted(self.streams.items()):
            id_ = repository.has_stream(name)
            total.update(f"{name} {bits} {'' if id_ is None else id_.hex()}\n".encode())
        for name, bits in sorted(self.images.items()):
            total.update(f"{name} {bits}\n".encode())
        return total.hexdigest()


def _find_roots(repository: Repository, state: HostState) -> Roots:
    """The roots of the repository of the host that ``state`` is of. Raises as reading does."""
    rows = state.visible
    manifests: dict[str, int] = {}
    images: dict[str, int] = {}
    for place, row in enumerate(rows):
        images[str(row.id)] = 2 << place
        if row.manifest_digest is not None:
            name = manifest_stream(row.manifest_digest)
            manifests[name] = manifests.get(name, 0) | 2 << place
    streams = dict(manifests)
    for reference, name in repository.stream_refs().items():
        directory, _, tag = reference.rpartition("/")
        is_own = directory == TAGS and decode_tag(tag).startswith(_OWN_TAGS) and name in manifests
        if not is_own:
            streams[name] = streams.get(name, 0) | 1
    for reference, name in repository.image_refs().items():
        if reference != f"{_OWN_IMAGES}/{name}" or name not in images:
            images[name] = images.get(name, 0) | 1
    return Roots(rows, streams, images)


def _exclusive(
    paths: HostPaths, repository: Repository, state: HostState, reporter: Reporter
) -> tuple[int, dict[DeploymentId, int]]:
    """Bytes that all objects take, and those that would be free without each deployment.

    Raises ``HostimageError`` where that cannot be known, and what ``reporter`` raises at its point ``sizes``.
    """
    roots = _find_roots(repository, state)
    bits = _Walk(repository, roots, reporter).run()
    sizes = dict.fromkeys((2 << place for place in range(len(roots.deployments))), 0)
    used = 0
    for count, (name, status) in enumerate(repository.scan_objects()):
        if count % _STEP == 0:
            reporter.at("sizes")
        size = status.st_blocks * _BLOCK
        used += size
        owner = bits.get(_short_name(name), 0)
        if owner in sizes:
            sizes[owner] += size
    for place, row in enumerate(roots.deployments):
        reporter.at("sizes")
        sizes[2 << place] += _tree_bytes(state_directory(paths, row.id), reporter)
        sizes[2 << place] += sum(_tree_bytes(path, reporter) for path in _own_files(state, row))
    return used, {row.id: sizes[2 << place] for place, row in enumerate(roots.deployments)}


def _short_name(name: str) -> bytes:
    """From a path below ``objects``; nothing for what is no object."""
    try:
        return bytes.fromhex(name.replace("/", "", 1))[:_SHORT]
    except ValueError:
        return b""


class _Walk:
    """Finds out who leads to each object: bits by the beginning of its id."""

    def __init__(self, repository: Repository, roots: Roots, reporter: Reporter) -> None:
        self._repository = repository
        self._roots = roots
        self._reporter = reporter
        self._found: dict[bytes, int] = {}

    def run(self) -> dict[bytes, int]:
        """All of it; an object that nothing leads to is not in it."""
        for id_, bits in self._streams().items():
            self._reporter.at("sizes")
            with self._repository.open_stream("", id_) as stream:
                self._add((id_, *stream.object_refs, *stream.named_refs.values()), bits)
        names = set(self._repository.images())
        for name, bits in self._roots.images.items():
            if name in names:
                self._reporter.at("sizes")
                self._image(name, bits)
        return self._found

    def _add(self, ids: Iterable[bytes], bits: int) -> None:
        found = self._found
        for id_ in ids:
            short = id_[:_SHORT]
            found[short] = found.get(short, 0) | bits

    def _streams(self) -> dict[ObjectId, int]:
        """Who leads to each stream."""
        repository = self._repository
        ids = {name: id_ for name in repository.streams() if (id_ := repository.has_stream(name)) is not None}
        known = frozenset(ids.values())
        reached: dict[ObjectId, int] = {}
        named: dict[ObjectId, frozenset[ObjectId]] = {}
        pending = [(ids[name], bits) for name, bits in self._roots.streams.items() if name in ids]
        while pending:
            id_, bits = pending.pop()
            before = reached.get(id_, 0)
            if before | bits == before:
                continue
            reached[id_] = before | bits
            if id_ not in named:
                self._reporter.at("sizes")
                with repository.open_stream("", id_) as stream:
                    named[id_] = known.intersection(stream.named_refs.values())
            pending += ((below, bits) for below in named[id_])
        return reached

    def _image(self, name: str, bits: int) -> None:
        id_ = fsverity.parse_hex(self._repository.algorithm, name)
        self._add([id_], bits)
        others = bits & 1
        bare = sum(2 << place for place, row in enumerate(self._roots.deployments) if self._is_bare(row))
        if whole := others | bits & bare:
            data = self._repository.read_object(id_, MAX_IMAGE)
            self._add(Image(data, self._repository.algorithm, name=f"image {name}").objects(), whole)

    def _is_bare(self, row: Deployment) -> bool:
        """Whether its manifest is not in the repository, so that no layer has what its boot image needs."""
        digest = row.manifest_digest
        return digest is None or self._repository.has_stream(manifest_stream(digest)) is None


def _own_files(state: HostState, row: Deployment) -> Iterator[Path]:
    """What only the entries of this deployment make the boot loader read, where it is mounted."""
    mine = [entry for entry in state.sets.entries if entry.id == row.id]
    used = {file for entry in state.sets.entries if entry.id != row.id for file in entry.files}
    for file, is_uki in dict.fromkeys((file, entry.is_uki) for entry in mine for file in entry.files):
        path = state.dirs.uki_file(file) if is_uki else state.dirs.file(file)
        if file not in used and path is not None:
            yield path
            if is_uki:
                yield path.with_name(path.name.removesuffix(bls.EFI_SUFFIX) + bls.ADDONS_SUFFIX)


def _tree_bytes(path: Path, reporter: Reporter) -> int:
    """Blocks of a file, or of a directory with all that is in it on the same file system; 0 for nothing."""
    total = 0
    links: set[int] = set()
    try:
        device = path.lstat().st_dev
        pending = [os.fspath(path)]
        while pending:
            reporter.at("sizes")
            place = pending.pop()
            found = os.lstat(place)
            if found.st_dev != device or found.st_ino in links:
                continue
            if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
                links.add(found.st_ino)
            total += found.st_blocks * _BLOCK
            if stat.S_ISDIR(found.st_mode):
                pending += (entry.path for entry in os.scandir(place))
    except FileNotFoundError:
        return total
    except OSError as error:
        raise from_os_error(error, f"cannot look at {path}") from error
    return total
