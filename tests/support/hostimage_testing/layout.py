"""Builds OCI image layouts from tar files, streaming, with any mix of compressions."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A layer blob in a layout."""

    descriptor: dict[str, Any]
    diff_id: str


class _HashingFile:
    """A binary file that counts and hashes what is written to it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._raw.write(data)

    def flush(self) -> None:
        self._raw.flush()


def file_chunks(path: Path) -> Iterator[bytes]:
    """Contents of ``path`` in pieces."""
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            yield data


def _compressor(compression: str, out: _HashingFile, level: int | None) -> tuple[Any, Callable[[], object]]:
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6 if level is None else level, mtime=0)
        return stream, stream.close
    if compression == "zstd":
        writer = zstandard.ZstdCompressor(level=3 if level is None else level).stream_writer(
            out, closefd=False
        )
        return writer, writer.close
    if compression == "none":
        return out, lambda: None
    raise ValueError(compression)


@dataclass
class Layout:
    """An ``oci:`` directory under construction at ``path``."""

    path: Path
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self._write_index()

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Store ``data``; returns its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def blob_path(self, digest: str) -> Path:
        """File of the blob ``digest``."""
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def layer(
        self, tar: bytes | Iterable[bytes], compression: str = "gzip", level: int | None = None
    ) -> Layer:
        """Store a tar as a layer blob, compressed by ``gzip``, ``zstd`` or ``none``."""
        diff = hashlib.sha256()
        temporary = self.path / f"blobs/.tmp-{os.getpid()}-{id(tar)}"
        with temporary.open("wb") as raw:
            out = _HashingFile(raw)
            stream, finish = _compressor(compression, out, level)
            for chunk in [tar] if isinstance(tar, bytes) else tar:
                diff.update(chunk)
                stream.write(chunk)
            finish()
        digest = out.sha256.hexdigest()
        temporary.rename(self.path / "blobs/sha256" / digest)
        suffix = "" if compression == "none" else f"+{compression}"
        descriptor = {"mediaType": LAYER_TYPE + suffix, "digest": f"sha256:{digest}", "size": out.size}
        return Layer(descriptor, f"sha256:{diff.hexdigest()}")

    def image(
        self,
        tag: str | None,
        layers: list[Layer],
        *,
        labels: dict[str, str] | None = None,
        config_extra: dict[str, Any] | None = None,
        manifest_extra: dict[str, Any] | None = None,
        listed: bool = True,
    ) -> dict[str, Any]:
        """Store config and manifest of an image made of ``layers``; returns the manifest's descriptor."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": labels or {}},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        } | (config_extra or {})
        config_descriptor = self.blob(json.dumps(config).encode(), CONFIG_TYPE)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config_descriptor,
            "layers": [layer.descriptor for layer in layers],
        } | (manifest_extra or {})
        descriptor = self.blob(json.dumps(manifest).encode(), MANIFEST_TYPE)
        return self.add(descriptor, tag) if listed else descriptor

    def add(self, descriptor: dict[str, Any], tag: str | None) -> dict[str, Any]:
        """List ``descriptor`` in index.json under ``tag``, replacing an entry of that tag."""
        key = "org.opencontainers.image.ref.name"
        if tag is not None:
            descriptor = descriptor | {"annotations": {key: tag}}
            self.manifests = [m for m in self.manifests if m.get("annotations", {}).get(key) != tag]
        self.manifests.append(descriptor)
        self._write_index()
        return descriptor

    def _write_index(self) -> None:
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(index))
