"""Reading image layouts directly: which manifest a name means, and what is verified."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.layout import INDEX_TYPE, MANIFEST_TYPE, Layout
from hostimaged.errors import DigestMismatch, HostimageError, ImageNotFound, StorageError, UnsupportedImage
from hostimaged.oci.layout import MAX_DEPTH, LayoutSource, wanted_platforms
from hostimaged.oci.models import (
    DOCKER_MANIFEST_TYPE,
    MAX_CONFIG,
    Manifest,
    Platform,
    parse_config,
    parse_manifest,
)
from hostimaged.oci.reference import ImageReference

HERE = wanted_platforms(os.uname().machine)[0]
ELSEWHERE = {"architecture": "s390x" if HERE.architecture != "s390x" else "amd64", "os": "linux"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def source(layout: Layout, name: str = "") -> LayoutSource:
    return LayoutSource(ImageReference.parse(f"oci:{layout.path}" + (f":{name}" if name else "")))


def digest_of(layout: Layout, name: str = "") -> str:
    with source(layout, name) as opened:
        return str(opened.manifest().source_digest)


def read_all(layout: Layout, manifest: Manifest) -> None:
    with source(layout, "v1") as opened:
        opened.manifest()
        opened.config(manifest.config)
        for layer in manifest.layers:
            with opened.blob(layer) as chunks:
                for _ in chunks:
                    pass


def index(layout: Layout, *entries: dict[str, Any], media_type: str = INDEX_TYPE) -> dict[str, Any]:
    raw = json.dumps({"schemaVersion": 2, "manifests": list(entries)}).encode()
    return layout.blob(raw, media_type)


def test_reads_everything_verified(layout: Layout) -> None:
    layer = layout.layer(os.urandom(700_000), "none")
    layout.image("v1", [layer], labels={"org.opencontainers.image.version": "7"})
    with source(layout, "v1") as opened:
        fetched = opened.manifest()
        assert str(fetched.source_digest) == "sha256:" + hashlib.sha256(fetched.raw).hexdigest()
        manifest = parse_manifest(fetched.raw)
        assert parse_config(opened.config(manifest.config)).version == "7"
        with opened.blob(manifest.layers[0]) as chunks:
            content = b"".join(chunks)
        assert "sha256:" + hashlib.sha256(content).hexdigest() == layer.diff_id


def test_name_decides(layout: Layout) -> None:
    first = layout.image("a", [], labels={"n": "1"})
    second = layout.image("b", [], labels={"n": "2"})
    assert digest_of(layout, "a") == first["digest"]
    assert digest_of(layout, "b") == second["digest"]
    assert digest_of(layout, "@1") == second["digest"]
    for name, words in (("c", "no image of that name"), ("@2", "2 entries"), ("", "2 images, name one")):
        with pytest.raises(ImageNotFound, match=words):
            digest_of(layout, name)


def test_only_image_needs_no_name(layout: Layout) -> None:
    assert digest_of(layout.__class__(layout.path, [layout.image(None, [])])) != ""


def test_index_gives_the_image_for_this_machine(layout: Layout) -> None:
    other = layout.image(None, [], labels={"n": "other"}, listed=False)
    unnamed = layout.image(None, [], labels={"n": "unnamed"}, listed=False)
    here = layout.image(None, [], labels={"n": "here"}, listed=False)
    platform = {"architecture": HERE.architecture, "os": "linux"}
    entries = [other | {"platform": ELSEWHERE}, unnamed, here | {"platform": platform}]
    layout.add(index(layout, *entries), "multi")
    layout.add(index(layout, index(layout, *entries) | {"platform": platform}), "nested")
    layout.add(index(layout, *entries[:2]), "fallback")
    layout.add(index(layout, entries[0]), "none")
    assert digest_of(layout, "multi") == here["digest"]
    assert digest_of(layout, "nested") == here["digest"]
    assert digest_of(layout, "fallback") == unnamed["digest"]
    with pytest.raises(ImageNotFound, match=f"no image for linux/{HERE.architecture}"):
        digest_of(layout, "none")


def test_nesting_ends(layout: Layout) -> None:
    entry = layout.image(None, [], listed=False)
    for _ in range(MAX_DEPTH):
        entry = index(layout, entry)
    layout.add(entry, "deep")
    with pytest.raises(UnsupportedImage, match="nested"):
        digest_of(layout, "deep")


def test_wanted_platforms() -> None:
    assert wanted_platforms("x86_64") == (Platform(os="linux", architecture="amd64"),)
    assert [p.variant for p in wanted_platforms("aarch64")] == ["", "v8"]
    assert wanted_platforms("newcpu")[0].architecture == "newcpu"


def test_docker_format_is_left_to_skopeo(layout: Layout) -> None:
    descriptor = layout.image(None, [], listed=False)
    layout.add(descriptor | {"mediaType": DOCKER_MANIFEST_TYPE}, "docker")
    layout.add(descriptor | {"mediaType": "text/plain"}, "text")
    layout.add(descriptor, "oci")
    with source(layout, "docker") as opened:
        assert opened.needs_conversion
    with source(layout, "oci") as opened:
        assert not opened.needs_conversion
    with pytest.raises(UnsupportedImage, match="text/plain"):
        digest_of(layout, "text")


def test_flipped_bit_is_found(layout: Layout) -> None:
    layer = layout.layer(b"x" * 5000, "none")
    manifest_digest = layout.image("v1", [layer])["digest"]
    with source(layout, "v1") as opened:
        manifest = parse_manifest(opened.manifest().raw)
    for digest in (layer.descriptor["digest"], manifest.config.digest, manifest_digest):
        path = layout.blob_path(digest)
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DigestMismatch) as caught:
            read_all(layout, manifest)
        assert digest in caught.value.message
        path.write_bytes(good)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_wrong_length_is_found(layout: Layout, change: Any) -> None:
    layer = layout.layer(b"x" * 5000, "none")
    layout.image("v1", [layer])
    path = layout.blob_path(layer.descriptor["digest"])
    path.write_bytes(change(path.read_bytes()))
    with source(layout, "v1") as opened:
        manifest = parse_manifest(opened.manifest().raw)
    with pytest.raises(DigestMismatch, match="bytes"):
        read_all(layout, manifest)


def test_missing_pieces(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="no directory"):
        LayoutSource(ImageReference.parse(f"oci:{tmp_path}/nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageNotFound, match=r"no index\.json"):
        LayoutSource(ImageReference.parse(f"oci:{tmp_path}/empty"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        LayoutSource(ImageReference.parse(f"oci:{tmp_path}/file"))
    descriptor = layout.image("v1", [])
    layout.blob_path(descriptor["digest"]).unlink()
    with source(layout, "v1") as opened, pytest.raises(ImageNotFound, match="missing from the layout"):
        opened.manifest()


def test_blobs_are_not_looked_for_elsewhere(layout: Layout, tmp_path: Path) -> None:
    """A link in place of a blob, a device, or a digest that is a path: refused, and nothing hangs."""
    descriptor = layout.image("v1", [])
    path = layout.blob_path(descriptor["digest"])
    (tmp_path / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    with source(layout, "v1") as opened, pytest.raises(StorageError):
        opened.manifest()
    path.unlink()
    os.mkfifo(path)
    with source(layout, "v1") as opened, pytest.raises(HostimageError):
        opened.manifest()
    layout.add({"mediaType": MANIFEST_TYPE, "digest": "sha256:../../../etc/passwd", "size": 5}, "bad")
    with source(layout, "bad") as opened, pytest.raises(UnsupportedImage, match="not a sha256 digest"):
        opened.manifest()


def test_limits(layout: Layout) -> None:
    descriptor = layout.image("v1", [])
    layout.add(descriptor | {"size": 5 << 20}, "large")
    with source(layout, "large") as opened, pytest.raises(UnsupportedImage, match="larger than"):
        opened.manifest()
    with source(layout, "v1") as opened:
        config = parse_manifest(opened.manifest().raw).config
        with pytest.raises(UnsupportedImage, match="larger than"):
            opened.config(config.model_copy(update={"size": MAX_CONFIG + 1}))
    (layout.path / "index.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(UnsupportedImage, match=r"index\.json is larger"):
        digest_of(layout, "v1")
