"""Tags and stored images: names, reading back, and rows for lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.repository import ObjectMissing, Repository, StreamMissing, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import CorruptRepository, ImageNotFound, InvalidArgs, UnsupportedImage
from hostimaged.ids import ConfigDigest, ManifestDigest, ObjectId
from hostimaged.oci import images
from hostimaged.oci.models import CONFIG_TYPE, MANIFEST_TYPE

DIFF_ID = "sha256:" + "d" * 64


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(tmp_path / "repository", verity=Verity.OPPORTUNISTIC)
    with made:
        yield made


def store(
    repository: Repository, name: str, kind: ContentType, raw: bytes, refs: dict[str, ObjectId]
) -> ObjectId:
    content = repository.store_object(raw)
    with repository.new_stream(kind) as writer:
        writer.external(content.id, len(raw))
        for key, id_ in refs.items():
            writer.named_ref(key, id_)
        return repository.write_stream(name, writer)


def sha256(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def store_image(
    repository: Repository, *, config_refs: dict[str, ObjectId] | None = None, **manifest_changes: Any
) -> ManifestDigest:
    labels = {"org.opencontainers.image.version": "9"}
    config = json.dumps({"config": {"Labels": labels}, "rootfs": {"diff_ids": [DIFF_ID]}}).encode()
    config_digest = ConfigDigest(sha256(config))
    config_id = store(
        repository, images.config_stream(config_digest), ContentType.CONFIG, config, config_refs or {}
    )
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIFF_ID, "size": 10}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(config_digest), "size": len(config)},
        "layers": [layer],
    } | manifest_changes
    raw = json.dumps(manifest).encode()
    digest = ManifestDigest(sha256(raw))
    refs = {images.config_ref(config_digest): config_id, DIFF_ID: config_id}
    store(repository, images.manifest_stream(digest), ContentType.MANIFEST, raw, refs)
    return digest


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("quay.io/foo/bar:latest", "quay.io%2Ffoo%2Fbar:latest"),
        ("docker://quay.io/a/b:c", "docker:%2F%2Fquay.io%2Fa%2Fb:c"),
        ("50%", "50%25"),
        ("a%2Fb", "a%252Fb"),
        ("%/%", "%25%2F%25"),
        ("plain", "plain"),
        ("é", "é"),
    ],
)
def test_tag_encoding(name: str, encoded: str) -> None:
    assert images.encode_tag(name) == encoded
    assert images.decode_tag(encoded) == name


@pytest.mark.parametrize(
    ("encoded", "name"), [("a%20b", "a%20b"), ("%", "%"), ("%2f", "%2f"), ("%252F", "%2F")]
)
def test_foreign_escapes_stay(encoded: str, name: str) -> None:
    assert images.decode_tag(encoded) == name


@pytest.mark.parametrize("name", ["", "@sha256:abc", "a\0b"])
def test_names_that_cannot_be_tags(name: str) -> None:
    with pytest.raises(InvalidArgs):
        images.encode_tag(name)


def test_tag(repository: Repository) -> None:
    digest = store_image(repository)
    assert images.tags(repository) == {}
    assert images.tag(repository, "example.com/os:v1", digest)
    assert not images.tag(repository, "example.com/os:v1", digest)
    assert images.tags(repository) == {"example.com/os:v1": digest}
    link = repository.path / "streams/refs/oci/example.com%2Fos:v1"
    assert str(link.readlink()) == f"../../oci-manifest-{digest}"


def test_dangling_tag_is_refused(repository: Repository) -> None:
    with pytest.raises(StreamMissing):
        images.tag(repository, "x", ManifestDigest(DIFF_ID))
    assert images.tags(repository) == {}


def test_open_image(repository: Repository) -> None:
    v1, v2, boot = (repository.write_image(bytes([n]) * 4096) for n in (1, 2, 3))
    refs = {DIFF_ID: v1, "composefs.image": v2, "composefs.image.v1": v1, "composefs.image.boot.v1": boot}
    digest = store_image(repository, config_refs=refs)
    image = images.open_image(repository, digest)
    assert (image.artifact, image.version) == (False, "9")
    assert image.image_ids == {Format.V1: v1, Format.V2: v2}
    assert image.layers == {DIFF_ID: v1}
    assert str(image.config_digest) in image.manifest_refs.popitem()[0] or image.manifest_refs


def test_open_artifact(repository: Repository) -> None:
    empty = store(repository, f"oci-config-{sha256(b'{}')}", ContentType.CONFIG, b"{}", {})
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2}
    digest = store_image(repository, config=config, annotations={"org.opencontainers.image.version": "3"})
    with pytest.raises(CorruptRepository, match="does not refer to its configuration"):
        images.open_image(repository, digest)
    stored = images.read_manifest(repository, digest)
    refs = {images.config_ref(ConfigDigest(sha256(b"{}"))): empty, DIFF_ID: empty}
    store(repository, images.manifest_stream(digest), ContentType.MANIFEST, stored.raw, refs)
    image = images.open_image(repository, digest)
    assert (image.artifact, image.version, image.config) == (True, "3", None)
    assert image.layers == {DIFF_ID: empty}


def test_missing_and_damaged(repository: Repository) -> None:
    with pytest.raises(ImageNotFound):
        images.open_image(repository, ManifestDigest(DIFF_ID))
    digest = store_image(repository)
    stored = images.read_manifest(repository, digest)
    name = images.manifest_stream(digest)
    store(repository, name, ContentType.MANIFEST, b"{}", stored.refs)
    with pytest.raises(CorruptRepository, match="something else than its name says"):
        images.open_image(repository, digest)
    store(repository, name, ContentType.CONFIG, stored.raw, stored.refs)
    with pytest.raises(CorruptRepository):
        images.open_image(repository, digest)
    with repository.new_stream(ContentType.MANIFEST) as writer:
        writer.inline(stored.raw)
        repository.write_stream(name, writer)
    with pytest.raises(CorruptRepository, match="holds 0 objects"):
        images.open_image(repository, digest)
    not_json = b"not a manifest"
    digest = ManifestDigest(sha256(not_json))
    store(repository, images.manifest_stream(digest), ContentType.MANIFEST, not_json, {})
    with pytest.raises(UnsupportedImage):
        images.open_image(repository, digest)


def test_changed_object_is_found_without_verity(repository: Repository) -> None:
    digest = store_image(repository)
    with repository.open_stream(images.manifest_stream(digest)) as stream:
        [content] = stream.object_refs
    path = repository.path / "objects" / content.pathname
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"layers", b"lAyers"))
    [row] = _tagged(repository, digest)
    assert row.problem


def _tagged(repository: Repository, digest: ManifestDigest) -> list[images.ImageRow]:
    images.tag(repository, "x", digest)
    return images.list_images(repository)


def test_rows(repository: Repository) -> None:
    good = store_image(repository)
    bad = store_image(repository, annotations={"n": "2"})
    for name in ("b/good", "a/good"):
        images.tag(repository, name, good)
    images.tag(repository, "bad", bad)
    stream_id = repository.has_stream(images.manifest_stream(bad))
    assert stream_id is not None
    (repository.path / "objects" / stream_id.pathname).unlink()
    (repository.path / "streams/refs/oci/odd").symlink_to("../../oci-layer-x")
    rows = images.list_images(repository)
    assert [row.tag for row in rows] == ["a/good", "b/good", "bad", "odd"]
    assert rows[0].manifest_digest == rows[1].manifest_digest == good
    assert (rows[0].version, rows[0].problem, rows[0].artifact) == ("9", "", False)
    assert rows[0].size == 10 + images.open_image(repository, good).manifest.config.size
    assert rows[0].tagged is not None
    assert rows[2].manifest_digest == bad
    assert "missing" in rows[2].problem
    assert rows[3].manifest_digest is None
    assert "not to a manifest" in rows[3].problem


def test_row_of_a_tag_that_goes_away_meanwhile(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store_image(repository)
    images.tag(repository, "x", digest)

    def collected(_repository: Repository, _digest: ManifestDigest) -> images.StoredImage:
        repository.remove_stream_ref("oci/x")
        raise ObjectMissing(id="00")

    monkeypatch.setattr(images, "open_image", collected)
    assert images.list_images(repository) == []


def test_row_is_read_again_when_it_is_replaced(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store_image(repository)
    images.tag(repository, "x", digest)
    real, calls = images.open_image, []

    def once(repository: Repository, digest: ManifestDigest) -> images.StoredImage:
        calls.append(digest)
        if len(calls) == 1:
            raise StreamMissing(stream="x")
        return real(repository, digest)

    monkeypatch.setattr(images, "open_image", once)
    [row] = images.list_images(repository)
    assert row.problem == ""
