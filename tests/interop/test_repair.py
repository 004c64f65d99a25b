"""Repair: a repository damaged in many places, restored from where its images came from; judged by cfsctl."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing.host import scratch_host
from hostimage_testing.labelled_images import DIRECTORIES, kernel, layer
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import pull
from hostimage_testing.random_repositories import content
from hostimage_testing.registry import Registry
from hostimage_testing.tools import run
from hostimaged.composefs import fsck
from hostimaged.composefs.erofs import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.composefs.repository.gc import mark, sweep
from hostimaged.errors import Cancelled
from hostimaged.host import bootimage
from hostimaged.host.damage import verification_of
from hostimaged.host.repair import FAULT_POINTS, Repair, repair
from hostimaged.ids import ManifestDigest, ObjectId
from hostimaged.oci import fsck as oci_fsck
from hostimaged.oci import images, pulls
from hostimaged.oci.repair import FAULT_POINTS as IMAGE_POINTS
from hostimaged.progress import Reporter, Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]


#: Files of the larger image.
FILES = 50_000 if os.environ.get("HOSTIMAGE_SOAK") == "1" else 3000


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WAYS: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "gone": Path.unlink}


@dataclass
class Pulled:
    """A host with two images, pulled from a registry, that share a layer; one was made bootable."""

    paths: HostPaths
    layout: Layout
    digests: tuple[ManifestDigest, ManifestDigest]
    boot: str

    def copy(self, root: Path) -> Pulled:
        shutil.copytree(self.paths.physical_root.parent, root, symlinks=True)
        return Pulled(HostPaths.scratch(root), self.layout, self.digests, self.boot)

    @property
    def objects(self) -> list[Path]:
        return sorted(self.paths.repository.glob("objects/??/*"))

    def object(self, name: str) -> Path:
        """The object that a stream, or with ``images/`` an image, is in."""
        category = "" if name.startswith("images/") else "streams/"
        return (self.paths.repository / category / name).resolve()

    def repair(self, reporter: Reporter | None = None, *, dry_run: bool = False) -> Repair:
        with Repository.open(self.paths.repository, lock_timeout=0) as repository:
            return repair(self.paths, repository, reporter or Silent(), dry_run=dry_run)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, registry: Registry, skopeo: str) -> Pulled:
    base = tmp_path_factory.mktemp("repair")
    paths = scratch_host(base / "host", registries=registry.registries_conf)
    layout = Layout(base / "layout")
    rng = random.Random(7)
    files = {f"usr/share/data/{number}": rng.randbytes(rng.randrange(65, 3000)) for number in range(FILES)}
    first = layer({**kernel(), "usr/lib/os-release": b"ID=test\nVERSION_ID=7\n"}, DIRECTORIES)
    shared = layout.layer(first)
    many = layout.layer(layer(files, ["usr/share", "usr/share/data"]), "zstd")
    other = layout.layer(layer({"usr/share/other": b"other" * 100}, ["usr/share"]))
    digests = []
    for tag, layers in (("one", [shared, many]), ("two", [shared, other])):
        layout.image(tag, layers, labels={"org.opencontainers.image.version": tag})
        target = f"docker://{registry.host}/repair/{tag}:stable"
        run(skopeo, "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false",
            f"oci:{layout.path}:{tag}", target)  # fmt: skip
        digests.append(pull(paths, target).manifest_digest)
    with Repository.open(paths.repository) as repository:
        boot = bootimage.generate(repository, digests[0], Silent()).object_id.hex()
    collect(paths)
    return Pulled(paths, layout, (digests[0], digests[1]), boot)


@pytest.fixture
def pulled(original: Pulled, tmp_path: Path) -> Pulled:
    return original.copy(tmp_path / "host")


def collect(paths: HostPaths) -> None:
    with Repository.open(paths.repository, exclusive=True) as repository:
        sweep(repository, mark(repository, reporter=Silent()), dry_run=False, reporter=Silent())


def check_clean(cfsctl: str, pulled: Pulled) -> None:
    with Repository.open(pulled.paths.repository) as repository:
        assert oci_fsck.check(repository).ok
    assert "status: ok" in run(cfsctl, "--repo", pulled.paths.repository, "--insecure", "fsck").out
    run(cfsctl, "--repo", pulled.paths.repository, "--insecure", "oci", "fsck")
    for tag in images_of(pulled):
        run(cfsctl, "--repo", pulled.paths.repository, "--insecure", "oci", "inspect", tag)


def images_of(pulled: Pulled) -> list[str]:
    with Repository.open(pulled.paths.repository) as repository:
        return list(images.tags(repository))


def test_one_in_a_thousand_and_all_kinds(cfsctl: str, pulled: Pulled, original: Pulled) -> None:
    before = content(pulled.paths.repository)
    rng = random.Random(11)
    files = [path for path in pulled.objects if path.stat().st_size < 3000]
    # Content of files, and one of each kind of what holds an image together.
    chosen = [*rng.sample(files, max(9, FILES // 1000)), pulled.object(f"images/{pulled.boot}")]
    streams = [path.name for path in (pulled.paths.repository / "streams").iterdir() if path.is_symlink()]
    kinds = ("oci-layer-", "oci-config-")
    chosen += [pulled.object(min(name for name in streams if name.startswith(kind))) for kind in kinds]
    chosen.append(pulled.object(images.manifest_stream(pulled.digests[1])))
    expected = {}
    for number, path in enumerate(dict.fromkeys(chosen)):
        way = list(WAYS)[number % 3]
        WAYS[way](path)
        expected[f"objects/{path.parent.name}/{path.name}"] = way
    with Repository.open(pulled.paths.repository) as repository:
        found = verification_of(pulled.paths, repository, oci_fsck.check(repository), Silent())
        named = {row.path for row in found.rows if row.kind == "object-digest-mismatch"}
        assert named == {path for path, way in expected.items() if way != "gone"}
        gone = {path.partition("/")[2].replace("/", "") for path, way in expected.items() if way == "gone"}
        missing = {id_ for row in found.rows for id_ in gone if row.detail.endswith(id_)}
        missing |= {
            repository.has_stream(row.path.removeprefix("streams/")).hex()  # type: ignore[union-attr]
            for row in found.rows
            if row.kind == "broken-symlink" and row.path.startswith("streams/oci-")
        }
        missing |= {row.path.removeprefix("images/") for row in found.rows if row.kind == "broken-symlink"}
        assert gone <= missing
    done = pulled.repair()
    assert done.ok, done.lines()
    assert not done.left, done.left
    assert done.restored >= len(expected)
    check_clean(cfsctl, pulled)
    assert content(pulled.paths.repository).keys() >= before.keys()
    assert pulled.repair().lines() == ["nothing is damaged"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "what", ["manifest", "config", "layer", "image", "boot", "raw manifest", "raw config", "file"]
)
def test_each_kind_of_object(cfsctl: str, pulled: Pulled, way: str, what: str) -> None:
    before = content(pulled.paths.repository)
    with Repository.open(pulled.paths.repository) as repository:
        image = images.open_image(repository, pulled.digests[0])
        with repository.open_stream(images.manifest_stream(pulled.digests[0])) as stream:
            raw_manifest = stream.object_refs[0]
        with repository.open_stream(images.config_stream(image.config_digest)) as stream:
            raw_config = stream.object_refs[0]
        layer_id = next(iter(image.layers.values()))
        with repository.open_stream("", layer_id) as stream:
            file = stream.object_refs[0]
        ids = {
            "manifest": image.stored_manifest.stream_id,
            "config": image.stored_config.stream_id,
            "layer": layer_id,
            "image": next(iter(image.image_ids.values())),
            "boot": ObjectId(bytes.fromhex(pulled.boot)),
            "raw manifest": raw_manifest,
            "raw config": raw_config,
            "file": file,
        }
    WAYS[way](pulled.paths.repository / "objects" / ids[what].pathname)
    planned = pulled.repair(dry_run=True)
    assert planned.ok
    assert len(planned.found.objects) >= 1
    done = pulled.repair()
    assert done.ok, done.lines()
    assert not done.left
    check_clean(cfsctl, pulled)
    collect(pulled.paths)
    assert content(pulled.paths.repository) == before


def test_without_network_what_is_made_of_layers_is_repaired(pulled: Pulled, cfsctl: str) -> None:
    pulled.paths.pulls.unlink()
    for name in (pulled.paths.repository / "images").iterdir():
        if name.is_symlink():
            flip(name.resolve())
    done = pulled.repair()
    assert done.ok, done.lines()
    assert done.size == 0
    check_clean(cfsctl, pulled)


def test_what_cannot_be_repaired_is_named(pulled: Pulled) -> None:
    rows = pulls.load(pulled.paths.pulls)
    pulled.paths.pulls.unlink()
    pulls.record(pulled.paths.pulls, rows[1])
    with Repository.open(pulled.paths.repository) as repository:
        many = images.open_image(repository, pulled.digests[0]).layers
        with repository.open_stream("", list(many.values())[1]) as stream:
            lost = stream.object_refs[5]
    flip(pulled.paths.repository / "objects" / lost.pathname)
    damaged = content(pulled.paths.repository)
    for dry_run in (True, False):
        done = pulled.repair(dry_run=dry_run)
        assert not done.ok
        [left] = done.left
        assert left.what == f"object {lost.hex()}"
        assert left.breaks.images == (images.pull_tag(pulled.digests[0]),)
        assert "nobody knows where the image came from" in left.text
    assert content(pulled.paths.repository) == damaged, "the damaged file stays"
    pulls.record(pulled.paths.pulls, rows[0])
    assert pulled.repair().ok


def test_garbage_is_left_to_the_collector(pulled: Pulled, cfsctl: str) -> None:
    with Repository.open(pulled.paths.repository) as repository:
        id_ = repository.store_object(b"garbage" * 100).id
    flip(pulled.paths.repository / "objects" / id_.pathname)
    done = pulled.repair()
    assert done.ok
    assert [left.what for left in done.left] == [f"object {id_.hex()}"]
    assert done.left[0].breaks.nothing
    collect(pulled.paths)
    check_clean(cfsctl, pulled)


class StopsAt(Silent):
    """Stops at the ``number``-th point that is not one of a loop over bulk data."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.passed: Counter[str] = Counter()

    def at(self, point: str) -> None:
        if point.startswith("layer.") and point not in ("layer.verified", "layer.stored"):
            return
        if point in ("repair.check", "why.mark", "proxy.wait"):
            return
        self.passed[point] += 1
        if not self.left:
            raise Cancelled
        self.left -= 1


