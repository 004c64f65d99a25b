"""Small operating system images, put into a repository by ``cfsctl``: no code of ours has a hand in them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostimage_testing import tars
from hostimage_testing.layout import Layer, Layout
from hostimage_testing.tools import run
from hostimage_testing.uki import boot_digest, uki

CREATED = "2026-11-01T08:00:00Z"
KVER = "6.12.0"
NO_LINKS: Mapping[str, str] = {}
VERSION_KEY = "org.opencontainers.image.version"


@dataclass(frozen=True)
class Recipe:
    """What an image shall be. ``files`` are added to, or replace, what every image has.

    ``kernel`` and ``initrd`` decide the boot digest: images that have both in common share a kernel.
    ``annotated`` gives the manifest the version annotation that bootc shows; the label is always there.
    ``bound`` are names of images that it is bound to.
    """

    version: str = "1"
    os_id: str = "testos"
    os_version: str | None = None
    kernel: bytes = b"kernel one "
    initrd: bytes = b"initrd one "
    etc: Mapping[str, bytes] = field(default_factory=dict)
    kargs: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    uki: bool = False
    uki_cmdline: str = "rw quiet"
    insecure: bool = True
    annotated: bool = True
    reference: str = "docker://registry.example/os:stable"
    bound: tuple[str, ...] = ()

    @property
    def os_release(self) -> str:
        """Its ``/usr/lib/os-release``."""
        version = self.os_version or self.version
        return f'NAME="Test OS"\nID={self.os_id}\nVERSION_ID={version}\nPRETTY_NAME="Test OS {version}"\n'

    @property
    def linux(self) -> bytes:
        """The kernel, long enough not to be stored inline."""
        return self.kernel * 40

    @property
    def initramfs(self) -> bytes:
        """The initrd."""
        return self.initrd * 60

    @property
    def usr_files(self) -> dict[str, bytes]:
        """The regular files of ``/usr`` by path below it, kernels not among them."""
        files = {
            "lib/os-release": self.os_release.encode(),
            "lib/systemd/system/soft-reboot.target": b"[Unit]\nDescription=Soft reboot\n",
            "bin/tool": f"#!/bin/sh\n# {self.version}\n".encode() * 20,
        }
        if self.kargs:
            listed = ", ".join(f'"{karg}"' for karg in self.kargs)
            files["lib/bootc/kargs.d/10-test.toml"] = f"kargs = [{listed}]\n".encode()
        for at, name in enumerate(self.bound):
            files[f"share/containers/systemd/app{at}.container"] = f"[Container]\nImage={name}\n".encode()
        added = {path[4:]: data for path, data in self.files.items() if path.startswith("usr/")}
        return files | added

    @property
    def links(self) -> dict[str, str]:
        """Symbolic links by path, with what they say."""
        names = [f"app{at}.container" for at, _ in enumerate(self.bound)]
        return {
            f"usr/lib/bootc/bound-images.d/{name}": f"/usr/share/containers/systemd/{name}" for name in names
        }

    @property
    def etc_files(self) -> dict[str, bytes]:
        """The regular files of ``/etc`` by path below it."""
        common = {
            "hostname": b"image\n",
            "os.conf": f"version = {self.version}\n".encode(),
            "service.d/default.conf": b"[Service]\n",
            "containers/policy.json": b'{"default": [{"type": "insecureAcceptAnything"}]}',
            "containers/registries.conf": b"",
            "hostimaged.toml": b'verity = "opportunistic"\n',
        }
        return common | dict(self.etc)


@dataclass(frozen=True)
class OsImage:
    """An image in a repository, and what a boot loader needs of it.

    ``id`` is the deployment id in hex, ``plain_id`` that of the image as pulled. Digests carry their
    algorithm, except ``boot_digest``, which is bare wherever bootc writes it.
    """

    recipe: Recipe
    id: str
    plain_id: str
    manifest_digest: str
    config_digest: str
    manifest: bytes
    config: bytes
    uki: bytes | None
    layout: Path
    tag: str

    @property
    def boot_digest(self) -> str:
        """SHA-256 over kernel and initrd."""
        return boot_digest(self.recipe.linux, self.recipe.initramfs)

    @property
    def imginfo(self) -> bytes:
        """The sidecar that bootc wrote from December 2025 to May 2026."""
        parsed = {"config": json.loads(self.config), "manifest": json.loads(self.manifest)}
        return json.dumps(parsed, separators=(",", ":")).encode()

    @property
    def source(self) -> str:
        """Where it can be pulled from: a layout directory."""
        return f"oci:{self.layout}:{self.tag}"


class ImageMaker:
    """Makes images in ``repository``, which it creates; what it needs besides goes into ``work``.

    ``erofs`` is the format of the repository: 2 for what the older bootc left, and 1.
    """

    def __init__(self, cfsctl: str, repository: Path, work: Path, *, erofs: int = 1) -> None:
        self.repository = repository
        self._cfsctl = cfsctl
        self._erofs = erofs
        self._work = work
        self._layout = Layout(work / "layout")
        repository.parent.mkdir(parents=True, exist_ok=True)
        self._init(repository)
        repository.chmod(0o700)

    def into(self, repository: Path) -> ImageMaker:
        """The same maker for another repository, which is there."""
        other = copy.copy(self)
        other.repository = repository
        return other

    def pull(self, recipe: Recipe) -> OsImage:
        """Make the image and its boot image in the repository; it has no tag there afterwards."""
        tag = f"t{len(self._layout.manifests)}"
        layers = [self._layout.layer(_tar(recipe), "gzip")]
        binary = None
        if recipe.uki:
            binary = self._uki(recipe, layers)
            kernel = {f"boot/EFI/Linux/{KVER}.efi": binary}
            layers.append(self._layout.layer(_tree(kernel, ["boot", "boot/EFI", "boot/EFI/Linux"]), "none"))
        descriptor = self._describe(recipe, layers, tag)
        out = self._pull(self.repository, tag)
        manifest = self._layout.blob_path(descriptor["digest"]).read_bytes()
        config = json.loads(manifest)["config"]["digest"]
        image = OsImage(
            recipe=recipe,
            id=_found(r"Boot image: ([0-9a-f]{128})", out),
            plain_id=self._run(self.repository, "oci", "compute-id", tag).strip(),
            manifest_digest=_found(r"manifest (sha256:[0-9a-f]{64})", out),
            config_digest=config,
            manifest=manifest,
            config=self._layout.blob_path(config).read_bytes(),
            uki=binary,
            layout=self._layout.path,
            tag=tag,
        )
        self._run(self.repository, "oci", "untag", tag)
        return image

    def _uki(self, recipe: Recipe, layers: list[Layer]) -> bytes:
        """A kernel that names the id the image has without it: /boot is not in the boot image."""
        aside = self._work / "aside"
        self._init(aside)
        self._describe(recipe, layers, "aside", kernel_aside=True)
        self._pull(aside, "aside", bootable=False)
        identifier = self._run(aside, "oci", "compute-id", "--bootable", "aside").strip()
        shutil.rmtree(aside)
        self._layout.manifests = [m for m in self._layout.manifests if "aside" not in str(m)]
        mark = "?" if recipe.insecure else ""
        return uki(
            linux=recipe.linux,
            initrd=recipe.initramfs,
            cmdline=f"composefs={mark}{identifier} {recipe.uki_cmdline}",
            osrel=recipe.os_release,
        )

    def _describe(
        self, recipe: Recipe, layers: list[Layer], tag: str, *, kernel_aside: bool = False
    ) -> dict[str, Any]:
        annotations = {VERSION_KEY: recipe.version} if recipe.annotated and not kernel_aside else {}
        return self._layout.image(
            tag,
            layers,
            labels={VERSION_KEY: recipe.version},
            config_extra={"created": CREATED},
            manifest_extra={"annotations": annotations} if annotations else {},
        )

    def _init(self, path: Path) -> None:
        version = str(self._erofs)
        argv = ("init", "--insecure", "--algorithm", "fsverity-sha512-12", "--erofs-version", version, path)
        run(self._cfsctl, *argv)

    def _pull(self, repository: Path, tag: str, *, bootable: bool = True) -> str:
        option = ["--bootable"] if bootable else []
        return self._run(repository, "oci", "pull", *option, f"oci:{self._layout.path}:{tag}", tag)

    def _run(self, repository: Path, *argv: str) -> str:
        return run(self._cfsctl, "--repo", repository, "--insecure", *argv).out


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match.group(1)


def _tar(recipe: Recipe) -> bytes:
    files = {f"usr/{path}": data for path, data in recipe.usr_files.items()}
    files |= {f"etc/{path}": data for path, data in recipe.etc_files.items()}
    # Boot images leave the first out, so that plain and boot image differ.
    files |= {"boot/README": b"kernels are elsewhere\n", "var/lib/seeded": b"by the image\n"}
    if not recipe.uki:
        files[f"usr/lib/modules/{KVER}/vmlinuz"] = recipe.linux
        files[f"usr/lib/modules/{KVER}/initramfs.img"] = recipe.initramfs
    directories = ["boot", "sysroot", "usr", "etc", "var", "usr/lib", "run", "proc"]
    return _tree(files | dict(recipe.files), directories, recipe.links)


def _tree(files: Mapping[str, bytes], directories: list[str], links: Mapping[str, str] = NO_LINKS) -> bytes:
    paths = [*files, *links]
    parents = {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "."}
    names = sorted(parents | set(directories))
    made = [tars.directory(name.encode() + b"/") for name in names]
    made += [tars.file(path.encode(), data) for path, data in sorted(files.items())]
    for path, text in sorted(links.items()):
        made.append(tars.header(path.encode(), kind=b"2", link=text.encode(), mode=0o777))
    return b"".join([*made, tars.END])
