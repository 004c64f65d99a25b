"""An image that is ``v1`` with podman in it, whose containers see the storage of the host besides."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hostimage_testing import successors, tars
from hostimage_testing.debian_root import bootstrap, unpack
from hostimage_testing.tools import require

PACKAGES = ("podman", "crun")
VERSION = "with-podman"
#: Where bootc's images look for it.
STORE_LINK = "usr/lib/bootc/storage"
_TEXTS = {
    b"usr/share/version": f"{VERSION}\n",
    b"usr/lib/bootc/kargs.d/10-test.toml": f'kargs = ["hostimage.version={VERSION}"]\n',
    b"etc/containers/storage.conf": (
        '[storage]\ndriver = "overlay"\ngraphroot = "/var/lib/containers/storage"\n'
        'runroot = "/run/containers/storage"\n[storage.options]\n'
        f'additionalimagestores = ["/{STORE_LINK}"]\n'
    ),
}


def make(layouts: Path, directory: Path, cache: Path) -> Path:
    """Make the layout below ``directory``; ``layouts`` has that of ``v1``, Debian's part is in ``cache``."""
    packages = cache / "podman.tar"
    if not packages.exists():
        bootstrap(packages, PACKAGES, variant="extract")
    layout, base = successors.on_top_of_v1(layouts, directory / VERSION)
    unpacked = directory / "unpacked"
    unpack(packages, unpacked)
    _remove(unpacked, _names(layout.blob_path(base.descriptor["digest"])))
    link = unpacked / STORE_LINK
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/sysroot/ostree/bootc/storage")
    tar = ["tar", "-C", unpacked, "--numeric-owner", "--sort=name", "-cf", "-", "usr", "etc"]
    added = subprocess.run(tar, check=True, capture_output=True).stdout
    shutil.rmtree(unpacked)
    own = b"".join(tars.file(path, text.encode(), mode=0o644) for path, text in _TEXTS.items()) + tars.END
    layout.image(
        "latest",
        [base, layout.layer(added, "zstd", 1), layout.layer(own)],
        labels={"org.opencontainers.image.version": VERSION},
        config_extra={"created": "2026-11-09T08:00:00Z"},
    )
    return layout.path


def _names(layer: Path) -> set[str]:
    """Paths in a compressed layer."""
    listed = subprocess.run([require("tar"), "--zstd", "-tf", layer], check=True, capture_output=True)
    return {line.removeprefix("./").rstrip("/") for line in listed.stdout.decode().splitlines()}


def _remove(root: Path, names: set[str]) -> None:
    """Remove the files at ``names``, which the layer below has already."""
    for path in sorted(root.rglob("*"), reverse=True):
        if str(path.relative_to(root)) in names and (path.is_symlink() or not path.is_dir()):
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