def test_stopped_at_any_point_nothing_is_worse(original: Pulled, cfsctl: str, tmp_path: Path) -> None:
    passed: Counter[str] = Counter()
    for number in range(100):
        pulled = original.copy(tmp_path / str(number))
        with Repository.open(pulled.paths.repository) as repository:
            image = images.open_image(repository, pulled.digests[0])
        for id_ in (
            image.stored_config.stream_id,
            next(iter(image.layers.values())),
            ObjectId(bytes.fromhex(pulled.boot)),
            next(iter(image.image_ids.values())),
        ):
            flip(pulled.paths.repository / "objects" / id_.pathname)
        damaged = corrupted(pulled)
        reporter = StopsAt(number)
        try:
            pulled.repair(reporter)
        except Cancelled:
            stopped = True
        else:
            stopped = False
        passed |= reporter.passed
        assert corrupted(pulled) <= damaged
        assert pulled.repair().ok
        collect(pulled.paths)
        check_clean(cfsctl, pulled)
        shutil.rmtree(pulled.paths.physical_root.parent)
        if not stopped:
            break
    else:
        pytest.fail("it never came to its end")
    mine = {*FAULT_POINTS, *IMAGE_POINTS} - {"repair.check", "repair.protected"}
    assert passed.keys() >= mine | {"config.stored", "manifest.stored", "boot.stored", "layer.stored"}


