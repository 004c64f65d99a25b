"""Repositories with random streams, images and references, and what of it stays, by the plainest rule."""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from hostimaged.composefs.erofs import Format, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.ids import ObjectId

_TYPE = int.from_bytes(b"tests...", "little")


@dataclass
class RandomRepository:
    """A repository below ``path``, and what it was made of."""

    path: Path
    algorithm: Algorithm
    objects: list[ObjectId] = field(default_factory=list)
    #: Of each stream: its object, the objects in its table, and those it names.
    streams: dict[str, tuple[ObjectId, set[ObjectId], set[ObjectId]]] = field(default_factory=dict)
    #: Of each image, by its id in hex: its object and the objects that it needs.
    images: dict[str, tuple[ObjectId, set[ObjectId]]] = field(default_factory=dict)
    #: Path below ``streams/refs`` or ``images/refs`` to the name.
    stream_refs: dict[str, str] = field(default_factory=dict)
    image_refs: dict[str, str] = field(default_factory=dict)

    @property
    def references(self) -> dict[str, ObjectId]:
        """Path in the repository of each reference to the object at its end."""
        streams = {f"streams/refs/{ref}": self.streams[name][0] for ref, name in self.stream_refs.items()}
        images = {f"images/refs/{ref}": self.images[name][0] for ref, name in self.image_refs.items()}
        return streams | images

    def kept_by(self, root: ObjectId, *, as_image: bool) -> set[ObjectId]:
        """Everything that a reference to the image, or to the stream, in ``root`` keeps."""
        if as_image:
            return {root} | next(needed for id_, needed in self.images.values() if id_ == root)
        by_object = {id_: (table, named) for id_, table, named in self.streams.values()}
        kept: set[ObjectId] = set()
        pending = [root]
        while pending:
            id_ = pending.pop()
            if id_ in kept and id_ != root:
                continue
            kept.add(id_)
            table, named = by_object.get(id_, (set(), set()))
            kept |= table
            pending += named - kept
        return kept

    def live(self, roots: Collection[str] = (), without: Collection[str] = ()) -> set[ObjectId]:
        """Everything that references and the names ``roots`` keep."""
        live: set[ObjectId] = set()
        for path, id_ in self.references.items():
            if path not in without:
                live |= self.kept_by(id_, as_image=path.startswith("images/"))
        for name in roots:
            if name in self.streams:
                live |= self.kept_by(self.streams[name][0], as_image=False)
            if name in self.images:
                live |= self.kept_by(self.images[name][0], as_image=True)
        return live


def make(path: Path, seed: int, algorithm: Algorithm = Algorithm.SHA256) -> RandomRepository:
    """A random repository at ``path``; the same for the same ``seed``."""
    rng = random.Random(seed)
    made = RandomRepository(path, algorithm)
    with Repository.init(path, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0] as repository:
        for number in range(rng.randrange(5, 60)):
            content = b"%d %d " % (seed, number) * rng.randrange(1, 400)
            made.objects.append(repository.store_object(content).id)
        for number in range(rng.randrange(6)):
            _add_image(repository, made, rng, number)
        for number in range(rng.randrange(1, 15)):
            _add_stream(repository, made, rng, number)
        _add_references(repository, made, rng)
    return made


def _add_image(repository: Repository, made: RandomRepository, rng: random.Random, number: int) -> None:
    needed = rng.sample(made.objects, rng.randrange(len(made.objects)))
    stat = Stat(0o644, 0, 0, number, 0, {})
    entries: dict[bytes, Directory | Leaf] = {
        b"%d" % place: Leaf(stat, External(id_, repository.object_size(id_)))
        for place, id_ in enumerate(needed)
    }
    root = Directory(Stat(0o755, 0, 0, number, 0, {}), entries)
    id_ = repository.write_image(build(root, rng.choice(list(Format)), made.algorithm))
    made.images[id_.hex()] = id_, set(needed)


def _add_stream(repository: Repository, made: RandomRepository, rng: random.Random, number: int) -> None:
    name = f"{rng.choice(['oci-layer', 'oci-config', 'other'])}-{number}"
    writer = repository.new_stream(_TYPE)
    writer.inline(b"%d" % number)
    table = set(rng.sample(made.objects, rng.randrange(len(made.objects) // 2)))
    for id_ in sorted(table):
        writer.external(id_, repository.object_size(id_))
    known = [id_ for id_, _, _ in made.streams.values()] + [id_ for id_, _ in made.images.values()]
    known += rng.sample(made.objects, 2)
    named = set(rng.sample(known, rng.randrange(min(len(known), 4))))
    for place, id_ in enumerate(sorted(named)):
        writer.named_ref(f"name-{place}", id_)
    made.streams[name] = repository.write_stream(name, writer), table, named


def _add_references(repository: Repository, made: RandomRepository, rng: random.Random) -> None:
    for name in made.streams:
        for number in range(rng.choice([0, 0, 1, 2])):
            ref = f"{rng.choice(['oci', 'deep/er', 'other'])}/{name}%2F{number}"
            repository.name_stream(name, ref)
            made.stream_refs[ref] = name
    for name in made.images:
        if rng.random() < 0.5:
            ref = f"{rng.choice(['', 'some/', 'some/more/'])}{name[:8]}"
            link = made.path / "images/refs" / ref
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink("../" * (ref.count("/") + 1) + name, link)
            made.image_refs[ref] = name


def content(path: Path) -> dict[str, object]:
    """Every file and link of the repository at ``path``, to compare before and after."""
    found: dict[str, object] = {}
    for directory, _, names in os.walk(path):
        for name in names:
            file = Path(directory, name)
            found[str(file.relative_to(path))] = (
                os.readlink(file) if file.is_symlink() else file.stat().st_size
            )
        for name in os.listdir(directory):
            file = Path(directory, name)
            if file.is_symlink():
                found[str(file.relative_to(path))] = os.readlink(file)
    return found
