"""The demo's image: what it holds, that it is always the same, and that others read it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zstandard

SOURCE = Path(__file__).parents[2] / "demo/sample_image.py"

# The same from Python 3.10 to 3.13: the tar bytes depend on nothing but the script and tarfile.
DIFF_IDS = {
    "base": "sha256:4daf1f52601c8205b26902e1cd9fff222ce32cf2ea6ea7cb57dbd10ed76007e8",
    "libraries": "sha256:7cf63498b823a7e4db81d053e7c9a91defa6d5830d161c02b55889133b51b4ef",
    "documents": "sha256:07010eff2ab90d8e5f4f270daffb9e663f6aaf87e3ca5a011d5d4fc1160c4b81",
    "changes": "sha256:7bfeeff22c5c89fd7c35d1dbb063591709a1479aa288e2c826fcbcd0a861da79",
    "release": "sha256:245867328cde6a8ca38f0b3f5a31d7a66222a8a876b1650208936a8efed355f4",
}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_image", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["sample_image"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def image(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return builder.build(tmp_path_factory.mktemp("image"), version="1")


def _directory(image: Any) -> Path:
    return Path(image.reference.split(":")[1])


def _blob(image: Any, digest: str) -> bytes:
    data = (_directory(image) / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert "sha256:" + hashlib.sha256(data).hexdigest() == digest
    return data


def _tar(image: Any, layer: Any) -> bytes:
    data = _blob(image, layer.digest)
    assert len(data) == layer.size
    if layer.compression == "gzip":
        data = gzip.decompress(data)
    elif layer.compression == "zstd":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return data


def test_every_digest_and_size_is_true(image: Any) -> None:
    manifest = json.loads(_blob(image, image.manifest_digest))
    config = json.loads(_blob(image, image.config_digest))
    assert manifest["config"]["digest"] == image.config_digest
    assert [entry["digest"] for entry in manifest["layers"]] == [layer.digest for layer in image.layers]
    assert [entry["size"] for entry in manifest["layers"]] == [layer.size for layer in image.layers]
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]
    for layer in image.layers:
        data = _tar(image, layer)
        assert len(data) == layer.tar_size
        assert "sha256:" + hashlib.sha256(data).hexdigest() == layer.diff_id


def test_every_compression_is_there(image: Any) -> None:
    assert {layer.compression for layer in image.layers} == {"gzip", "zstd", "none"}
    types = [entry["mediaType"] for entry in json.loads(_blob(image, image.manifest_digest))["layers"]]
    for layer, media_type in zip(image.layers, types, strict=True):
        suffix = {"gzip": "+gzip", "zstd": "+zstd", "none": ".tar"}[layer.compression]
        assert media_type.endswith(suffix)


def test_the_layers_hold_what_real_ones_hold(image: Any) -> None:
    entries: list[tarfile.TarInfo] = []
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(_tar(image, layer))) as archive:
            entries += archive.getmembers()
    kinds = {entry.type for entry in entries}
    assert kinds == {tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE}
    names = {entry.name for entry in entries}
    assert any(name.rpartition("/")[2].startswith(".wh.program") for name in names)
    assert any(name.endswith("/.wh..wh..opq") for name in names)
    assert any(len(name) > 100 for name in names)
    assert any(not name.isascii() for name in names)
    capability = [entry.pax_headers.get("SCHILY.xattr.security.capability") for entry in entries]
    assert [len(value) for value in capability if value] == [20]
    assert {entry.mtime for entry in entries} == {1_735_689_600}


def test_building_again_gives_the_same_bytes(builder: ModuleType, image: Any, tmp_path: Path) -> None:
    again = builder.build(tmp_path, version="1")
    assert again.manifest_digest == image.manifest_digest
    assert {path.name for path in (tmp_path / "blobs/sha256").iterdir()} == {
        path.name for path in (_directory(image) / "blobs/sha256").iterdir()
    }
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == ["sha256"]


def test_the_tar_bytes_are_the_same_on_every_machine(image: Any) -> None:
    assert {layer.title: layer.diff_id for layer in image.layers} == DIFF_IDS


def test_versions_share_all_but_the_last_layer(builder: ModuleType, tmp_path: Path) -> None:
    one, two = builder.build(tmp_path, version="1"), builder.build(tmp_path, version="2")
    builder.build(tmp_path, version="1")
    assert one.layers[:-1] == two.layers[:-1]
    assert one.layers[-1] != two.layers[-1]
    index = json.loads((tmp_path / "index.json").read_text())
    found = {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry["digest"]
        for entry in index["manifests"]
    }
    assert found == {"1": one.manifest_digest, "2": two.manifest_digest}
    assert len(index["manifests"]) == 2


def test_a_name_moves_on_to_the_next_version(builder: ModuleType, tmp_path: Path) -> None:
    one, two = (builder.build(tmp_path, version=version, tag="stable") for version in "12")
    assert one.reference == two.reference == f"oci:{tmp_path}:stable"
    (entry,) = json.loads((tmp_path / "index.json").read_text())["manifests"]
    assert entry["digest"] == two.manifest_digest


@pytest.mark.interop
def test_skopeo_reads_it(image: Any, skopeo: str) -> None:
    done = subprocess.run(
        [skopeo, "inspect", image.reference], check=True, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["Digest"] == image.manifest_digest


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SOURCE, tmp_path / "image", "--version", "9"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"oci:{tmp_path}/image:9\n"
