"""Disks of other boot loaders, made from what the first one was made from, and images that go with them.

``Workshop.images`` holds what its base holds, and besides: ``u1`` and ``u2``, which are ``v1`` and ``v2``
with a unified kernel image, and ``soft``, which differs from ``v1`` in files alone, so that a soft reboot
reaches it. No code of ours computes the ids that the kernel images name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hostimage_testing import boot_programs, installed, loaders, tars
from hostimage_testing.bootable import CREATED, TRACKED
from hostimage_testing.installed import Installed
from hostimage_testing.layout import Layer, Layout
from hostimage_testing.loaders import Loader
from hostimage_testing.tools import require, run

#: The image that a soft reboot reaches from ``v1``; its version is another one.
SOFT, SOFT_VERSION = "soft", "v1.1"
_ARGUMENTS = "root=PARTLABEL=root rw console=ttyS0 panic=-1 systemd.show_status=1"
_TAG = "latest"


class Workshop:
    """Makes disks when they are asked for; works below ``directory`` and keeps them in ``cache``."""

    def __init__(self, base: Installed, directory: Path, cache: Path) -> None:
        self._base = base
        self._directory = directory
        self._tools = cache
        self._kept = cache / f"loaders-{self._content()}"
        if not self._kept.exists():
            for old in cache.glob("loaders-*"):
                shutil.rmtree(old)
            self._kept.mkdir(parents=True)

    def _content(self) -> str:
        digest = hashlib.sha256(self._base.disk.parent.name.encode())
        for module in (__file__, boot_programs.__file__, loaders.__file__, installed.__file__):
            digest.update(Path(module).read_bytes())
        status = self._base.images.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def disk(self, loader: Loader) -> Installed:
        """A disk with ``v1`` and this boot loader; it follows ``TRACKED``, not the registry."""
        disk = self._kept / f"{loader.name}.qcow2"
        if not disk.exists():
            partial = self._directory / disk.name
            root, script = self._root, installed.installer(loader, TRACKED)
            modules = _modules(root)
            kernel, initrd = modules / "vmlinuz", modules / "initramfs.img"
            installed.install(script, root, kernel, initrd, self.images, partial, self._directory)
            shutil.move(partial, disk)
        return replace(self._base, disk=disk, images=self.images)

    @cached_property
    def images(self) -> Path:
        """The file system with the layouts of all images."""
        image = self._kept / "images.img"
        if not image.exists():
            _add_images(self._layouts, self._root, self._directory, self._tools)
            partial = self._directory / image.name
            installed.file_system(self._layouts, partial, "1G")
            shutil.move(partial, image)
        return image

    @cached_property
    def _layouts(self) -> Path:
        """The layouts of the base, copied out of its file system."""
        directory = self._directory / "layouts"
        directory.mkdir()
        # Not mounted: that takes a kernel with fs-verity.
        dump = f"rdump / {directory}"
        subprocess.run([require("debugfs"), "-R", dump, self._base.images], check=True, capture_output=True)
        return directory

    @cached_property
    def _root(self) -> Path:
        """The tree of ``v1``, with programs for boot loaders besides."""
        root = self._directory / "root"
        root.mkdir()
        (layer,) = _image(self._layouts / "v1")[0]
        blob = _blob(self._layouts, layer.descriptor["digest"])
        argv = [
            "tar",
            "-C",
            root,
            "--zstd",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "-xpf",
            blob,
        ]
        subprocess.run(argv, check=True)
        programs = root / loaders.PROGRAMS
        programs.mkdir()
        for grub in loaders.GRUBS:
            shutil.move(boot_programs.grub(grub, self._directory, self._tools), programs)
        return root


def _add_images(layouts: Path, root: Path, directory: Path, cache: Path) -> None:
    shared = Layout(layouts / "shared")
    base, _ = _image(layouts / "v1")
    changed = tars.file(b"usr/share/version", f"{SOFT_VERSION}\n".encode(), mode=0o644)
    changed += tars.file(b"etc/image-setting", f"of {SOFT_VERSION}\n".encode(), mode=0o644)
    _write(shared, SOFT, SOFT_VERSION, CREATED["v1"], [*base, shared.layer(changed + tars.END)])
    modules = _modules(root)
    os_release = (root / "usr/lib/os-release").read_bytes()
    ukify = boot_programs.Ukify(directory, cache, modules / "vmlinuz", modules / "initramfs.img", os_release)
    for version in ("v1", "v2"):
        layers, _ = _image(layouts / version)
        identifier = _boot_id(shared, layers, directory)
        arguments = f"{_ARGUMENTS} hostimage.version={version} composefs={identifier}"
        unified = [
            *(tars.directory(name) for name in (b"boot/", b"boot/EFI/", b"boot/EFI/Linux/")),
            tars.file(b"boot/EFI/Linux/os.efi", ukify.build(arguments), mode=0o644),
            tars.END,
        ]
        name = version.replace("v", "u", 1)
        _write(shared, name, version, CREATED[version], [*layers, shared.layer(b"".join(unified), "none")])
    ukify.remove()


def _boot_id(shared: Layout, layers: Sequence[Layer], directory: Path) -> str:
    """The id that an image has without a kernel image in its /boot, as ``cfsctl`` computes it."""
    shared.manifests.clear()
    shared.image("aside", list(layers))
    cfsctl, repository = require("cfsctl"), directory / "aside"
    init = ("init", "--insecure", "--algorithm", "fsverity-sha512-12", "--erofs-version", "1", repository)
    run(cfsctl, *init)
    opened = (cfsctl, "--repo", repository, "--insecure", "oci")
    run(*opened, "pull", f"oci:{shared.path}:aside", "aside", timeout=1200)
    found = run(*opened, "compute-id", "--bootable", "aside").out.strip()
    shutil.rmtree(repository)
    return found


def _write(shared: Layout, name: str, version: str, created: str, layers: list[Layer]) -> None:
    """Blobs go where all are; the directory ``name`` has its own index."""
    shared.manifests.clear()
    labels = {"org.opencontainers.image.version": version}
    shared.image(_TAG, layers, labels=labels, config_extra={"created": created})
    directory = shared.path.with_name(name)
    directory.mkdir()
    (directory / "blobs").symlink_to("../shared/blobs")
    for file in ("oci-layout", "index.json"):
        shutil.copy(shared.path / file, directory)


def _image(layout: Path) -> tuple[list[Layer], dict[str, Any]]:
    """The layers of the only image in a layout, and its manifest."""
    (listed,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads((layout / "blobs/sha256" / listed["digest"].removeprefix("sha256:")).read_text())
    config = manifest["config"]["digest"].removeprefix("sha256:")
    parsed = json.loads((layout / "blobs/sha256" / config).read_text())
    found = zip(manifest["layers"], parsed["rootfs"]["diff_ids"], strict=True)
    return [Layer(descriptor, diff_id) for descriptor, diff_id in found], manifest


def _blob(layouts: Path, digest: str) -> Path:
    return layouts / "shared/blobs/sha256" / digest.removeprefix("sha256:")


def _modules(root: Path) -> Path:
    (modules,) = (root / "usr/lib/modules").iterdir()
    return modules
