"""One repository for two programs, in every form: hashes, formats and mixtures of them, references,
referrers, artifacts, images that share a configuration."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import PULL_TAG, Judge
from hostimage_testing.layout import MANIFEST_TYPE, Layout
from hostimage_testing.tools import run
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.errors import NotSupported
from hostimaged.ids import ManifestDigest
from hostimaged.oci import fsck, images
from hostimaged.oci.pull import PullResult, pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

V0, V1, V2 = Format
BASE = (
    tars.directory(b"usr", mtime=7)
    + tars.file(b"usr/tool", b"#!/bin/sh\n" * 2000, mode=0o755)
    + tars.file(b"usr/small", b"inline")
    + tars.END
)
MORE = tars.file(b"usr/more", b"more " * 5000) + tars.END
LAST = tars.file(b"usr/tool", b"the last word " * 100) + tars.END

both_algorithms = pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
SETS = [
    FormatSet(default, extra)
    for default in (V1, V2)
    for extra in ((), (V0,), (V1,), (V2,), (V0, V1, V2))
    if extra != (default,)
]
every_set = pytest.mark.parametrize("formats", SETS, ids=str)


class Shared:
    """A repository that both programs use."""

    def __init__(self, cfsctl: str, directory: Path) -> None:
        self.host: HostPaths = scratch_host(directory / "host")
        self.path = self.host.repository
        self.judge = Judge(cfsctl, self.path)

    def make(self, algorithm: Algorithm, formats: FormatSet) -> None:
        Repository.init(self.path, algorithm=algorithm, formats=formats, verity=Verity.OPPORTUNISTIC)[
            0
        ].close()

    def pull(self, layout: Layout, name: str) -> PullResult:
        reference = ImageReference.parse(f"oci:{layout.path}:{name}")
        return pull_image(
            self.host,
            reference,
            expect_digest=None,
            verity=Verity.OPPORTUNISTIC,
            lock_timeout=5,
            reporter=Silent(),
        )

    def cfsctl_pull(self, layout: Layout, name: str, version: int | None = None) -> str:
        return self.judge("oci", "pull", f"oci:{layout.path}:{name}", f"tag-of-{name}", version=version)

    def check(self, count: int) -> None:
        """Both find nothing wrong in ``count`` images, and every EROFS image an image names is there."""
        self.judge.check(images=count)
        with Repository.open(self.path) as repository:
            report = fsck.check(repository)
            assert report.ok, report.text()
            assert report.images_checked == count
            for row in images.list_images(repository):
                assert not row.problem
                for id_ in row.image_ids.values():
                    os.close(repository.open_image(id_.hex()))

    def ids(self, tag: str) -> dict[Format, str]:
        """EROFS images by the tag of an image."""
        with Repository.open(self.path) as repository:
            found = images.open_image(repository, images.tags(repository)[tag])
            return {kind: id_.hex() for kind, id_ in found.image_ids.items()}

    def names(self) -> dict[str, str]:
        """Every link, and what it says."""
        links = (path for path in self.path.rglob("*") if path.is_symlink())
        return {str(link.relative_to(self.path)): os.readlink(link) for link in links}

    def objects(self) -> set[str]:
        return {path.name for path in self.path.glob("objects/??/*")}


@pytest.fixture
def shared(cfsctl: str, tmp_path: Path) -> Shared:
    return Shared(cfsctl, tmp_path)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(BASE), layout.layer(MORE, "zstd"), layout.layer(LAST, "none")])
    return layout


def new_objects(out: str) -> int:
    """How many objects cfsctl says that it stored."""
    found = re.search(r"(\d+) new \+ \d+ already present", out)
    return int(found[1]) if found else 0


# --- filled by one, pulled by the other ---------------------------------------------------------------------


@both_algorithms
@every_set
def test_ours_then_theirs(shared: Shared, layout: Layout, algorithm: Algorithm, formats: FormatSet) -> None:
    shared.make(algorithm, formats)
    result = shared.pull(layout, "v1")
    wanted = {kind for kind in formats.in_order() if kind is not V0}
    assert set(result.image_ids) == wanted
    shared.check(1)
    for kind in wanted:
        assert shared.judge.image_id(result.tag, kind) == result.image_ids[kind].hex()
    names, objects = shared.names(), shared.objects()
    assert new_objects(shared.cfsctl_pull(layout, "v1")) == 0
    shared.check(2)
    added = {key: text for key, text in shared.names().items() if names.get(key) != text}
    # cfsctl stores the V0 image too, which no configuration can name: it is garbage.
    garbage = {key for key in added if key.startswith("images/")}
    assert len(garbage) == (V0 in formats.in_order())
    streams = {key for key in added if not key.startswith("images/")}
    # The order of layers in a manifest stream is arbitrary there.
    assert streams - {"streams/refs/oci/tag-of-v1"} <= {f"streams/oci-manifest-{result.manifest_digest}"}
    assert len(shared.objects() - objects) <= 1 + 2 * 1 + len(garbage)
    assert shared.ids("tag-of-v1") == shared.ids(result.tag)
    assert shared.pull(layout, "v1").layers_present == 3
    shared.judge("gc")
    shared.check(2)
    assert set(shared.names()) == set(names) | {"streams/refs/oci/tag-of-v1"}


@both_algorithms
@every_set
def test_theirs_then_ours(shared: Shared, layout: Layout, algorithm: Algorithm, formats: FormatSet) -> None:
    shared.make(algorithm, formats)
    assert new_objects(shared.cfsctl_pull(layout, "v1")) == 3
    shared.check(1)
    names, objects = shared.names(), shared.objects()
    result = shared.pull(layout, "v1")
    assert (result.layers_total, result.layers_present, result.bytes_fetched) == (3, 3, 0)
    assert shared.objects() == objects, "everything is present"
    assert shared.names() == names | {
        f"streams/refs/oci/{PULL_TAG.replace('/', '%2F')}{result.manifest_digest}": (
            f"../../oci-manifest-{result.manifest_digest}"
        )
    }
    shared.check(2)
    assert shared.ids("tag-of-v1") == {kind: id_.hex() for kind, id_ in result.image_ids.items()}
    assert not shared.pull(layout, "v1").changed


@both_algorithms
def test_made_by_cfsctl(shared: Shared, layout: Layout, algorithm: Algorithm) -> None:
    """Its own formats by its own command line, of which there is one for a repository."""
    for version in (1, 2):
        other = Shared(shared.judge.program, shared.host.physical_root.parent / f"of-{version}")
        run(shared.judge.program, "init", "--insecure", "--algorithm", algorithm.identifier,
            "--erofs-version", str(version), other.path)  # fmt: skip
        result = other.pull(layout, "v1")
        assert set(result.image_ids) == {Format(version)}
        other.check(1)
        assert new_objects(other.cfsctl_pull(layout, "v1")) == 0
        other.check(2)


def test_other_format_for_a_session(shared: Shared, layout: Layout) -> None:
    """``cfsctl --erofs-version`` makes one image and forgets the other; the next pull of ours has both."""
    shared.make(Algorithm.SHA512, FormatSet(V1))
    result = shared.pull(layout, "v1")
    shared.cfsctl_pull(layout, "v1", version=2)
    assert set(shared.ids(result.tag)) == {V2}
    again = shared.pull(layout, "v1")
    assert again.changed
    assert set(again.image_ids) == {V1, V2}
    assert again.image_ids[V1] == result.image_ids[V1]
    shared.judge("gc")
    shared.check(2)


# --- format V0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [FormatSet(V0), FormatSet(V0, (V2,))], ids=str)
def test_v0_has_no_place_for_images(shared: Shared, layout: Layout, formats: FormatSet) -> None:
    """We refuse before anything is fetched. cfsctl stores all of it, then fails and tags nothing."""
    shared.make(Algorithm.SHA512, formats)
    refused = pytest.raises(NotSupported, match=re.escape(f"is of format {formats}, which has no place for"))
    with refused:
        shared.pull(layout, "v1")
    assert not shared.names()
    assert not shared.objects()
    judge = shared.judge
    out = run(judge.program, "--repo", shared.path, "oci", "pull", f"oci:{layout.path}:v1", check=False)
    assert out.code != 0
    assert "did not produce the repository's default EROFS format" in out.err
    assert shared.names()
    assert not [name for name in shared.names() if "refs" in name]
    shared.check(0)
    with refused:
        shared.pull(layout, "v1")
    shared.judge("gc")
    assert not shared.names()
    assert not shared.objects()


@pytest.mark.parametrize("formats", [FormatSet(V0, (V1,)), FormatSet(V0, (V1, V2))], ids=str)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_v0_with_v1(shared: Shared, layout: Layout, formats: FormatSet, first: str) -> None:
    """The V1 image stands for the V0 one, in cfsctl too."""
    shared.make(Algorithm.SHA256, formats)
    if first == "theirs":
        shared.cfsctl_pull(layout, "v1")
    result = shared.pull(layout, "v1")
    assert set(result.image_ids) == set(formats.extra)
    if first == "ours":
        assert new_objects(shared.cfsctl_pull(layout, "v1")) == 0
    shared.check(2)
    assert shared.ids("tag-of-v1") == shared.ids(result.tag)
    inspected = json.loads(shared.judge("oci", "inspect", result.tag))
    assert result.image_ids[V1].hex() in json.dumps(inspected)
    shared.judge("gc")
    shared.check(2)


@both_algorithms
def test_v0_takes_artifacts(shared: Shared, layout: Layout, algorithm: Algorithm) -> None:
    shared.make(algorithm, FormatSet(V0))
    store_artifact(layout, "artifact")
    assert shared.pull(layout, "artifact").artifact
    shared.check(1)
    shared.cfsctl_pull(layout, "artifact")
    shared.check(2)


# --- artifacts, references, referrers -----------------------------------------------------------------------


def store_artifact(layout: Layout, name: str, **extra: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": "application/x-signature",
        "config": layout.blob(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [layout.blob(f"signature {name}".encode() * 20, "application/octet-stream")],
    }
    blob = layout.blob(json.dumps(document | extra).encode(), MANIFEST_TYPE)
    # Without a platform, cfsctl does not find it in a layout.
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return layout.add(blob | {"platform": {"architecture": machine, "os": "linux"}}, name)


@both_algorithms
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_artifacts(shared: Shared, layout: Layout, algorithm: Algorithm, first: str) -> None:
    shared.make(algorithm, FormatSet(V1))
    store_artifact(layout, "artifact")
    if first == "theirs":
        shared.cfsctl_pull(layout, "artifact")
    result = shared.pull(layout, "artifact")
    objects = shared.objects()
    assert (result.artifact, result.layers_present) == (True, int(first == "theirs"))
    shared.cfsctl_pull(layout, "artifact")
    assert shared.objects() == objects
    shared.check(2)
    shared.judge("gc")
    shared.check(2)


@both_algorithms
def test_referrers(shared: Shared, layout: Layout, algorithm: Algorithm) -> None:
    """An artifact stays while a referrer's link leads to it, without a tag and without its subject."""
    shared.make(algorithm, FormatSet(V1))
    result = shared.pull(layout, "v1")
    subject = str(result.manifest_digest)
    signature = store_artifact(layout, "signature", subject={
        "mediaType": MANIFEST_TYPE, "digest": subject, "size": 1,
    })["digest"]  # fmt: skip
    artifact = shared.pull(layout, "signature")
    assert str(artifact.manifest_digest) == signature
    with Repository.open(shared.path) as repository:
        repository.name_stream(f"oci-manifest-{signature}", f"oci-referrers/{subject}/{signature}")
    link = f"streams/refs/oci-referrers/{subject}/{signature}"
    assert shared.names()[link] == f"../../../oci-manifest-{signature}"
    inspected = json.loads(shared.judge("oci", "inspect", result.tag))
    assert inspected["referrers"] == [signature]
    shared.judge("oci", "untag", artifact.tag)
    shared.judge("gc")
    assert f"streams/oci-manifest-{signature}" in shared.names()
    shared.check(1)
    # Pulling the subject again, by either, leaves the link alone.
    shared.pull(layout, "v1")
    shared.cfsctl_pull(layout, "v1")
    assert link in shared.names()
    for tag in (result.tag, "tag-of-v1"):
        shared.judge("oci", "untag", tag)
    shared.judge("gc")
    shared.check(0)
    with Repository.open(shared.path) as repository:
        images.open_image(repository, ManifestDigest(signature))
        assert repository.has_stream(f"oci-manifest-{subject}") is None


