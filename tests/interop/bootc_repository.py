"""Images in a composefs repository as composefs-rs opens them. Part of ``bootc_model``."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from bootc_formats import Refused, read_bytes


@dataclass(frozen=True)
class Stored:
    """An image in the repository: manifest and configuration."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    image_ids: frozenset[str]
    plain_ids: frozenset[str]


def open_image(repository: Path, manifest_digest: str) -> Stored:
    """The image of a manifest digest, opened as composefs-rs opens it without a stream id."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", manifest_digest):
        raise Refused(f"Parsing manifest digest {manifest_digest}")
    raw, names = _read_stream(repository, f"oci-manifest-{manifest_digest}", b"ocimanif")
    if hashlib.sha256(raw).hexdigest() != manifest_digest.removeprefix("sha256:"):
        raise Refused(f"manifest integrity of {manifest_digest}")
    manifest = json.loads(raw)
    config_id = names.get("config:" + manifest["config"]["digest"])
    if config_id is None:
        raise Refused(f"manifest {manifest_digest} does not refer to its config")
    path = repository / "objects" / config_id[:2] / config_id[2:]
    raw_config, config_names = _parse_stream(repository, read_bytes(path), b"ociconfg")
    images = {name: value for name, value in config_names.items() if name.startswith("composefs.image")}
    plain = {value for name, value in images.items() if not name.startswith("composefs.image.boot")}
    return Stored(manifest, json.loads(raw_config), frozenset(images.values()), frozenset(plain))


def _read_stream(repository: Path, name: str, kind: bytes) -> tuple[bytes, dict[str, str]]:
    return _parse_stream(repository, read_bytes(repository / "streams" / name), kind)


def _parse_stream(repository: Path, data: bytes, kind: bytes) -> tuple[bytes, dict[str, str]]:
    """Content of the one external object of a splitstream, and its named references by hex id."""
    try:
        if data[:11] != b"SplitStream" or data[14] != 2:
            raise Refused("invalid splitstream")
        start, end = struct.unpack_from("<QQ", data, 16)
        info = data[start:end]
        ranges = [struct.unpack_from("<QQ", info, 16 * n) for n in range(4)]
        streams, objects, _, named = (data[a:b] for a, b in ranges)
        if info[64:72] != kind or len(objects) != 64:
            raise Refused("not the expected kind of splitstream")
        text = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(named)).read()
    except (struct.error, zstandard.ZstdError, IndexError) as error:
        raise Refused(f"invalid splitstream: {error}") from error
    ids = [streams[n : n + 64].hex() for n in range(0, len(streams), 64)]
    pairs = (record.decode().split(":", 1) for record in text.split(b"\0") if record)
    external = objects.hex()
    content = read_bytes(repository / "objects" / external[:2] / external[2:])
    return content, {name: ids[int(index)] for index, name in pairs}
