"""An image that is ``v1`` with an initramfs of dracut, which has systemd in it, by our dracut module."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hostimage_testing import successors, tars
from hostimage_testing.debian_root import bootstrap, in_root, unpack
from hostimage_testing.tools import require

PACKAGES = ("dracut-core",)
VERSION = "with-dracut"
_MADE = "run/initramfs.img"


def make(layouts: Path, directory: Path, cache: Path) -> Path:
    """Make the layout below ``directory``; ``layouts`` has that of ``v1``, Debian's part is in ``cache``."""
    packages = cache / "dracut.tar"
    if not packages.exists():
        bootstrap(packages, PACKAGES, variant="extract")
    layout, base = successors.on_top_of_v1(layouts, directory / VERSION)
    root = directory / "unpacked"
    unpack(packages, root)
    # Over it what the image has: the two are of one distribution.
    unpack_layer = [require("tar"), "--zstd", "-C", root, "--numeric-owner", "--keep-directory-symlink"]
    blob = layout.blob_path(base.descriptor["digest"])
    subprocess.run([*unpack_layer, "-xpf", blob], check=True)
    (release,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    path = f"usr/lib/modules/{release}/initramfs.img".encode()
    own = tars.file(path, _initramfs(root, release), mode=0o644)
    own += tars.file(b"usr/share/version", f"{VERSION}\n".encode(), mode=0o644)
    argument = f'kargs = ["hostimage.version={VERSION}"]\n'
    own += tars.file(b"usr/lib/bootc/kargs.d/10-test.toml", argument.encode(), mode=0o644)
    shutil.rmtree(root)
    layout.image(
        "latest",
        [base, layout.layer(own + tars.END)],
        labels={"org.opencontainers.image.version": VERSION},
        config_extra={"created": "2026-11-09T08:00:00Z"},
    )
    return layout.path


def _initramfs(root: Path, release: str) -> bytes:
    """Made as image builders do, in hostonly mode: nothing of the machine that does it may count."""
    for name in ("dev", "proc", "sys", "run", "tmp"):
        (root / name).mkdir(exist_ok=True)
    drivers = "virtio_pci virtio_blk ext4"
    options = ["--force", "--hostonly", "--no-hostonly-cmdline", "--no-hostonly-default-device"]
    options += ["--add", "hostimaged", "--force-drivers", drivers, "--kver", release, "--tmpdir", "/tmp"]
    in_root(root, "dracut", *options, f"/{_MADE}")
    return (root / _MADE).read_bytes()
