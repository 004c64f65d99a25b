"""Where a repair gets its bytes: from this machine first, and no more from a registry than is needed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostimage_testing import stores, tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.labelled_images import layer
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import pull
from hostimage_testing.registry import Registry
from hostimage_testing.tools import run
from hostimaged.composefs.repository import Repository
from hostimaged.host.repair import Repair, repair
from hostimaged.ids import ManifestDigest, ObjectId, SourceDigest
from hostimaged.oci import fsck, images, pulls
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

MIB = 1 << 20


class Fetched(Silent):
    """Counts the bytes that come from sources."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self, count: int) -> None:
        """See ``Reporter``."""
        self.count += count


@dataclass
class Scene:
    """An image of one layer whose contents are known, in a repository and in a layout."""

    paths: HostPaths
    layout: Layout
    digest: ManifestDigest
    judge: Judge
    contents: list[bytes]
    fetched: Fetched = field(default_factory=Fetched)

    def objects(self) -> list[ObjectId]:
        """The contents of the layer as objects, in its order."""
        with Repository.open(self.paths.repository) as repository:
            stream_id = next(iter(images.open_image(repository, self.digest).layers.values()))
            with repository.open_stream("", stream_id) as stream:
                return [chunk for chunk in stream.chunks() if isinstance(chunk, ObjectId)]

    def path(self, id_: ObjectId) -> Path:
        return self.paths.repository / "objects" / id_.pathname

    def damage(self, ids: Iterable[ObjectId]) -> None:
        """Flip, cut or remove objects, in turn."""
        for number, id_ in enumerate(ids):
            path = self.path(id_)
            path.chmod(0o644)
            match number % 3:
                case 0:
                    data = bytearray(path.read_bytes())
                    data[len(data) // 2] ^= 1
                    path.write_bytes(data)
                case 1:
                    path.write_bytes(path.read_bytes()[:-1])
                case _:
                    path.unlink()

    def came_from(self, *references: str) -> None:
        """Say that the image came from there, the last being the newest."""
        self.paths.pulls.unlink(missing_ok=True)
        for reference in references:
            source = SourceDigest(str(self.digest))
            pulls.record(self.paths.pulls, pulls.PullRow(reference, self.digest, source, int(time.time())))

    def repair(self) -> Repair:
        with Repository.open(self.paths.repository, lock_timeout=0) as repository:
            return repair(self.paths, repository, self.fetched)

    def check_restored(self, ids: Iterable[ObjectId]) -> None:
        """All is as it was; cfsctl agrees."""
        known = dict(zip(self.objects(), self.contents, strict=True))
        for id_ in ids:
            assert self.path(id_).read_bytes() == known[id_]
        with Repository.open(self.paths.repository) as repository:
            assert fsck.check(repository).ok
        self.judge.check()


#: Sizes of contents: just external, of a block and around it, in one buffer and in several, the same twice.
SIZES = (65, 4095, 4096, 4097, 300_000, MIB, MIB + 1, 3 * MIB + 5, 5000, 5000)


#: Those of stores, whose checksums are made bit by bit.
SMALL_SIZES = SIZES[:5]


def contents(sizes: tuple[int, ...] = SIZES) -> list[bytes]:
    rng = random.Random(5)
    made: dict[tuple[int, int], bytes] = {}
    return [
        made.setdefault((size, 0 if size == 5000 else n), rng.randbytes(size)) for n, size in enumerate(sizes)
    ]


def tar_of(datas: Iterable[bytes], noise: int = 0) -> bytes:
    """Contents in their order, with small files between, and noise behind them."""
    parts = [tars.directory(b"usr")]
    for number, data in enumerate(datas):
        parts += [tars.file(b"usr/%d" % number, data), tars.file(b"usr/small%d" % number, b"small" * 12)]
    rng = random.Random(6)
    parts += [tars.file(b"usr/noise%d" % number, rng.randbytes(MIB)) for number in range(noise)]
    return b"".join([*parts, tars.END])


def noise_contents(noise: int) -> list[bytes]:
    rng = random.Random(6)
    return [rng.randbytes(MIB) for _ in range(noise)]


@pytest.fixture(params=["none", "gzip", "zstd"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> Scene:
    return make_scene(tmp_path, cfsctl, request.param)


def make_scene(
    tmp_path: Path,
    cfsctl: str,
    compression: str,
    *,
    sizes: tuple[int, ...] = SIZES,
    noise: int = 0,
    registries: str = "",
) -> Scene:
    paths = scratch_host(tmp_path / "host", registries=registries)
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(tar_of(contents(sizes), noise), compression)])
    digest = pull(paths, f"oci:{layout.path}:v1").manifest_digest
    known = [*contents(sizes), *noise_contents(noise)]
    return Scene(paths, layout, digest, Judge(cfsctl, paths.repository), known)


def test_single_contents_out_of_a_layout(scene: Scene) -> None:
    """Each content alone, and all together."""
    ids = list(dict.fromkeys(scene.objects()))
    for chosen in (*([id_] for id_ in ids), ids):
        scene.damage(chosen)
        done = scene.repair()
        assert done.ok, done.lines()
        assert done.size == 0, "nothing was fetched"
        assert done.images[0].local == [f"oci:{scene.layout.path}"]
        scene.check_restored(chosen)


def test_the_layout_of_another_image_serves(scene: Scene) -> None:
    """Its blobs are the same, whatever the tag means by now; the image's own source is gone."""
    ids = scene.objects()[:4]
    scene.damage(ids)
    other = scene.layout.layer(layer({"usr/other": b"other" * 100}, ["usr"]))
    scene.layout.image("v1", [other])
    scene.came_from("docker://127.0.0.1:1/gone:1", f"oci:{scene.layout.path}:v1")
    done = scene.repair()
    assert done.ok, done.lines()
    scene.check_restored(ids)


def test_manifest_and_configuration_out_of_a_layout(scene: Scene) -> None:
    with Repository.open(scene.paths.repository) as repository:
        image = images.open_image(repository, scene.digest)
        ids = [image.stored_manifest.stream_id, image.stored_config.stream_id]
        for name in (
            images.manifest_stream(scene.digest),
            images.config_stream(image.config_digest),
        ):
            with repository.open_stream(name) as stream:
                ids += stream.object_refs
    scene.layout.image("v1", [scene.layout.layer(layer({"usr/other": b"other" * 100}, ["usr"]))])
    scene.damage(ids)
    done = scene.repair()
    assert done.ok, done.lines()
    assert done.size == 0
    scene.check_restored([])


def test_a_layout_that_is_damaged_too_is_passed_over(
    tmp_path: Path, cfsctl: str, registry: Registry, skopeo: str
) -> None:
    scene = make_scene(tmp_path, cfsctl, "none", registries=registry.registries_conf)
    target = push(scene, registry, skopeo, "damaged")
    ids = scene.objects()
    known = dict(zip(ids, scene.contents, strict=True))
    for lost in (ids[2], ids[7]):
        [blob] = [
            path
            for path in (scene.layout.path / "blobs/sha256").iterdir()
            if known[lost][:100] in path.read_bytes()
        ]
        good = blob.read_bytes()
        at = good.index(known[lost][:100])
        blob.write_bytes(good[: at + 10] + bytes([good[at + 10] ^ 1]) + good[at + 11 :])
        scene.damage([lost])
        scene.came_from(f"oci:{scene.layout.path}:v1", target)
        done = scene.repair()
        assert done.ok, done.lines()
        assert done.images[0].source.startswith("docker://")
        assert done.images[0].local == []
        scene.check_restored([lost])
        blob.write_bytes(good)


def push(scene: Scene, registry: Registry, skopeo: str, name: str) -> str:
    target = f"docker://{registry.host}/repair-sources/{name}:v1"
    run(skopeo, "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false",
        f"oci:{scene.layout.path}:v1", target)  # fmt: skip
    return target


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_of_a_registry_no_more_is_fetched_than_up_to_what_is_missing(
    tmp_path: Path, cfsctl: str, registry: Registry, skopeo: str, compression: str
) -> None:
    scene = make_scene(tmp_path, cfsctl, compression, noise=48, registries=registry.registries_conf)
    scene.came_from(push(scene, registry, skopeo, compression))
    first = scene.objects()[1]
    scene.damage([first])
    planned = plan(scene)
    assert planned.ok
    assert planned.size > 48 * MIB, "no more than the whole is promised beforehand"
    done = scene.repair()
    assert done.ok, done.lines()
    assert done.restored == 1
    assert 0 < done.size <= 4 * MIB
    assert scene.fetched.count == done.size
    scene.check_restored([first])
    last = scene.objects()[-1]
    scene.damage([last])
    done = scene.repair()
    assert done.ok, done.lines()
    assert done.size > 40 * MIB
    scene.check_restored([last])


def plan(scene: Scene) -> Repair:
    with Repository.open(scene.paths.repository, lock_timeout=0) as repository:
        return repair(scene.paths, repository, Silent(), dry_run=True)


def test_out_of_containers_storage(tmp_path: Path, cfsctl: str) -> None:
    """From the host's own store, which nobody named; its files are read one by one."""
    scene = make_scene(tmp_path, cfsctl, "gzip", sizes=SMALL_SIZES)
    store = stores.Store(scene.paths.containers.storage)
    store.layer(tar_of(contents(SMALL_SIZES)))
    scene.came_from("docker://127.0.0.1:1/gone:1")
    ids = list(dict.fromkeys(scene.objects()))
    for chosen in ([ids[0]], [ids[4]], ids):
        scene.damage(chosen)
        done = scene.repair()
        assert done.ok, done.lines()
        assert done.images[0].local == [f"containers-storage at {store.root}"]
        assert scene.fetched.count == 0
        scene.check_restored(chosen)


def test_a_whole_layer_out_of_containers_storage(tmp_path: Path, cfsctl: str) -> None:
    """Its stream is damaged, so nothing tells which contents it had."""
    scene = make_scene(tmp_path, cfsctl, "gzip", sizes=SMALL_SIZES)
    stores.Store(scene.paths.containers.storage).layer(tar_of(contents(SMALL_SIZES)))
    scene.came_from("docker://127.0.0.1:1/gone:1")
    with Repository.open(scene.paths.repository) as repository:
        stream_id = next(iter(images.open_image(repository, scene.digest).layers.values()))
    lost = scene.objects()[3]
    scene.damage([stream_id, lost])
    done = scene.repair()
    assert done.ok, done.lines()
    scene.check_restored([lost])