@both_algorithms
def test_references_of_others(shared: Shared, layout: Layout, algorithm: Algorithm) -> None:
    """Tags and references that a pull knows nothing of stay as they are, and keep what they lead to."""
    shared.make(algorithm, FormatSet(V1, (V2,)))
    shared.cfsctl_pull(layout, "v1")
    with Repository.open(shared.path) as repository:
        digest = images.tags(repository)["tag-of-v1"]
        [first, *_] = images.open_image(repository, digest).layers
        repository.name_stream(f"oci-layer-{first}", "a/layer/of mine")
        [image, *_] = repository.images()
    shared.judge("oci", "tag", str(digest), "quay.example/100%25/os:latest")
    (shared.path / "images/refs/some").mkdir(parents=True)
    (shared.path / "images/refs/some/image").symlink_to(f"../../{image}")
    names = shared.names()
    result = shared.pull(layout, "v1")
    assert names.items() <= shared.names().items()
    with Repository.open(shared.path) as repository:
        assert set(images.tags(repository)) == {"tag-of-v1", "quay.example/100%25/os:latest", result.tag}
    for tag in ("tag-of-v1", "quay.example/100%25/os:latest", result.tag):
        shared.judge("oci", "untag", tag)
    shared.judge("gc")
    assert set(shared.names()) == {
        "streams/refs/a/layer/of mine",
        f"streams/oci-layer-{first}",
        "images/refs/some/image",
        f"images/{image}",
    }
    shared.check(0)
    again = shared.pull(layout, "v1")
    assert again.layers_present == 1
    shared.check(1)


