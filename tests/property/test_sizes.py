"""What deleting a deployment would free is what a naive look at the references says."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimaged.boot.loader import Bootloader
from hostimaged.composefs import erofs
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType, Writer
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.host import sizes
from hostimaged.host.bootdirs import BootDirs
from hostimaged.host.entries import BootSets
from hostimaged.host.model import Deployment, HostState, ImageFacts, Role
from hostimaged.ids import ConfigDigest, DeploymentId, DiffId, ManifestDigest, ObjectId
from hostimaged.oci.images import config_stream, encode_tag, layer_stream, manifest_stream
from hostimaged.progress import Silent
from hostimaged.system import durable
from hostimaged.system.paths import HostPaths

OWN = ("localhost/bootc-", "localhost/hostimaged-pin-", "localhost/hostimaged-pull-")
FOREIGN = "example.com/"
FILES, LAYERS, IMAGES = 8, 4, 4


@dataclass(frozen=True)
class Image:
    """Layers by number, tags, and whether the manifest is lost; ``config``: that of which image."""

    layers: tuple[int, ...]
    tags: tuple[str, ...]
    config: int
    lost: bool
    deployed: bool
    image_ref: str


images = st.builds(
    Image,
    st.lists(st.integers(0, LAYERS - 1), max_size=3, unique=True).map(tuple),
    st.lists(st.sampled_from([*OWN, FOREIGN]), max_size=3, unique=True).map(tuple),
    st.integers(0, IMAGES - 1),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "", "foreign", "hostimaged"]),
)
layers = st.lists(st.frozensets(st.integers(0, FILES - 1)), min_size=LAYERS, max_size=LAYERS)


@dataclass
class Model:
    """The references as they were made: what each object leads to, and the roots by whose they are."""

    leads: dict[ObjectId, set[ObjectId]] = field(default_factory=dict)
    everybody: set[ObjectId] = field(default_factory=set)
    own: dict[DeploymentId, set[ObjectId]] = field(default_factory=dict)

    def reached(self, roots: Iterable[ObjectId]) -> set[ObjectId]:
        found: set[ObjectId] = set()
        pending = list(roots)
        while pending:
            id_ = pending.pop()
            if id_ not in found:
                found.add(id_)
                pending += self.leads.get(id_, ())
        return found

    def freed(self, id_: DeploymentId) -> set[ObjectId]:
        others = self.everybody.union(*(roots for other, roots in self.own.items() if other != id_))
        return self.reached(others | self.own[id_]) - self.reached(others)


class Made:
    """A repository made of a description."""

    def __init__(self, root: Path, content: list[frozenset[int]], described: list[Image]) -> None:
        self.paths = HostPaths.scratch(root)
        self.paths.deployments.mkdir(parents=True)
        self.model = Model()
        self.repository, _ = Repository.init(self.paths.repository, verity=Verity.OPPORTUNISTIC)
        rng = random.Random(1)
        self._files = [self.repository.store_object(rng.randbytes(5000 * (n + 1))).id for n in range(FILES)]
        self._layers = [
            self._stream(layer_stream(DiffId.of_hash(f"{n:064x}")), [self._files[f] for f in files])
            for n, files in enumerate(content)
        ]
        self._content = content
        self._whole: dict[ObjectId, set[ObjectId]] = {}
        self.rows = [row for n, image in enumerate(described) if (row := self._image(n, image, described))]

    def _stream(
        self, name: str, objects: list[ObjectId], named: dict[str, ObjectId] | None = None
    ) -> ObjectId:
        with Writer(Algorithm.SHA512, ContentType.LAYER) as writer:
            writer.inline(name.encode())
            for id_ in objects:
                writer.external(id_, 1)
            for ref, id_ in (named or {}).items():
                writer.named_ref(ref, id_)
            made = self.repository.write_stream(name, writer)
        self.model.leads[made] = {*objects, *(named or {}).values()}
        return made

    def _boot_image(self, number: int, image: Image) -> ObjectId:
        files = sorted(set().union(*(self._content[layer] for layer in image.layers)) if image.layers else [])
        stat = Stat(0o755, 0, 0, number, 0, {})
        leaves: dict[bytes, Directory | Leaf] = {
            b"%d" % f: Leaf(Stat(0o644, 0, 0, 0, 0, {}), External(self._files[f], 5000 * (f + 1)))
            for f in files
        }
        made = self.repository.write_image(erofs.build(Directory(stat, leaves), Format.V1, Algorithm.SHA512))
        self._whole[made] = {made, *(self._files[f] for f in files)}
        return made

    def _image(self, number: int, image: Image, described: list[Image]) -> Deployment | None:
        boot = self._boot_image(number, image)
        digest = ManifestDigest.of_hash(f"{number:064x}")
        owner = min(image.config, len(described) - 1)
        config = self._stream(
            config_stream(ConfigDigest.of_hash(f"{owner:064x}")),
            [],
            # The last one is no stream: an image that the configuration names.
            {f"layer{n}": self._layers[n] for n in described[owner].layers}
            | {"composefs.image": self._files[owner]},
        )
        name = manifest_stream(digest)
        stream = None if image.lost else self._stream(name, [], {"config:x": config})
        id_ = DeploymentId.of_object(boot)
        mine = self.model.own.setdefault(id_, set()) if image.deployed else self.model.everybody
        if image.deployed:
            mine |= {boot} if stream is not None else self._whole[boot]
            if stream is not None:
                mine.add(stream)
        for prefix in image.tags:
            link = self.paths.repository / "streams/refs/oci" / encode_tag(f"{prefix}{digest}")
            link.parent.mkdir(parents=True, exist_ok=True)
            # Dangling where the manifest is lost.
            link.symlink_to(f"../../{name}")
            if stream is not None:
                (self.model.everybody if prefix == FOREIGN else mine).add(stream)
        if image.image_ref:
            ref = self.paths.repository / "images/refs" / image.image_ref / id_.value
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.symlink_to(f"../../{id_.value}")
            if image.image_ref == "foreign" or not image.deployed:
                self.model.everybody |= self._whole[boot]
        if not image.deployed:
            return None
        return Deployment(id_, Role.OTHER, image=ImageFacts(digest, None))

    @property
    def state(self) -> HostState:
        dirs = BootDirs(Bootloader.SYSTEMD, None, None, "", None)
        return HostState(tuple(self.rows), Bootloader.SYSTEMD, dirs, BootSets(None, None))

    def blocks(self, ids: set[ObjectId]) -> int:
        return sum(os.stat(self.paths.repository / "objects" / id_.pathname).st_blocks * 512 for id_ in ids)


@settings(max_examples=60)
@given(layers, st.lists(images, min_size=1, max_size=IMAGES))
def test_sizes_are_those_of_a_naive_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: list[frozenset[int]], described: list[Image]
) -> None:
    # Nothing here is to survive a crash.
    monkeypatch.setattr(durable, "sync_filesystem", lambda _fd: None)
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        made = Made(Path(directory) / "root", content, described)
        with made.repository as repository:
            used, found = sizes._exclusive(made.paths, repository, made.state, Silent())
            assert used == repository.used_bytes()
            expected = {row.id: made.blocks(made.model.freed(row.id)) for row in made.rows}
            assert found == expected
            before = sizes.contents_of(repository, made.state)
            assert before == sizes.contents_of(repository, made.state)
            # What anybody adds or removes makes it another.
            stream = next(iter(repository.streams()))
            repository.name_stream(stream, "somebody/else")
            assert sizes.contents_of(repository, made.state) != before
