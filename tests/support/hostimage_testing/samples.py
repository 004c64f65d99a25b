"""Small images that nothing is wrong with, how to damage them, and how skopeo copies them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hostimage_testing import tars
from hostimage_testing.layout import Layout
from hostimage_testing.tools import run

#: A layer that is a whole small root.
BASE = (
    tars.directory(b"usr", mtime=7)
    + tars.directory(b"usr/bin")
    + tars.file(b"usr/bin/tool", b"#!/bin/sh\n" * 2000, mode=0o755)
    + tars.file(b"usr/small", b"inline")
    + tars.directory(b"run")
    + tars.END
)


def more(name: bytes, size: int = 100_000) -> bytes:
    """A layer with one file of about ``size`` bytes in /usr."""
    return tars.file(b"usr/" + name, hashlib.sha256(name).digest() * (size // 32)) + tars.END


def three_layers(layout: Layout, tag: str = "v1", **kwargs: Any) -> dict[str, Any]:
    """An image of a root, a large file and a small one, each layer compressed in another way."""
    layers = [
        layout.layer(BASE, "gzip"),
        layout.layer(more(b"a"), "zstd"),
        layout.layer(more(b"b", 64), "none"),
    ]
    return layout.image(tag, layers, labels={"org.opencontainers.image.version": "1.2"}, **kwargs)


def flip(path: Path, at: int = -9) -> None:
    """Change a bit of the byte ``at``."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def copy(skopeo: str, source: str, target: str, *options: str) -> None:
    """Copy an image from one place to another, unverified; ``options`` are those of ``skopeo copy``."""
    run(skopeo, "copy", "-q", "--insecure-policy", "--dest-tls-verify=false", *options, source, target)
