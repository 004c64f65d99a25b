"""Manifests, indexes and configurations: what is read, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.models import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MAX_CONFIG,
    MAX_LAYERS,
    MAX_MANIFEST,
    parse_config,
    parse_index,
    parse_manifest,
)

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


def descriptor(digest: str = DIGEST, size: Any = 3, media_type: str = CONFIG_TYPE) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def manifest(**changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "config": descriptor(), "layers": []} | changes).encode()


def config(**changes: Any) -> bytes:
    return json.dumps({"rootfs": {"type": "layers", "diff_ids": [DIGEST]}} | changes).encode()


def test_manifest() -> None:
    layers = [descriptor(OTHER, 10), descriptor(OTHER, 10), descriptor("sha256:" + "c" * 64, 7)]
    parsed = parse_manifest(
        manifest(mediaType=MANIFEST_TYPE, layers=layers, annotations={"a": "b"}, unknown=1)
    )
    assert parsed.is_container
    assert str(parsed.config_digest) == DIGEST
    assert [layer.size for layer in parsed.layers] == [10, 10, 7]
    assert parsed.total_size == 3 + 10 + 7, "a blob named twice is transferred once"
    assert parsed.annotations == {"a": "b"}


def test_nulls_of_go_are_empty() -> None:
    parsed = parse_manifest(manifest(layers=None, annotations=None))
    assert parsed.layers == ()
    assert parsed.annotations == {}
    assert parse_config(config(config=None, created=None)).version == ""
    assert parse_config(config(rootfs={"type": "layers", "diff_ids": None})).diff_ids == ()
    assert parse_config(config(config={"Labels": None})).config.labels == {}
    assert parse_index(b'{"schemaVersion": 2, "manifests": null}').manifests == ()


def test_artifact() -> None:
    parsed = parse_manifest(manifest(config=descriptor(media_type="application/vnd.oci.empty.v1+json")))
    assert not parsed.is_container


@pytest.mark.parametrize(
    "changes",
    [
        {"schemaVersion": 1},
        {"schemaVersion": None},
        {"mediaType": "application/vnd.oci.image.index.v1+json"},
        {"config": None},
        {"config": descriptor("sha512:" + "a" * 128)},
        {"config": descriptor("sha256:" + "A" * 64)},
        {"config": descriptor(size="3")},
        {"config": descriptor(size=3.0)},
        {"config": descriptor(size=True)},
        {"config": descriptor(size=-1)},
        {"config": descriptor(size=1 << 60)},
        {"config": {"mediaType": CONFIG_TYPE, "size": 3}},
        {"layers": {}},
        {"layers": [descriptor("md5:abc")]},
        {"layers": [descriptor()] * (MAX_LAYERS + 1)},
        {"layers": [None]},
        {"annotations": {"a": 1}},
    ],
)
def test_manifest_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedImage, match=r"manifest|digest"):
        parse_manifest(manifest(**changes))


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff", b'{"schemaVersion": 2}'])
def test_damage_is_a_typed_error(raw: bytes) -> None:
    for parse in (parse_manifest, parse_config, parse_index):
        if parse is parse_index and raw == b'{"schemaVersion": 2}':
            continue
        with pytest.raises(UnsupportedImage):
            parse(raw)


def test_size_is_bounded() -> None:
    with pytest.raises(UnsupportedImage, match="larger than"):
        parse_manifest(b" " * (MAX_MANIFEST + 1))
    with pytest.raises(UnsupportedImage, match="larger than"):
        parse_config(b" " * (MAX_CONFIG + 1))


def test_config() -> None:
    parsed = parse_config(
        config(
            architecture="amd64",
            os="linux",
            created="2026-01-01T00:00:00Z",
            config={"Labels": {"org.opencontainers.image.version": "42", "x": "y"}, "Cmd": ["sh"]},
        )
    )
    assert parsed.version == "42"
    assert [str(d) for d in parsed.diff_ids] == [DIGEST]


@pytest.mark.parametrize(
    "changes",
    [
        {"rootfs": None},
        {"rootfs": {"type": "squashed", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha512:x"]}},
        {"rootfs": {"type": "layers", "diff_ids": [1]}},
        {"rootfs": {"type": "layers", "diff_ids": [DIGEST] * (MAX_LAYERS + 1)}},
        {"config": {"Labels": {"a": {}}}},
        {"created": {}},
    ],
)
def test_config_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedImage, match="configuration"):
        parse_config(config(**changes))


def test_message_does_not_repeat_the_input() -> None:
    with pytest.raises(UnsupportedImage) as caught:
        parse_manifest(manifest(config=descriptor(size="\x1b[31msecret")))
    assert "secret" not in caught.value.message
