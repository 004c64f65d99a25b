"""Pulling real images by real ways, judged by composefs-rs's own tool."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from hostimage_testing.host import scratch_host
from hostimage_testing.judge import PULL_TAG, Judge
from hostimage_testing.layout import INDEX_TYPE, LAYER_TYPE, Layer, Layout
from hostimage_testing.pulling import opened, pull, with_formats
from hostimage_testing.registry import Registry
from hostimage_testing.samples import BASE, copy, flip, more, three_layers
from hostimage_testing.tools import run
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import (
    Cancelled,
    DigestMismatch,
    ImageNotFound,
    LockTimeout,
    NoSpace,
    NotSupported,
    PreconditionFailed,
    SignatureRejected,
    UnsupportedImage,
)
from hostimaged.ids import ManifestDigest, ObjectId
from hostimaged.oci import images, pulls
from hostimaged.oci.pull import FAULT_POINTS, PullResult
from hostimaged.oci.scan import scan
from hostimaged.progress import Phase, Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop
BOTH = FormatSet(Format.V1, (Format.V2,))


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """Every name below ``directory`` with inode and time of change: what was not touched is equal."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            found[os.path.relpath(os.path.join(parent, name), directory)] = (
                status.st_ino,
                status.st_ctime_ns,
            )
    return found


