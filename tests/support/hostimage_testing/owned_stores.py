"""The bootc-owned store of a host in a scratch root, filled by the real podman."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostimage_testing import tars
from hostimage_testing.hosts import RecordedHost
from hostimage_testing.os_images import OsImage
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.podman import Podman
from hostimaged.oci.storage.store import StoredImage
from hostimaged.system.paths import HostPaths

DAY = 24 * 3600


@contextmanager
def podman_on(host: RecordedHost) -> Iterator[Podman]:
    """podman on the store of ``host``, which is made."""
    paths = HostPaths.scratch(host.root)
    with tempfile.TemporaryDirectory() as directory:
        owned.ensure(paths, Path(directory), lambda _point: None)
        with owned.podman(paths, Path(directory), lambda: None) as podman:
            yield podman


def stored(host: RecordedHost) -> dict[str, StoredImage]:
    """The images in the store of ``host``, by id."""
    store = owned.open_store(HostPaths.scratch(host.root))
    if store is None:
        return {}
    with store:
        return {image.id: image for image in store.images()}


def names(host: RecordedHost) -> set[str]:
    """Their names."""
    return {name for image in stored(host).values() for name in image.names}


def put(podman: Podman, *called: str, content: bytes = b"") -> str:
    """An image made of nothing but a file; gives its id. It has the names ``called``."""
    data = content or " ".join(called).encode() * 5000
    with tempfile.NamedTemporaryFile() as file:
        file.write(tars.directory(b"app") + tars.file(b"app/data", data) + tars.END)
        file.flush()
        out = podman.run(["import", "--quiet", file.name, called[0]])
    image_id = out.decode().strip().removeprefix("sha256:")
    podman.tag(image_id, *called[1:])
    return image_id


def put_os(podman: Podman, image: OsImage, *called: str) -> str:
    """The image of an operating system, as it came; gives its id."""
    out = podman.run(["pull", "--quiet", image.source])
    image_id = out.decode().split()[-1].removeprefix("sha256:")
    assert f"sha256:{image_id}" == image.config_digest
    podman.run(["untag", image_id])
    podman.tag(image_id, *called)
    return image_id


def age_images(host: RecordedHost, seconds: float = 2 * DAY) -> None:
    """Let all images in the store have been there for so long."""
    then = time.time() - seconds
    for place in (HostPaths.scratch(host.root).store / "overlay-images").iterdir():
        if place.is_dir():
            os.utime(place, (then, then))


def used_by_store(host: RecordedHost) -> int:
    """Bytes in the blocks of layers and images."""
    seen = set()
    total = 0
    root = HostPaths.scratch(host.root).store
    for top in ("overlay", "overlay-images"):
        for path in (root / top).glob("*/**/*"):
            status = path.lstat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total
