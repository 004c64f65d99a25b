"""A containers-storage made file by file from tars: also one that podman would not leave behind."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostimage_testing.layout import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE

_POLYNOMIAL = 0xD800000000000000
_BLOCK = 512


def crc64_iso(data: bytes) -> int:
    """CRC-64/GO-ISO, bit by bit as the standard has it."""
    crc = 2**64 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc ^ 2**64 - 1


def segment(data: bytes) -> dict[str, Any]:
    """An entry of tar-split data: bytes of the tar."""
    return {"type": 2, "payload": base64.b64encode(data).decode()}


def content(name: bytes, data: bytes, **other: Any) -> dict[str, Any]:
    """An entry of tar-split data: the content of a file."""
    entry = {"type": 1, "size": len(data), "payload": base64.b64encode(crc64_iso(data).to_bytes(8)).decode()}
    try:
        entry["name"] = name.decode()
    except UnicodeDecodeError:
        entry["name_raw"] = base64.b64encode(name).decode()
    return entry | other


def tar_split(tar: bytes) -> list[dict[str, Any]]:
    """The entries for ``tar`` as tar-split makes them: padding goes in front of the next header."""
    entries: list[dict[str, Any]] = []
    raw = b""
    at = 0
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            if not member.isreg() or not member.size:
                continue
            raw += tar[at : member.offset_data]
            entries.append(segment(raw))
            raw = b""
            at = member.offset_data + member.size
            entries.append(content(os.fsencode(member.name), tar[member.offset_data : at]))
    return [*entries, segment(raw + tar[at:])]


@dataclass
class Store:
    """A store below ``root`` under construction. Contents of files are written, owners and modes are not."""

    root: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("overlay/l", "overlay-images", "overlay-layers"):
            (self.root / name).mkdir(parents=True)
        self._write()

    def layer(
        self, tar: bytes, below: Iterable[str] = (), entries: list[dict[str, Any]] | None = None
    ) -> str:
        """Unpack ``tar`` above the layers ``below`` (nearest first); returns the layer's id."""
        nearest = list(below)
        diff_id = hashlib.sha256(tar).hexdigest()
        layer_id = hashlib.sha256(f"{len(self.layers)} {diff_id}".encode()).hexdigest()
        diff = self.diff(layer_id)
        diff.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                path = diff / os.fsencode(member.name).decode("utf-8", "surrogateescape")
                path.parent.mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    path.mkdir(exist_ok=True)
                elif member.isreg():
                    file = archive.extractfile(member)
                    assert file is not None
                    path.write_bytes(file.read())
        (self.root / "overlay/l" / self.link(layer_id)).symlink_to(f"../{layer_id}/diff")
        lower = ":".join(f"l/{self.link(one)}" for one in nearest)
        if lower:
            (diff.parent / "lower").write_text(lower)
        self.split(layer_id, tar_split(tar) if entries is None else entries)
        entry = {"id": layer_id, "diff-digest": f"sha256:{diff_id}", "diff-size": len(tar)}
        self.layers.append(entry | ({"parent": nearest[0]} if nearest else {}))
        self._write()
        return layer_id

    def split(self, layer_id: str, entries: list[dict[str, Any]]) -> None:
        """Write the tar-split data of a layer."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        self.split_path(layer_id).write_bytes(gzip.compress(lines.encode()))

    def split_path(self, layer_id: str) -> Path:
        """File of the tar-split data of a layer."""
        return self.root / f"overlay-layers/{layer_id}.tar-split.gz"

    def diff(self, layer_id: str) -> Path:
        """Directory with the files of a layer."""
        return self.root / "overlay" / layer_id / "diff"

    @staticmethod
    def link(layer_id: str) -> str:
        """Short name of a layer."""
        return layer_id[:26].upper()

    def image(self, *names: str, layers: Iterable[str], docker: bool = False) -> str:
        """An image of ``layers``, lowest first; returns its id."""
        known = {layer["id"]: layer for layer in self.layers}
        wanted = [known[one] for one in layers]
        diff_ids = [layer["diff-digest"] for layer in wanted]
        config = json.dumps(
            {"architecture": "amd64", "os": "linux", "config": {},
             "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        ).encode()  # fmt: skip
        image_id = hashlib.sha256(config).hexdigest()
        docker_type = "application/vnd.docker."
        types = (
            (f"{docker_type}distribution.manifest.v2+json", f"{docker_type}container.image.v1+json",
             f"{docker_type}image.rootfs.diff.tar")
            if docker else (MANIFEST_TYPE, CONFIG_TYPE, LAYER_TYPE)
        )  # fmt: skip
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": types[0],
                "config": {"mediaType": types[1], "digest": f"sha256:{image_id}", "size": len(config)},
                "layers": [
                    {"mediaType": types[2], "digest": layer["diff-digest"], "size": layer["diff-size"]}
                    for layer in wanted
                ],
            }
        ).encode()
        directory = self.root / "overlay-images" / image_id
        directory.mkdir(exist_ok=True)
        (directory / "manifest").write_bytes(manifest)
        data = f"sha256:{image_id}"
        (directory / ("=" + base64.b64encode(data.encode()).decode())).write_bytes(config)
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        self.images.append(
            {
                "id": image_id,
                "names": list(names),
                "digest": digest,
                "layer": wanted[-1]["id"] if wanted else "",
                "big-data-names": ["manifest", data],
            }
        )
        self._write()
        return image_id

    def containers(self, images: Iterable[str]) -> None:
        """Let a container use each of these images."""
        place = self.root / "overlay-containers"
        place.mkdir()
        (place / "containers.lock").touch()
        entries = [{"id": image[::-1], "image": image, "layer": ""} for image in images]
        (place / "containers.json").write_text(json.dumps(entries))
        self._write()

    def _write(self) -> None:
        for kind, entries in (("images", self.images), ("layers", self.layers)):
            (self.root / f"overlay-{kind}/{kind}.json").write_text(json.dumps(entries))
            (self.root / f"overlay-{kind}/{kind}.lock").touch()