def corrupted(pulled: Pulled) -> set[str]:
    with Repository.open(pulled.paths.repository) as repository:
        return {finding.path for finding in fsck.check(repository).errors}


def test_images_of_another_format_are_made_again_in_it(tmp_path: Path, cfsctl: str) -> None:
    paths = scratch_host(tmp_path / "host")
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(layer({"usr/file": b"file" * 100}, ["usr"]))])
    Repository.init(paths.repository, algorithm=Algorithm.SHA512, verity=Verity.OPPORTUNISTIC)[0].close()
    digest = pull(paths, f"oci:{layout.path}:v1").manifest_digest
    run(cfsctl, "--repo", paths.repository, "--insecure", "--erofs-version", "2", "oci", "pull",
        f"oci:{layout.path}:v1", "theirs")  # fmt: skip
    with Repository.open(paths.repository) as repository:
        assert repository.formats == FormatSet(repository.formats.default)
        before = images.open_image(repository, digest).image_ids
        assert before.keys() == {Format.V2}, "an image of the format that is not the repository's own"
    for id_ in before.values():
        flip(paths.repository / "objects" / id_.pathname)
    with Repository.open(paths.repository) as repository:
        assert repair(paths, repository, Silent()).ok
    with Repository.open(paths.repository) as repository:
        assert images.open_image(repository, digest).image_ids.items() >= before.items()
        assert fsck.check(repository).ok
