"""Hostile and damaged images, each through a whole pull: the right error, and nothing bad gets a name."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import LAYER_TYPE, Layer, Layout
from hostimage_testing.pulling import check_nothing_named, check_whole, pull
from hostimaged.composefs.repository import Repository
from hostimaged.errors import DigestMismatch, HostimageError, UnsupportedImage
from hostimaged.oci import images
from hostimaged.oci.models import MAX_MANIFEST
from hostimaged.oci.scan import scan
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
#: Bits flipped in each file of the image; all bytes of it in the long run.
FLIPS = 1000 if SOAK else 12
SEED = 20240611

BASE = tars.directory(b"usr") + tars.file(b"usr/base", b"base" * 1000) + tars.END
CONTENT = hashlib.sha256(b"content").digest() * 3000


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "host")


@pytest.fixture
def judge(cfsctl: str, host: HostPaths) -> Judge:
    return Judge(cfsctl, host.repository)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def some_bits(data: bytes, seed: int) -> list[int]:
    """Bits to flip: the first, the last, and some between."""
    bits = len(data) * 8
    chosen = random.Random(SEED + seed).sample(range(bits), min(FLIPS, bits))
    return sorted({0, bits - 1, *chosen})


@pytest.mark.parametrize("what", ["manifest", "config", "gzip", "zstd", "none"])
def test_flipped_bits_anywhere(host: HostPaths, judge: Judge, layout: Layout, what: str) -> None:
    base = layout.layer(BASE)
    bad = layout.layer(
        tars.file(b"usr/bad", CONTENT) + tars.END, what if what in ("gzip", "zstd") else "none"
    )
    manifest = layout.image("v1", [base, bad])
    raw = layout.blob_path(manifest["digest"]).read_bytes()
    digest = {"manifest": manifest["digest"], "config": json.loads(raw)["config"]["digest"]}
    path = layout.blob_path(digest.get(what, bad.descriptor["digest"]))
    good = path.read_bytes()
    for bit in some_bits(good, len(what)):
        path.write_bytes(flipped(good, bit))
        with pytest.raises(DigestMismatch) as caught:
            pull(host, f"oci:{layout.path}:v1")
        assert type(caught.value) is DigestMismatch, bit
        check_nothing_named(host, base.diff_id)
    judge.check(images=0)
    path.write_bytes(good)
    assert pull(host, f"oci:{layout.path}:v1").changed
    judge.check(images=1)


# --- one bad layer ------------------------------------------------------------------------------------------


def tar_of(*entries: bytes) -> bytes:
    return b"".join(entries) + tars.END


def blob_of(layout: Layout, tar: bytes, blob: bytes, suffix: str) -> Layer:
    """A layer with a blob of our own making; descriptor and diff_id are right."""
    media_type = LAYER_TYPE + (f"+{suffix}" if suffix else "")
    return Layer(layout.blob(blob, media_type), "sha256:" + hashlib.sha256(tar).hexdigest())


TAR = tar_of(tars.file(b"usr/bad", CONTENT))
FRAME = zstandard.ZstdCompressor().compress(TAR)


def gzipped(change: Callable[[bytes], bytes]) -> Callable[[Layout], Layer]:
    return lambda layout: blob_of(layout, TAR, change(gzip.compress(TAR)), "gzip")


def zstd(change: Callable[[bytes], bytes]) -> Callable[[Layout], Layer]:
    return lambda layout: blob_of(layout, TAR, change(FRAME), "zstd")


def plain(tar: bytes) -> Callable[[Layout], Layer]:
    return lambda layout: layout.layer(tar, "gzip")


def entries(*parts: bytes) -> Callable[[Layout], Layer]:
    return plain(tar_of(*parts))


def wide_window(layout: Layout) -> Layer:
    """A frame that asks for 256 MiB of memory, and is right otherwise."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return blob_of(layout, TAR, compressor.compress(TAR) + compressor.flush(), "zstd")


def longer_than_declared(layout: Layout) -> Layer:
    """A frame whose header says one byte less than there is."""
    plain_frame = zstandard.ZstdCompressor(write_content_size=True).compress(TAR)
    size = zstandard.frame_content_size(plain_frame)
    at = plain_frame.index(struct.pack("<I", size), 4, 20)
    return blob_of(
        layout, TAR, plain_frame[:at] + struct.pack("<I", size - 1) + plain_frame[at + 4 :], "zstd"
    )


