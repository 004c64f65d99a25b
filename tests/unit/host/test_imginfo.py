"""The sidecar of old deployments."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hostimaged.errors import DamagedState
from hostimaged.host.imginfo import MAX_SIZE, ImgInfo, read_imginfo
from hostimaged.ids import DeploymentId

ID = DeploymentId("ab" * 64)
DIGEST = "sha256:" + "c" * 64
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 7},
    "layers": [],
    "annotations": {"org.opencontainers.image.version": "42é"},
}
CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Labels": {"version": "41"}},
    "rootfs": {"type": "layers", "diff_ids": []},
}


def test_both_are_read_and_the_manifest_is_hashed_as_it_stands() -> None:
    compact = json.dumps(MANIFEST, separators=(",", ":"), ensure_ascii=False).encode()
    found = ImgInfo.parse(json.dumps({"manifest": MANIFEST, "config": CONFIG}).encode(), "x")
    assert str(found.manifest.config_digest) == DIGEST
    assert found.config.architecture == "amd64"
    assert found.manifest_sha256 == hashlib.sha256(compact).hexdigest()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"manifest": MANIFEST}).encode(),
        json.dumps({"manifest": MANIFEST, "config": []}).encode(),
        json.dumps({"manifest": MANIFEST | {"schemaVersion": 1}, "config": CONFIG}).encode(),
        json.dumps({"manifest": MANIFEST, "config": CONFIG | {"os": "\ud800"}}).encode(),
        json.dumps({"manifest": MANIFEST, "config": CONFIG | {"rootfs": {"diff_ids": ["md5:1"]}}}).encode(),
    ],
)
def test_anything_else_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedState, match="x: "):
        ImgInfo.parse(data, "x")


def test_reading(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    file = tmp_path / f"{ID}.imginfo"
    try:
        assert read_imginfo(fd, ID) is None
        file.write_text(json.dumps({"manifest": MANIFEST, "config": CONFIG}))
        assert read_imginfo(fd, ID) is not None
        os.truncate(file, MAX_SIZE + 1)
        with pytest.raises(DamagedState, match="larger"):
            read_imginfo(fd, ID)
    finally:
        os.close(fd)
