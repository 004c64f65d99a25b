"""Every kind of bad image: the right error, nothing named, and the next pull is a good one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.judge import Judge
from hostimage_testing.layout import CONFIG_TYPE, LAYER_TYPE, Layer, Layout
from hostimage_testing.pulling import opened, pull, with_formats
from hostimage_testing.samples import BASE, flip, more, three_layers
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.repository import FormatSet
from hostimaged.errors import DigestMismatch, HostimageError, UnsupportedImage
from hostimaged.oci import images, pulls
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop
BOTH = FormatSet(Format.V1, (Format.V2,))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rewritten(layout: Layout, layer: Layer, data: bytes) -> Layer:
    """A layer whose blob is ``data`` and whose descriptor says so: only the diff_id can tell."""
    return Layer(layout.blob(data, layer.descriptor["mediaType"]), layer.diff_id)


Bad = Callable[[Layout], None]


def flipped_blob(layout: Layout) -> None:
    layer = layout.layer(more(b"bad"), "none")
    layout.image("bad", [layout.layer(BASE), layer])
    flip(layout.blob_path(layer.descriptor["digest"]))


def flipped_gzip(layout: Layout) -> None:
    layer = layout.layer(os.urandom(50_000), "gzip")
    layout.image("bad", [layout.layer(BASE), layer])
    flip(layout.blob_path(layer.descriptor["digest"]), 2000)


def flipped_config(layout: Layout) -> None:
    descriptor = layout.image("bad", [layout.layer(BASE)])
    config = json.loads(layout.blob_path(descriptor["digest"]).read_bytes())["config"]
    flip(layout.blob_path(config["digest"]))


def flipped_manifest(layout: Layout) -> None:
    flip(layout.blob_path(layout.image("bad", [layout.layer(BASE)])["digest"]))


def cut_blob(layout: Layout) -> None:
    layer = layout.layer(more(b"bad"), "gzip")
    layout.image("bad", [layout.layer(BASE), layer])
    truncate(layout.blob_path(layer.descriptor["digest"]))


def lying_diff_id(layout: Layout) -> None:
    good = layout.layer(more(b"bad"), "gzip")
    layout.image("bad", [layout.layer(BASE), Layer(good.descriptor, "sha256:" + "0" * 64)])


def swapped_layers(layout: Layout) -> None:
    one, two = layout.layer(BASE), layout.layer(more(b"bad"))
    layout.image("bad", [Layer(one.descriptor, two.diff_id), Layer(two.descriptor, one.diff_id)])


def truncated_gzip(layout: Layout) -> None:
    layer = layout.layer(more(b"bad"), "gzip")
    cut = layout.blob_path(layer.descriptor["digest"]).read_bytes()[:-20]
    layout.image("bad", [layout.layer(BASE), rewritten(layout, layer, cut)])


def not_gzip(layout: Layout) -> None:
    layer = layout.layer(more(b"bad"), "gzip")
    layout.image("bad", [layout.layer(BASE), rewritten(layout, layer, b"plain text")])


def truncated_tar(layout: Layout) -> None:
    layout.image("bad", [layout.layer(BASE), layout.layer(more(b"bad")[:1000], "gzip")])


def one_diff_id_missing(layout: Layout) -> None:
    layout.image("bad", [layout.layer(BASE), layout.layer(more(b"bad"))],
                 config_extra={"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}})  # fmt: skip


def unknown_layer_type(layout: Layout) -> None:
    layer = layout.layer(BASE)
    layout.image("bad", [Layer(layer.descriptor | {"mediaType": LAYER_TYPE + "+lzma"}, layer.diff_id)])


def no_usr(layout: Layout) -> None:
    layout.image("bad", [layout.layer(tars.directory(b"etc") + tars.END)])


def missing_parent(layout: Layout) -> None:
    layout.image("bad", [layout.layer(BASE), layout.layer(tars.file(b"no/such/place", b"") + tars.END)])


def config_that_is_none(layout: Layout) -> None:
    layout.image("bad", [layout.layer(BASE)], manifest_extra={"config": layout.blob(b"[]", CONFIG_TYPE)})


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (flipped_blob, DigestMismatch),
        (flipped_gzip, DigestMismatch),
        (flipped_config, DigestMismatch),
        (flipped_manifest, DigestMismatch),
        (cut_blob, DigestMismatch),
        (lying_diff_id, DigestMismatch),
        (swapped_layers, DigestMismatch),
        (truncated_gzip, UnsupportedImage),
        (not_gzip, UnsupportedImage),
        (truncated_tar, UnsupportedImage),
        (one_diff_id_missing, UnsupportedImage),
        (unknown_layer_type, UnsupportedImage),
        (no_usr, UnsupportedImage),
        (missing_parent, UnsupportedImage),
        (config_that_is_none, UnsupportedImage),
    ],
)
def test_bad_image(
    host: HostPaths, judge: Judge, layout: Layout, spoil: Bad, kind: type[HostimageError]
) -> None:
    """The right error, no name for anything bad, and the next good image pulls."""
    spoil(layout)
    with pytest.raises(kind) as caught:
        pull(host, f"oci:{layout.path}:bad")
    assert "\n" not in caught.value.message
    assert str(host.temporary) not in caught.value.message
    with opened(host) as repository:
        assert images.tags(repository) == {}
        assert not [
            name for name in repository.streams() if name.startswith(("oci-manifest-", "oci-config-"))
        ]
        assert repository.images() == []
        for name in repository.streams():
            assert "sha256:" + hashlib.sha256(judge.cat(name)).hexdigest() == name.removeprefix("oci-layer-")
    assert pulls.load(host.pulls) == []
    assert list(host.temporary.iterdir()) == []
    judge.check(images=0)
    for path in (layout.path / "blobs/sha256").iterdir():
        path.unlink()
    three_layers(layout, "good")
    assert pull(host, f"oci:{layout.path}:good").changed
    judge.check(images=1)


def test_damaged_repository_is_mended_by_pulling(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """Objects that went missing are fetched again: content, layer streams, images, config, manifest."""
    three_layers(layout)
    with_formats(host, BOTH)
    result = pull(host, f"oci:{layout.path}:v1")
    objects = sorted(path for path in (host.repository / "objects").rglob("*") if path.is_file())
    assert len(objects) > 8
    for path in objects:
        path.unlink()
        mended = pull(host, f"oci:{layout.path}:v1")
        assert mended.changed
        assert mended.image_ids == result.image_ids
        judge.check(images=1)
    shutil.rmtree(host.repository / "images")
    assert pull(host, f"oci:{layout.path}:v1").changed
    judge.check(images=1)