def wrong_trailer(at: int) -> Callable[[Layout], Layer]:
    """A gzip member whose checksum or length is another."""
    return gzipped(lambda data: flipped(data, (len(data) + at) * 8))


def lying_diff_id(layout: Layout) -> Layer:
    return Layer(layout.layer(TAR).descriptor, "sha256:" + "0" * 64)


FILE = tars.file(b"x", b"x" * 100)
BAD_LAYERS: dict[str, tuple[Callable[[Layout], Layer], type[HostimageError]]] = {
    "lying diff_id": (lying_diff_id, DigestMismatch),
    "truncated gzip": (gzipped(lambda data: data[:-500]), UnsupportedImage),
    "gzip without its trailer": (gzipped(lambda data: data[:-8]), UnsupportedImage),
    "gzip with another checksum": (wrong_trailer(-8), UnsupportedImage),
    "gzip of another length": (wrong_trailer(-4), UnsupportedImage),
    "truncated zstd": (zstd(lambda data: data[:-20]), UnsupportedImage),
    "zstd of another length": (longer_than_declared, UnsupportedImage),
    "junk after the last gzip member": (gzipped(lambda data: data + b"junk"), UnsupportedImage),
    "zeros after the last gzip member": (gzipped(lambda data: data + bytes(512)), UnsupportedImage),
    "half a member after the last one": (gzipped(lambda data: data + data[:20]), UnsupportedImage),
    "junk after the last zstd frame": (zstd(lambda data: data + b"junk"), UnsupportedImage),
    "half a skippable frame at the end": (
        zstd(lambda data: data + struct.pack("<II", 0x184D2A50, 9) + b"short"),
        UnsupportedImage,
    ),
    "gzip that is none": (gzipped(lambda _: b"plain text"), UnsupportedImage),
    "zstd that is none": (zstd(lambda _: gzip.compress(TAR)), UnsupportedImage),
    "empty blob": (gzipped(lambda _: b""), UnsupportedImage),
    "zstd window over 128 MiB": (wide_window, UnsupportedImage),
    "GNU sparse": (entries(tars.header(b"usr/f", 0, b"S", magic=tars.GNU)), UnsupportedImage),
    "PAX sparse 0.1": (entries(tars.pax((b"GNU.sparse.map", b"0,1")), FILE), UnsupportedImage),
    "PAX sparse 1.0": (
        entries(tars.pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")), FILE),
        UnsupportedImage,
    ),
    "upwards": (entries(tars.file(b"usr/../../etc/shadow", b"x")), UnsupportedImage),
    "upwards at the start": (entries(tars.file(b"../f", b"x")), UnsupportedImage),
    "upwards at the end": (entries(tars.directory(b"usr/..")), UnsupportedImage),
    "upwards in a pax path": (entries(tars.pax((b"path", b"usr/../f")), FILE), UnsupportedImage),
    "upwards in a GNU long name": (entries(tars.gnu_long(b"L", b"usr/../f"), FILE), UnsupportedImage),
    "upwards in a hard link": (
        entries(tars.header(b"usr/l", 0, b"1", link=b"../../etc/shadow")),
        UnsupportedImage,
    ),
    "size beyond the stream": (plain(tars.header(b"usr/f", 1 << 30) + bytes(4096)), UnsupportedImage),
    "size beyond any file": (entries(tars.header(b"usr/f", tars.base256(1 << 64, 12))), UnsupportedImage),
    "size below nothing": (entries(tars.header(b"usr/f", tars.base256(-1, 12))), UnsupportedImage),
    "path of 4,097 bytes": (entries(tars.pax((b"path", (b"d" * 200 + b"/") * 20 + b"x" * 77)), FILE),
                            UnsupportedImage),
    "long name of 5,000 bytes": (entries(tars.gnu_long(b"L", b"d/" * 2500), FILE), UnsupportedImage),
    "2,001 levels": (entries(tars.pax((b"path", b"d/" * 2000 + b"f")), FILE), UnsupportedImage),
    "pax header over 1 MiB": (entries(tars.pax((b"comment", b"x" * (1 << 20))), FILE), UnsupportedImage),
    "long name over 1 MiB": (entries(tars.gnu_long(b"L", b"x" * (1 << 20)), FILE), UnsupportedImage),
    "headers over 1 MiB together": (
        entries(tars.gnu_long(b"K", b"x" * (1 << 19)), tars.pax((b"comment", b"x" * (1 << 19))), FILE),
        UnsupportedImage,
    ),
    "header said to be 4 EiB": (
        entries(tars.header(b"PaxHeader", tars.base256(1 << 62, 12), b"x")),
        UnsupportedImage,
    ),
    "cut in a header": (plain(TAR[:300]), UnsupportedImage),
    "cut in a content": (plain(TAR[:1300]), UnsupportedImage),
    "no tar at all": (plain(b"#!/bin/sh\n" * 500), UnsupportedImage),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layer(host: HostPaths, judge: Judge, layout: Layout, case: str) -> None:
    make, kind = BAD_LAYERS[case]
    base = layout.layer(BASE)
    refuse(host, layout, [base, make(layout)], kind)
    # Whatever became of it beside the bad one: a verified layer keeps its name.
    layout.image("good", [base])
    assert pull(host, f"oci:{layout.path}:good").changed
    with pytest.raises(kind):
        pull(host, f"oci:{layout.path}:bad")
    with Repository.open(host.repository, lock_timeout=0) as repository:
        check_whole(repository)
        assert len(images.tags(repository)) == 1
        assert repository.has_stream(f"oci-layer-{base.diff_id}") is not None
        assert len([name for name in repository.streams() if name.startswith("oci-layer-")]) == 1
    judge.check(images=1)


def refuse(host: HostPaths, layout: Layout, layers: list[Layer], kind: type[HostimageError]) -> None:
    """Pull an image of ``layers``, of which all but the last are good."""
    layout.image("bad", layers)
    with pytest.raises(kind) as caught:
        pull(host, f"oci:{layout.path}:bad")
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert str(host.temporary) not in caught.value.message
    check_nothing_named(host, *(layer.diff_id for layer in layers[:-1]))


def test_more_than_the_limit_uncompressed(
    host: HostPaths, judge: Judge, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb is stopped by the configured limit, however small it is compressed."""
    bomb = layout.layer(tar_of(tars.file(b"usr/bomb", bytes(20 << 20))), "zstd")
    assert bomb.descriptor["size"] < 10_000
    with monkeypatch.context() as patch:
        patch.setattr("hostimaged.oci.layers.DEFAULT_LIMIT", 8 << 20)
        refuse(host, layout, [layout.layer(BASE), bomb], UnsupportedImage)
    assert pull(host, f"oci:{layout.path}:bad").changed
    judge.check(images=1)


def test_more_than_declared(host: HostPaths, layout: Layout) -> None:
    """A blob longer than its descriptor says."""
    good = layout.layer(TAR)
    longer = Layer(good.descriptor | {"size": good.descriptor["size"] - 1}, good.diff_id)
    refuse(host, layout, [layout.layer(BASE), longer], DigestMismatch)
    shorter = Layer(good.descriptor | {"size": good.descriptor["size"] + 1}, good.diff_id)
    refuse(host, layout, [layout.layer(BASE), shorter], DigestMismatch)


# --- bad manifests and configurations -----------------------------------------------------------------------


def test_manifest_over_4_mib(host: HostPaths, judge: Judge, layout: Layout) -> None:
    layers = [layout.layer(BASE)]
    small = layout.image("bad", layers, manifest_extra={"annotations": {}})
    room = MAX_MANIFEST - small["size"]
    for size, refused in ((room + 1, True), (room - 20, False)):
        annotations = {"annotations": {"a": "x" * size}}
        descriptor = layout.image("bad", layers, manifest_extra=annotations)
        assert (descriptor["size"] > MAX_MANIFEST) is refused
        if refused:
            with pytest.raises(UnsupportedImage, match="4194304"):
                pull(host, f"oci:{layout.path}:bad")
            check_nothing_named(host)
        else:
            assert pull(host, f"oci:{layout.path}:bad").changed
            judge.check(images=1)


DIFF_IDS: dict[str, Callable[[list[str]], object]] = {
    "one is missing": lambda ids: ids[:-1],
    "one too many": lambda ids: [*ids, ids[0]],
    "none at all": lambda _: [],
    "null": lambda _: None,
    "not a digest": lambda ids: [*ids[:-1], "latest"],
    "another algorithm": lambda ids: [*ids[:-1], "sha512:" + "0" * 128],
    "upper case": lambda ids: [*ids[:-1], ids[-1].upper()],
    "a number": lambda ids: [*ids[:-1], 7],
}


@pytest.mark.parametrize("case", DIFF_IDS)
def test_diff_ids_that_do_not_fit(host: HostPaths, judge: Judge, layout: Layout, case: str) -> None:
    layers = [layout.layer(BASE), layout.layer(TAR)]
    diff_ids = DIFF_IDS[case]([layer.diff_id for layer in layers])
    extra = {"rootfs": {"type": "layers", "diff_ids": diff_ids}}
    layout.image("bad", layers, config_extra=extra)
    with pytest.raises(UnsupportedImage):
        pull(host, f"oci:{layout.path}:bad")
    check_nothing_named(host)
    judge.check(images=0)


@pytest.mark.parametrize("missing", ["rootfs", "config", "layers", "schemaVersion"])
def test_parts_that_are_missing(host: HostPaths, layout: Layout, missing: str) -> None:
    layers = [layout.layer(BASE)]
    descriptor = layout.image("bad", layers, config_extra={"rootfs": None} if missing == "rootfs" else None)
    if missing != "rootfs":
        manifest = json.loads(layout.blob_path(descriptor["digest"]).read_bytes())
        del manifest[missing]
        layout.add(layout.blob(json.dumps(manifest).encode(), descriptor["mediaType"]), "bad")
    with pytest.raises(UnsupportedImage):
        pull(host, f"oci:{layout.path}:bad")
    check_nothing_named(host)


# --- what is accepted ---------------------------------------------------------------------------------------


def chunked(tar: bytes) -> bytes:
    """As zstd:chunked has it: a frame for each file and each gap, then a table of contents and a footer in
    skippable frames, which are no data."""
    compress = zstandard.ZstdCompressor().compress
    parts = [compress(tar[at : at + 700]) for at in range(0, len(tar), 700)]
    table = compress(json.dumps({"version": 1, "entries": []}).encode())
    footer = struct.pack("<QQQQ", sum(map(len, parts)), len(table), 40, 1) + b"GNUlInUx"
    return b"".join(parts) + b"".join(
        struct.pack("<II", 0x184D2A50, len(part)) + part for part in (table, footer)
    )


def test_zstd_chunked(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """The same ids as cfsctl, which computes them from what is stored."""
    layers = [layout.layer(BASE), blob_of(layout, TAR, chunked(TAR), "zstd")]
    layout.image("v1", layers)
    result = pull(host, f"oci:{layout.path}:v1")
    judge.check(images=1)
    for version, id_ in result.image_ids.items():
        assert judge.image_id(result.tag, version) == id_.hex()
    plain_layers = [layout.layer(BASE, "none"), layout.layer(TAR, "none")]
    layout.image("plain", plain_layers)
    assert pull(host, f"oci:{layout.path}:plain").image_ids == result.image_ids


def test_an_artifact_is_never_offered_as_an_os_image(host: HostPaths, judge: Judge, layout: Layout) -> None:
    """Even where its blobs are layers of a whole system, and its config type is nearly that of an image."""
    system = layout.layer(BASE, "none")
    for number, config in enumerate(
        (
            layout.blob(b"{}", "application/vnd.oci.empty.v1+json"),
            layout.blob(
                json.dumps({"rootfs": {"type": "layers", "diff_ids": [system.diff_id]}}).encode(),
                "application/vnd.oci.image.config.v2+json",
            ),
        )
    ):
        layout.image(f"artifact{number}", [system], manifest_extra={"config": config})
        result = pull(host, f"oci:{layout.path}:artifact{number}")
        assert result.artifact
        assert result.image_ids == {}
    with Repository.open(host.repository, lock_timeout=0) as repository:
        assert repository.images() == []
        assert len(images.tags(repository)) == 2
    rows = scan(host)["images"]
    assert [row["artifact"] for row in rows] == [True, True]
    assert all("image-ids" not in row and "problem" not in row for row in rows)
    judge.check(images=2)
