"""Images that follow one another without end, for guests that are updated again and again.

Each is ``v1`` with files of its own, so that each has something to be fetched and, later, to be collected.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hostimage_testing import tars
from hostimage_testing.layout import Layer, Layout

_FILES = 150
_SIZES = (100, 60_000)


def version(number: int) -> str:
    """What the image is called, on its label and in /usr/share/version."""
    return f"successor-{number}"


def make(layouts: Path, directory: Path, number: int) -> Path:
    """Make the layout of an image below ``directory``; ``layouts`` has that of ``v1``."""
    layout, base = on_top_of_v1(layouts, directory / version(number))
    created = f"2026-11-10T{number // 60:02}:{number % 60:02}:00Z"
    labels = {"org.opencontainers.image.version": version(number)}
    own = layout.layer(_changes(number), "zstd", 1)
    layout.image("latest", [base, own], labels=labels, config_extra={"created": created})
    return layout.path


def on_top_of_v1(layouts: Path, path: Path) -> tuple[Layout, Layer]:
    """A new layout at ``path`` without images, that has the layer of ``v1``."""
    base = _only_layer(layouts / "v1")
    layout = Layout(path)
    digest = base.descriptor["digest"]
    layout.blob_path(digest).symlink_to((layouts / "v1/blobs/sha256" / digest.split(":")[1]).resolve())
    return layout, base


def _only_layer(layout: Path) -> Layer:
    def blob(digest: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((layout / "blobs/sha256" / digest.split(":")[1]).read_bytes())
        return found

    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifest = blob(entry["digest"])
    config = blob(manifest["config"]["digest"])
    (descriptor,), (diff_id,) = manifest["layers"], config["rootfs"]["diff_ids"]
    return Layer(descriptor, diff_id)


def _changes(number: int) -> bytes:
    seeded = random.Random(number)
    name = version(number)
    argument = f'kargs = ["hostimage.version={name}"]\n'
    texts = {
        b"usr/share/version": f"{name}\n",
        b"etc/image-setting": f"of {name}\n",
        b"usr/lib/bootc/kargs.d/10-test.toml": argument,
    }
    parts = [tars.file(path, text.encode(), mode=0o644) for path, text in texts.items()]
    for file in range(_FILES):
        data = seeded.randbytes(seeded.randrange(*_SIZES))
        parts.append(tars.file(b"usr/share/successor.%d" % file, data, mode=0o644))
    return b"".join(parts) + tars.END