# --- shared configurations ----------------------------------------------------------------------------------


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Layout, Layout]:
    """Two images with the same configuration and, compressed in another way, the same layers."""
    layouts = []
    for name, compression in (("gzip", "gzip"), ("zstd", "zstd")):
        layout = Layout(tmp_path / name)
        layout.image(name, [layout.layer(BASE, compression), layout.layer(MORE, compression)])
        layouts.append(layout)
    return layouts[0], layouts[1]


Pull = Callable[[Shared, Layout, str], str]


def ours(shared: Shared, layout: Layout, name: str) -> str:
    return shared.pull(layout, name).tag


def theirs(shared: Shared, layout: Layout, name: str) -> str:
    shared.cfsctl_pull(layout, name)
    return f"tag-of-{name}"


@both_algorithms
@pytest.mark.parametrize("formats", [FormatSet(V1), FormatSet(V2, (V1,))], ids=str)
@pytest.mark.parametrize("untagged", [0, 1])
@pytest.mark.parametrize(
    ("first", "second"),
    [(ours, ours), (ours, theirs), (theirs, ours)],
    ids=["ours-ours", "ours-theirs", "theirs-ours"],
)
def test_shared_configuration(
    shared: Shared,
    twins: tuple[Layout, Layout],
    algorithm: Algorithm,
    formats: FormatSet,
    first: Pull,
    second: Pull,
    untagged: int,
) -> None:
    shared.make(algorithm, formats)
    tags = [first(shared, twins[0], "gzip"), second(shared, twins[1], "zstd")]
    assert shared.ids(tags[0]) == shared.ids(tags[1])
    shared.check(2)
    ids = shared.ids(tags[1 - untagged])
    assert set(ids) == set(formats.in_order())
    shared.judge("oci", "untag", tags[untagged])
    shared.judge("gc")
    shared.check(1)
    assert shared.ids(tags[1 - untagged]) == ids
    for kind, id_ in ids.items():
        assert shared.judge.image_id(tags[1 - untagged], kind) == id_
    objects = shared.objects()
    shared.judge("gc")
    assert shared.objects() == objects