class Recorder(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.points: list[str] = []
        self.phases: list[Phase] = []
        self.total = self.cached = self.advanced = -1
        self.images: list[tuple[int, int]] = []

    def at(self, point: str) -> None:
        self.points.append(point)

    def phase(self, phase: Phase) -> None:
        self.phases.append(phase)

    def totals(self, total: int, cached: int) -> None:
        assert self.total == -1, "totals come once"
        assert self.advanced == -1, "and before any byte"
        self.total, self.cached, self.advanced = total, cached, 0

    def advance(self, count: int) -> None:
        assert self.advanced >= 0
        self.advanced += count

    def generating(self, done: int, total: int) -> None:
        self.images.append((done, total))


# --- the good way -----------------------------------------------------------------------------------------


def test_pull_and_pull_again(host: HostPaths, judge: Judge, layout: Layout) -> None:
    descriptor = three_layers(layout)
    with_formats(host, BOTH)
    recorder = Recorder()
    result = pull(host, f"oci:{layout.path}:v1", reporter=recorder)
    assert str(result.manifest_digest) == str(result.source_digest) == descriptor["digest"]
    assert (result.changed, result.version, result.artifact) == (True, "1.2", False)
    assert (result.layers_total, result.layers_present) == (3, 0)
    manifest = json.loads(layout.blob_path(descriptor["digest"]).read_bytes())
    size = sum(blob["size"] for blob in [manifest["config"], *manifest["layers"]])
    assert (recorder.total, recorder.cached, recorder.advanced) == (size, 0, size)
    assert (result.bytes_total, result.bytes_fetched) == (size, size)
    assert recorder.phases == [Phase.RESOLVING, Phase.PULLING, Phase.IMPORTING]
    assert recorder.images[-1] == (2, 2)
    judge.check(images=1)
    assert result.tag == f"{PULL_TAG}{descriptor['digest']}"
    assert result.tag in judge("oci", "images")
    for kind in (Format.V1, Format.V2):
        assert judge.image_id(result.tag, kind) == result.image_ids[kind].hex()
    before = files(host.physical_root)
    recorder = Recorder()
    again = pull(host, f"oci:{layout.path}:v1", reporter=recorder)
    assert (again.changed, again.layers_present, again.bytes_fetched) == (False, 3, 0)
    assert again.image_ids == result.image_ids
    assert (recorder.total, recorder.cached, recorder.advanced) == (size, size, 0)
    assert files(host.physical_root) == before, "pulling again changes nothing"


def test_as_dict_is_for_the_bus(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    result = pull(host, f"oci:{layout.path}:v1")
    found = result.as_dict()
    assert found["image-ids"] == [result.image_ids[Format.V1].hex()]
    assert found["tag"] == result.tag
    for value in found.values():
        assert isinstance(value, str | bool | int) or all(isinstance(item, str) for item in value)


def test_row_and_scan(host: HostPaths, layout: Layout) -> None:
    descriptor = three_layers(layout)
    assert scan(host) == {"repository": None, "images": [], "problems": []}
    reference = f"oci:{layout.path}:v1"
    result = pull(host, reference)
    [row] = pulls.load(host.pulls)
    assert (row.reference, str(row.manifest_digest)) == (reference, descriptor["digest"])
    found = scan(host)
    assert found["problems"] == []
    assert found["repository"]["algorithm"] == "sha512"
    assert found["repository"]["formats"] == ["v1"]
    assert found["repository"]["used"] > 0
    [image] = found["images"]
    assert image == {
        "tag": result.tag,
        "manifest-digest": descriptor["digest"],
        "config-digest": str(result.config_digest),
        "reference": reference,
        "source-digest": descriptor["digest"],
        "pulled": row.time,
        "version": "1.2",
        "size": result.bytes_total,
        "image-ids": [result.image_ids[Format.V1].hex()],
        "artifact": False,
        "deployed": False,
    }


def test_moved_tag(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """The next version of an image: both stay, only the new layer is fetched, the newest row comes last."""
    base = layout.layer(BASE)
    layout.image("v1", [base])
    first = pull(host, f"oci:{layout.path}:v1")
    added = layout.layer(more(b"a"))
    layout.image("v1", [base, added])
    second = pull(host, f"oci:{layout.path}:v1")
    assert (second.layers_total, second.layers_present) == (2, 1)
    assert second.bytes_fetched < second.bytes_total
    assert [row.manifest_digest for row in pulls.load(host.pulls)] == [
        first.manifest_digest,
        second.manifest_digest,
    ]
    judge.check(images=2)


def test_same_layer_twice(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """One layer in several places and compressions of an image is fetched once."""
    layers = [layout.layer(BASE), layout.layer(more(b"a")), layout.layer(BASE, "zstd"), layout.layer(BASE)]
    layout.image("v1", layers)
    recorder = Recorder()
    result = pull(host, f"oci:{layout.path}:v1", reporter=recorder)
    assert recorder.points.count("layer.stored") == 2
    assert recorder.cached + recorder.advanced == recorder.total == result.bytes_total
    assert pull(host, f"oci:{layout.path}:v1").layers_present == 4
    judge.check(images=1)
    assert judge.image_id(result.tag, Format.V1) == result.image_ids[Format.V1].hex()


def test_shared_config(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """Two manifests of one configuration: adding a format to the one keeps the other's references current."""
    first = pull(host, _tagged(layout, "gzip"))
    second = pull(host, _tagged(layout, "zstd"))
    assert first.config_digest == second.config_digest
    assert first.manifest_digest != second.manifest_digest
    assert second.layers_present == 1
    with opened(host) as repository:
        _forget_images(repository, first)
    recorder = Recorder()
    pull(host, f"oci:{layout.path}:zstd", reporter=recorder)
    assert "shared.stored" in recorder.points
    with opened(host) as repository:
        current = repository.has_stream(images.config_stream(first.config_digest))
        for digest in (first.manifest_digest, second.manifest_digest):
            image = images.open_image(repository, digest)
            assert image.manifest_refs[images.config_ref(first.config_digest)] == current
            assert image.image_ids == first.image_ids
    judge.check(images=2)
    judge("gc")
    judge("oci", "untag", second.tag)
    judge("gc")
    with opened(host) as repository:
        assert images.open_image(repository, first.manifest_digest).image_ids == first.image_ids
        os.close(repository.open_image(first.image_ids[Format.V1].hex()))
    judge.check(images=1)


def _tagged(layout: Layout, compression: str) -> str:
    layout.image(compression, [layout.layer(BASE, compression)])
    return f"oci:{layout.path}:{compression}"


def _forget_images(repository: Repository, result: PullResult) -> None:
    """Leave manifest and config as composefs-rs has them before it makes images: referring to none."""
    config = images.read_config(repository, result.config_digest)
    refs = {name: id_ for name, id_ in config.refs.items() if name.startswith("sha256:")}
    name = images.config_stream(result.config_digest)
    config_id = _write(repository, name, ContentType.CONFIG, config.raw, refs)
    manifest = images.read_manifest(repository, result.manifest_digest)
    refs = manifest.refs | {images.config_ref(result.config_digest): config_id}
    name = images.manifest_stream(result.manifest_digest)
    _write(repository, name, ContentType.MANIFEST, manifest.raw, refs)


def _write(
    repository: Repository, name: str, kind: ContentType, raw: bytes, refs: dict[str, ObjectId]
) -> ObjectId:
    content = repository.store_object(raw)
    with repository.new_stream(kind) as writer:
        writer.external(content.id, len(raw))
        for key, id_ in refs.items():
            writer.named_ref(key, id_)
        return repository.write_stream(name, writer)


def test_collector_keeps_what_was_pulled(host: HostPaths, judge: Judge, layout: Layout) -> None:
    three_layers(layout)
    result = pull(host, f"oci:{layout.path}:v1")
    before = files(host.repository)
    judge("gc")
    assert files(host.repository) == before
    judge("oci", "untag", result.tag)
    judge("gc")
    assert not list((host.repository / "streams").glob("oci-*"))
    again = pull(host, f"oci:{layout.path}:v1")
    assert (again.changed, again.layers_present) == (True, 0)
    judge.check(images=1)


def test_row_without_file_and_tag_without_row(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    pull(host, f"oci:{layout.path}:v1")
    host.pulls.unlink()
    [image] = scan(host)["images"]
    assert "reference" not in image
    assert image["pulled"] > 0
    assert not pull(host, f"oci:{layout.path}:v1").changed
    assert scan(host)["images"][0]["reference"] == f"oci:{layout.path}:v1"


# --- together with composefs-rs ---------------------------------------------------------------------------


def test_repository_of_cfsctl(host: HostPaths, cfsctl: str, judge: Judge, layout: Layout) -> None:
    """What cfsctl pulled is listed by us, and nothing of it is fetched or written again."""
    descriptor = three_layers(layout)
    run(cfsctl, "init", "--insecure", host.repository)
    judge("oci", "pull", f"oci:{layout.path}:v1", "example.com/os:theirs")
    with opened(host) as repository:
        [row] = images.list_images(repository)
    assert (row.tag, str(row.manifest_digest), row.version) == (
        "example.com/os:theirs",
        descriptor["digest"],
        "1.2",
    )
    assert row.problem == ""
    before = files(host.repository)
    result = pull(host, f"oci:{layout.path}:v1")
    assert (result.layers_present, result.bytes_fetched) == (3, 0)
    assert result.image_ids == row.image_ids
    new = files(host.repository).keys() - before.keys()
    assert new == {f"streams/refs/oci/{images.encode_tag(result.tag)}"}, "our tag is all that was added"
    judge.check(images=2)


def test_cfsctl_pulls_into_ours(host: HostPaths, judge: Judge, layout: Layout) -> None:
    three_layers(layout)
    result = pull(host, f"oci:{layout.path}:v1")
    judge("oci", "pull", f"oci:{layout.path}:v1", "theirs")
    judge.check(images=2)
    with opened(host) as repository:
        assert images.open_image(repository, result.manifest_digest).image_ids == result.image_ids


@pytest.mark.parametrize("formats", [FormatSet(Format.V1), FormatSet(Format.V2), BOTH])
@pytest.mark.parametrize("algorithm", [Algorithm.SHA256, Algorithm.SHA512])
def test_formats_and_algorithms(
    host: HostPaths, judge: Judge, layout: Layout, formats: FormatSet, algorithm: Algorithm
) -> None:
    three_layers(layout)
    Repository.init(host.repository, algorithm=algorithm, formats=formats, verity=Verity.OPPORTUNISTIC)[
        0
    ].close()
    result = pull(host, f"oci:{layout.path}:v1")
    assert set(result.image_ids) == set(formats.in_order())
    for kind, image_id in result.image_ids.items():
        assert judge.image_id(result.tag, kind) == image_id.hex()
    judge.check(images=1)
    assert not pull(host, f"oci:{layout.path}:v1").changed


def test_format_without_a_place(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    with_formats(host, FormatSet(Format.V0))
    with pytest.raises(NotSupported, match="v0"):
        pull(host, f"oci:{layout.path}:v1")


# --- other ways in ----------------------------------------------------------------------------------------


def test_registry_list_and_schema_2(
    tmp_path: Path, cfsctl: str, skopeo: str, registry: Registry, layout: Layout
) -> None:
    host = scratch_host(tmp_path / "host", registries=registry.registries_conf)
    judge = Judge(cfsctl, host.repository)
    three_layers(layout, "oci")
    layout.image("plain", [layout.layer(BASE, "gzip")])
    target = f"docker://{registry.host}/pull"
    copy(skopeo, f"oci:{layout.path}:oci", f"{target}:oci", "--preserve-digests")
    copy(skopeo, f"oci:{layout.path}:plain", f"{target}:schema2", "--format", "v2s2")
    native = pull(host, f"{target}:oci")
    assert str(native.manifest_digest) == str(native.source_digest)
    converted = pull(host, f"{target}:schema2")
    assert str(converted.manifest_digest) != str(converted.source_digest)
    assert converted.layers_present == 1, "the base layer was that of the other image"
    assert not pull(host, f"{target}:schema2", expect_digest=str(converted.source_digest)).changed
    assert not pull(host, f"{target}:schema2", expect_digest=str(converted.manifest_digest)).changed
    judge.check(images=2)
    listed = {row["tag"]: row for row in scan(host)["images"]}
    assert listed[converted.tag]["source-digest"] == str(converted.source_digest)


def test_list_of_platforms(host: HostPaths, layout: Layout) -> None:
    here = three_layers(layout, listed=False)
    entries = [here | {"platform": {"architecture": "amd64", "os": "linux"}}]
    raw = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    layout.add(layout.blob(raw, INDEX_TYPE), "multi")
    if os.uname().machine == "x86_64":
        result = pull(host, f"oci:{layout.path}:multi", expect_digest=here["digest"])
        assert str(result.manifest_digest) == here["digest"]


def test_signature_policy_before_anything(tmp_path: Path, layout: Layout) -> None:
    three_layers(layout)
    host = scratch_host(tmp_path / "strict", policy='{"default": [{"type": "reject"}]}')
    with pytest.raises(SignatureRejected):
        pull(host, f"oci:{layout.path}:v1")
    assert list((host.state / "tmp").iterdir()) == []


def test_copied_image_leaves_no_copy(tmp_path: Path, skopeo: str, cfsctl: str, layout: Layout) -> None:
    """The way through ``skopeo copy``: an image for which the policy leaves a question to skopeo."""
    three_layers(layout)
    accept = [{"type": "insecureAcceptAnything"}]
    host = scratch_host(tmp_path / "host", policy=json.dumps({"default": accept}))
    direct = pull(host, f"oci:{layout.path}:v1")
    other = scratch_host(tmp_path / "other", policy=json.dumps({"default": accept}))
    copy(skopeo, f"oci:{layout.path}:v1", f"dir:{tmp_path}/dir")
    copied = pull(other, f"dir:{tmp_path}/dir")
    assert copied.image_ids == direct.image_ids
    assert list(other.temporary.iterdir()) == []
    Judge(cfsctl, other.repository).check(images=1)


def test_artifact(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """An artifact is stored and tagged, and has no EROFS image; the empty configuration is that of many."""
    empty = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    for name in ("one", "two"):
        blobs = [
            layout.blob(f"signature {name}".encode(), "application/octet-stream"),
            layout.layer(BASE, "gzip").descriptor,
            layout.layer(more(name.encode()), "none").descriptor,
        ]
        extra = {"config": empty, "layers": blobs, "artifactType": "application/x-test",
                 "annotations": {"org.opencontainers.image.version": f"{name}.0"}}  # fmt: skip
        layout.image(name, [], manifest_extra=extra)
        result = pull(host, f"oci:{layout.path}:{name}")
        assert (result.artifact, result.image_ids, result.version) == (True, {}, f"{name}.0")
        with opened(host) as repository:
            image = images.open_image(repository, result.manifest_digest)
            assert list(image.layers) == [blob["digest"] for blob in blobs]
        for blob in blobs:
            assert judge.cat(f"oci-layer-{blob['digest']}") == layout.blob_path(blob["digest"]).read_bytes()
        assert not pull(host, f"oci:{layout.path}:{name}").changed
    judge.check(images=2)
    judge("gc")
    judge.check(images=2)
    assert [row["artifact"] for row in scan(host)["images"]] == [True, True]


# --- refusals and interruptions ---------------------------------------------------------------------------


def test_expected_digest(host: HostPaths, layout: Layout) -> None:
    descriptor = three_layers(layout)
    recorder = Recorder()
    with pytest.raises(PreconditionFailed, match=descriptor["digest"]):
        pull(host, f"oci:{layout.path}:v1", expect_digest="sha256:" + "0" * 64, reporter=recorder)
    assert recorder.advanced == -1, "no layer was fetched"
    assert pull(host, f"oci:{layout.path}:v1", expect_digest=descriptor["digest"]).changed


def test_missing_image_names_nothing(host: HostPaths, layout: Layout) -> None:
    with pytest.raises(ImageNotFound):
        pull(host, f"oci:{layout.path}:v1")
    assert scan(host)["images"] == []


def test_space_is_checked_first(host: HostPaths, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    three_layers(layout)
    full = list(os.statvfs(host.physical_root))
    full[4] = 0
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(full))
    recorder = Recorder()
    with pytest.raises(NoSpace, match="needs at least"):
        pull(host, f"oci:{layout.path}:v1", reporter=recorder)
    assert "layer.fetch" not in recorder.points
    monkeypatch.undo()
    pull(host, f"oci:{layout.path}:v1")
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(full))
    assert not pull(host, f"oci:{layout.path}:v1").changed, "nothing is missing"


def test_lock_is_waited_for(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    with_formats(host, FormatSet(Format.V1))
    with (
        Repository.open(host.repository, exclusive=True),
        pytest.raises(LockTimeout, match="pid"),
    ):
        pull(host, f"oci:{layout.path}:v1", lock_timeout=0.1)


def test_lock_is_held_to_the_end(host: HostPaths, layout: Layout) -> None:
    """A collector cannot get in between, at any point; readers can."""
    three_layers(layout)
    held: list[str] = []

    class Prober(Silent):
        def at(self, point: str) -> None:
            if point in FAULT_POINTS and point != "pull.started":
                with pytest.raises(LockTimeout):
                    Repository.open(host.repository, exclusive=True, lock_timeout=0)
                scan(host)
                held.append(point)

    pull(host, f"oci:{layout.path}:v1", reporter=Prober())
    assert set(held) == set(FAULT_POINTS) - {"pull.started", "shared.stored"}
    Repository.open(host.repository, exclusive=True, lock_timeout=0).close()


@pytest.mark.parametrize(
    "point", [p for p in (*FAULT_POINTS, "layer.fetch", "layer.read", "layer.store") if p != "shared.stored"]
)
def test_cancelled_anywhere(
    host: HostPaths, judge: Judge, skopeo: str, layout: Layout, tmp_path: Path, point: str
) -> None:
    """Cancelling at any point leaves a sound repository and no thread or process; the next pull completes."""
    three_layers(layout)
    reference = f"oci:{layout.path}:v1"
    if point == "layer.fetch":
        copy(skopeo, reference, f"dir:{tmp_path}/dir")
        reference = f"dir:{tmp_path}/dir"

    class Canceller(Silent):
        seen = False

        def at(self, at: str) -> None:
            if at == point:
                self.seen = True
                raise Cancelled

    canceller = Canceller()
    with pytest.raises(Cancelled):
        pull(host, reference, reporter=canceller)
    assert canceller.seen
    if host.repository.exists():
        judge.check()
    assert not list(host.temporary.glob("*"))
    pull(host, reference)
    judge.check(images=1)


def test_one_failing_layer_stops_the_others(host: HostPaths, layout: Layout) -> None:
    """The first error is the one that is raised, whatever the other threads then meet."""
    layers = [layout.layer(os.urandom(4_000_000), "none") for _ in range(6)]
    layout.image("bad", layers)
    flip(layout.blob_path(layers[3].descriptor["digest"]), 5)
    with pytest.raises((DigestMismatch, UnsupportedImage)):
        pull(host, f"oci:{layout.path}:bad")


def test_damaged_images_cost_their_rows_only(host: HostPaths, layout: Layout) -> None:
    good = three_layers(layout, "good")
    layout.image("bad", [layout.layer(BASE)], labels={"n": "bad"})
    pull(host, f"oci:{layout.path}:good")
    bad = pull(host, f"oci:{layout.path}:bad")
    with opened(host) as repository:
        repository.name_stream(images.manifest_stream(bad.manifest_digest), "oci/odd@name")
        stream_id = repository.has_stream(images.manifest_stream(bad.manifest_digest))
        assert stream_id is not None
    (host.repository / "objects" / stream_id.pathname).unlink()
    (host.repository / "streams/refs/oci/elsewhere").symlink_to("../../something")
    (host.repository / "streams/refs/oci/gone").symlink_to("../../oci-manifest-sha256:" + "0" * 64)
    host.pulls.write_text("{")
    found = scan(host)
    rows = {row["tag"]: row for row in found["images"]}
    assert len(rows) == 5
    assert "problem" not in rows[f"{PULL_TAG}{good['digest']}"]
    for name in (bad.tag, "odd@name", "gone", "elsewhere"):
        assert rows[name]["problem"]
    assert [problem["id"] for problem in found["problems"]] == ["pulls"]
    pull(host, f"oci:{layout.path}:good")


def test_newer_list_of_pulls_is_left_alone(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    host.pulls.parent.mkdir(parents=True)
    host.pulls.write_text('{"version": 2, "pulls": []}')
    assert pull(host, f"oci:{layout.path}:v1").changed
    assert host.pulls.read_text() == '{"version": 2, "pulls": []}'


def test_dangling_tag_is_never_written(host: HostPaths, layout: Layout) -> None:
    three_layers(layout)
    pull(host, f"oci:{layout.path}:v1")
    with opened(host) as repository, pytest.raises(ImageNotFound):
        images.tag(repository, "x", ManifestDigest("sha256:" + "0" * 64))


def test_gzip_members_and_nothing_fetched_twice(host: HostPaths, judge: Judge, layout: Layout) -> None:
    tar = BASE
    members = gzip.compress(tar[:1000]) + gzip.compress(tar[1000:])
    layer = Layer(layout.blob(members, LAYER_TYPE + "+gzip"), "sha256:" + hashlib.sha256(tar).hexdigest())
    layout.image("v1", [layer])
    result = pull(host, f"oci:{layout.path}:v1")
    judge.check(images=1)
    assert judge.cat(f"oci-layer-{layer.diff_id}") == tar
    assert result.bytes_fetched == result.bytes_total