@pytest.mark.parametrize("untagged", [0, 1])
def test_shared_configuration_that_cfsctl_split(
    shared: Shared, twins: tuple[Layout, Layout], untagged: int
) -> None:
    """It rewrites the configuration for one image only. Any later pull of ours mends the other."""
    shared.make(Algorithm.SHA512, FormatSet(V1))
    tags = [ours(shared, twins[0], "gzip"), theirs(shared, twins[1], "zstd")]
    shared.cfsctl_pull(twins[1], "zstd", version=2)
    other = Layout(twins[0].path.parent / "other")
    other.image("other", [other.layer(BASE)])
    kept = shared.pull(other, "other")
    assert shared.ids(tags[0]) == shared.ids(tags[1])
    shared.judge("oci", "untag", tags[untagged])
    shared.judge("gc")
    shared.check(2)
    assert shared.ids(tags[1 - untagged])
    assert shared.ids(kept.tag) == {V1: kept.image_ids[V1].hex()}


# --- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["aba", "aab", "aabba", "ab"])
def test_a_layer_twice(shared: Shared, tmp_path: Path, order: str) -> None:
    """The later of two layers counts, also where it is the same as an earlier one."""
    layout = Layout(tmp_path / "layout")
    layers = {"a": layout.layer(BASE), "b": layout.layer(LAST, "none")}
    layout.image("v1", [layers[name] for name in order])
    shared.make(Algorithm.SHA512, FormatSet(V1, (V2,)))
    result = shared.pull(layout, "v1")
    shared.check(1)
    for kind in (V1, V2):
        assert shared.judge.image_id(result.tag, kind) == result.image_ids[kind].hex()
    shared.cfsctl_pull(layout, "v1")
    assert shared.ids("tag-of-v1") == {kind: id_.hex() for kind, id_ in result.image_ids.items()}
    shared.check(2)
