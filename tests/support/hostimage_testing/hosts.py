"""Hosts as bootc leaves them, in a scratch root: from a description of its state, and from its source.

``RecordedHost`` writes each fact by itself, so that any of them can be left out or be wrong; ``lives.py``
puts them together. Nothing of hostimaged writes here.

The root is laid out as ``--root DIR`` wants it: ``sysroot`` is the physical root, ``boot`` GRUB's directory,
``efi`` the ESP, ``run`` and ``proc`` hold the facts of the running system. ``etc`` is a link to the booted
deployment's own directory, as the bind mount makes it on a real host.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from hostimage_testing import firmware
from hostimage_testing.os_images import ImageMaker, OsImage, Recipe

PREFIX = "bootc_composefs-"
ESP_UUID = "7D3A-91C4"
USER_CFG_HEAD = (
    "\nif [ -f ${config_directory}/efiuuid.cfg ]; then\n        source ${config_directory}/efiuuid.cfg\nfi\n"
)
LOADER_INFO = "LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
OPTIONS = ("root=UUID=8d1c46c4-6b5c-4a0a-9bdb-3e3b3b0f6d6f", "rw", "console=ttyS0")


class Loader(StrEnum):
    """A boot loader, by its name in bootc's status."""

    GRUB = "grub"
    SYSTEMD = "systemd"
    GRUB_CC = "grub-cc"


class Era(StrEnum):
    """What bootc kept beside a deployment.

    ``BARE`` until December 2025: the origin alone; ``SIDECAR`` until May 2026: manifest and config in
    ``.imginfo``; ``CURRENT``: the manifest digest in the origin, and a tag in the repository.
    """

    BARE = "bare"
    SIDECAR = "sidecar"
    CURRENT = "current"


@dataclass(frozen=True)
class Kind:
    """A loader and what it starts."""

    loader: Loader
    uki: bool = False

    def __str__(self) -> str:
        return f"{self.loader}-{self.boot_type}"

    @property
    def boot_type(self) -> str:
        """As the origin writes it."""
        return "uki" if self.uki else "bls"

    @property
    def classic(self) -> bool:
        """Whether this is ordinary GRUB, which keeps its menu beside the kernels."""
        return self.loader is Loader.GRUB


KINDS = (
    Kind(Loader.GRUB),
    Kind(Loader.GRUB, uki=True),
    Kind(Loader.SYSTEMD),
    Kind(Loader.SYSTEMD, uki=True),
    Kind(Loader.GRUB_CC),
)


@dataclass(frozen=True)
class Deployment:
    """An image with its place on the boot file system.

    ``artifact`` is the id its kernel is named after (another's where a kernel is shared).
    """

    image: OsImage
    artifact: str
    prefix: str
    options: tuple[str, ...]

    @property
    def id(self) -> str:
        """The deployment id in hex."""
        return self.image.id


class BootFailed(Exception):
    """The machine would not come up: what the loader or the initramfs misses."""


class RecordedHost:
    """A host below ``root`` whose facts are written one by one. Defaults are those of ``era``."""

    def __init__(
        self,
        root: Path,
        cfsctl: str,
        *,
        kind: Kind = KINDS[2],
        era: Era = Era.CURRENT,
        insecure: bool = True,
        separate_boot: bool = False,
    ) -> None:
        self.root = root
        self.kind = kind
        self.era = era
        self.insecure = insecure
        self.separate_boot = separate_boot
        self.images: dict[str, OsImage] = {}
        self.sysroot = root / "sysroot"
        self.repository = self.sysroot / "composefs"
        self.maker = ImageMaker(
            cfsctl,
            self.repository,
            root.with_name(root.name + "-work"),
            erofs=1 if era is Era.CURRENT else 2,
        )
        self._make_root()

    def copy(self, root: Path) -> RecordedHost:
        """The same host at another place. Images made for either come from the same layout.

        Directories may be there already, as those that file systems are mounted on.
        """
        shutil.copytree(self.root, root, symlinks=True, dirs_exist_ok=True)
        other = copy.copy(self)
        other.root, other.sysroot, other.images = root, root / "sysroot", dict(self.images)
        other.repository = other.sysroot / "composefs"
        other.maker = self.maker.into(other.repository)
        return other

    # Places

    @property
    def boot_dir(self) -> Path:
        """The directory that holds the loader's menu."""
        return self.root / ("boot" if self.kind.classic else "efi")

    @property
    def bin_dir(self) -> Path:
        """Where kernels of type 1 are."""
        return self.root / ("boot" if self.kind.classic else "efi/EFI/Linux")

    @property
    def uki_dir(self) -> Path:
        """Where unified kernels are."""
        return self.root / "efi/EFI/Linux/bootc"

    @property
    def entries(self) -> Path:
        """The live set: a directory, or ``user.cfg``."""
        return self.boot_dir / ("grub2/user.cfg" if self._user_cfg else "loader/entries")

    @property
    def entries_staged(self) -> Path:
        """The staged set: a directory, or ``user.cfg.staged``."""
        return self.entries.with_name(self.entries.name + ".staged")

    @property
    def marker(self) -> Path:
        """The staged marker."""
        return self.root / "run/composefs/staged-deployment"

    def state(self, deployment: Deployment | str) -> Path:
        """The state directory of a deployment."""
        return self.sysroot / "state/deploy" / _id(deployment)

    def origin(self, deployment: Deployment | str) -> Path:
        """Its origin."""
        return self.state(deployment) / f"{_id(deployment)}.origin"

    def imginfo(self, deployment: Deployment | str) -> Path:
        """Its sidecar."""
        return self.state(deployment) / f"{_id(deployment)}.imginfo"

    def tag(self, image: OsImage, prefix: str = "localhost/bootc-") -> Path:
        """The tag of an image's manifest, as a link in the repository."""
        name = (prefix + image.manifest_digest).replace("%", "%25").replace("/", "%2F")
        return self.repository / "streams/refs/oci" / name

    def stream(self, kind: str, digest: str) -> Path:
        """A stream of the repository: ``manifest`` or ``config`` of an image, by digest."""
        return self.repository / f"streams/oci-{kind}-{digest}"

    # Content

    def image(self, recipe: Recipe | None = None) -> OsImage:
        """Pull an image of the host's boot type into its repository; no tag is left."""
        wanted = replace(recipe or Recipe(), uki=self.kind.uki, insecure=self.insecure)
        image = self.maker.pull(wanted)
        self.images[image.id] = image
        if self.era is Era.BARE:
            # Manifests were not kept at all.
            self.stream("manifest", image.manifest_digest).unlink()
        return image

    def write_tag(self, image: OsImage, prefix: str = "localhost/bootc-") -> Path:
        """Tag an image; the link is dangling where the manifest is not kept."""
        link = self.tag(image, prefix)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../oci-manifest-{image.manifest_digest}")
        return link

    # Deployments

    def deploy(
        self,
        image: OsImage,
        *,
        options: Iterable[str] = OPTIONS,
        share: Deployment | None = None,
        prefixed: bool | None = None,
        tagged: bool | None = None,
    ) -> Deployment:
        """Everything of a deployment but its entries: kernel, state directory, origin, sidecar, tag."""
        prefix = PREFIX if (self.era is not Era.BARE if prefixed is None else prefixed) else ""
        argument = f"composefs={'?' if self.insecure else ''}{image.id}"
        deployment = Deployment(
            image,
            artifact=share.artifact if share else image.id,
            prefix=share.prefix if share else prefix,
            options=(*options, argument, *image.recipe.kargs),
        )
        if share is None:
            self.write_artifact(deployment)
        self.write_state(deployment)
        if self.era is Era.CURRENT if tagged is None else tagged:
            self.write_tag(image)
        return deployment

    def write_artifact(self, deployment: Deployment) -> None:
        """The kernel, packed in one file or not."""
        if deployment.image.uki is not None:
            self.uki_dir.mkdir(parents=True, exist_ok=True)
            self.artifact(deployment).write_bytes(deployment.image.uki)
            return
        directory = self.artifact(deployment)
        directory.mkdir(parents=True)
        (directory / "vmlinuz").write_bytes(deployment.image.recipe.linux)
        (directory / "initrd").write_bytes(deployment.image.recipe.initramfs)

    def artifact(self, deployment: Deployment) -> Path:
        """The kernel directory or file of a deployment."""
        name = deployment.prefix + deployment.artifact
        return self.uki_dir / f"{name}.efi" if self.kind.uki else self.bin_dir / name

    def write_state(self, deployment: Deployment) -> None:
        """The state directory with what the era keeps in it."""
        state = self.state(deployment)
        (state / "etc").mkdir(parents=True)
        (state / "var").symlink_to("../../os/default/var")
        for path, data in deployment.image.recipe.etc_files.items():
            file = state / "etc" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        self.write_origin(deployment)
        if self.era is Era.SIDECAR:
            self.imginfo(deployment).write_bytes(deployment.image.imginfo)

    def write_origin(
        self,
        deployment: Deployment,
        *,
        reference: str | None = None,
        boot_type: str | None = None,
        boot_digest: bool | None = None,
        manifest_digest: bool | None = None,
        newline: bool = False,
    ) -> None:
        """The origin to the byte; ``boot_digest`` and ``manifest_digest`` say whether it has them."""
        image = deployment.image
        has_digest = not (self.kind.uki and self.era is Era.BARE) if boot_digest is None else boot_digest
        boot = [f"boot_type = {boot_type or self.kind.boot_type}"]
        boot += [f"digest = {image.boot_digest}"] if has_digest else []
        origin = reference or f"ostree-unverified-image:{image.recipe.reference}"
        text = f"[origin]\ncontainer-image-reference = {origin}\n\n[boot]\n" + "\n".join(boot)
        if self.era is Era.CURRENT if manifest_digest is None else manifest_digest:
            text += f"\n\n[image]\nmanifest_digest = {image.manifest_digest}"
        self.origin(deployment).write_text(text + ("\n" if newline else ""))

    # Entries

    def live(self, *deployments: Deployment, os_id: str | None = None) -> None:
        """Write the live set, in menu order: the first is what boots next."""
        self._write_set(self.entries, deployments, os_id)

    def staged(self, *deployments: Deployment, os_id: str | None = None) -> None:
        """Write the staged set, in menu order."""
        self._write_set(self.entries_staged, deployments, os_id)

    def conf(self, deployment: Deployment, priority: int, os_id: str | None = None) -> tuple[str, str]:
        """File name and text of the entry that has place ``priority`` (0 is the first) in the menu."""
        recipe = deployment.image.recipe
        version = recipe.os_version or recipe.version
        identity = os_id or recipe.os_id
        title = f"Test OS {version}"
        lines = [f"title {title}{f' {version}' if self.kind.uki else ''}", f"version {version}"]
        if self.kind.uki:
            lines.append(f"efi /EFI/Linux/bootc/{deployment.prefix}{deployment.artifact}.efi")
        else:
            place = f"{self.path_prefix}/{deployment.prefix}{deployment.artifact}"
            lines += [f"linux {place}/vmlinuz", f"initrd {place}/initrd"]
            lines.append("options " + " ".join(deployment.options))
        lines.append(f"sort-key bootc-{identity}-{priority}")
        name = f"bootc_{identity.replace('-', '_')}-{version}-{max(0, 1 - priority)}.conf"
        return name, "\n".join(lines) + "\n"

    @property
    def path_prefix(self) -> str:
        """What stands before a kernel directory in an entry."""
        if not self.kind.classic:
            return "/EFI/Linux"
        return "" if self.separate_boot else "/boot"

    def menu_entry(self, deployment: Deployment) -> str:
        """One entry of ``user.cfg``."""
        recipe = deployment.image.recipe
        version = recipe.os_version or recipe.version
        return (
            f'menuentry "Test OS {version} {version}: ({deployment.id})" {{\n'
            "insmod fat\ninsmod chain\n"
            'search --no-floppy --set=root --fs-uuid "${EFI_PART_UUID}"\n'
            f"chainloader /EFI/Linux/bootc/{deployment.prefix}{deployment.artifact}.efi\n"
            "}\n"
        )

    def discard_staged(self) -> None:
        """Remove the staged set."""
        if self.entries_staged.is_dir():
            shutil.rmtree(self.entries_staged)
        else:
            self.entries_staged.unlink()

    def _write_set(self, place: Path, deployments: Sequence[Deployment], os_id: str | None) -> None:
        if self._user_cfg:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(USER_CFG_HEAD + "".join(self.menu_entry(d) for d in deployments))
            return
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        # Both entries take the os id of the newest image, which is the first.
        identity = os_id or deployments[0].image.recipe.os_id
        for position, deployment in enumerate(deployments):
            name, text = self.conf(deployment, position, identity)
            (place / name).write_text(text)

    def mark(self, deployment: Deployment, *, locked: bool = False, plain: bool | None = None) -> None:
        """Write the staged marker; ``plain`` is the form that bootc wrote before January 2026."""
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        if self.era is Era.BARE if plain is None else plain:
            self.marker.write_text(deployment.id)
            return
        content = {"depl_id": deployment.id, "finalization_locked": locked}
        self.marker.write_text(json.dumps(content, separators=(",", ":")))

    # The running system

    def booted(
        self, deployment: Deployment, *, soft_from: Deployment | None = None, transient: bool = False
    ) -> None:
        """Make ``deployment`` the booted one; ``soft_from`` is what the kernel itself was started for."""
        kernel = soft_from or deployment
        arguments = _uki_arguments(kernel.image) if self.kind.uki else kernel.options
        source = ("transient:composefs=" if transient else "composefs:") + deployment.id
        _write(self.root / "proc/cmdline", " ".join(arguments) + "\n")
        _write(self.root / "proc/self/mountinfo", self._mountinfo(source, deployment.id))
        if soft_from is None:
            _write(self.root / "proc/sys/kernel/random/boot_id", f"{uuid.uuid4()}\n")
        self._link_etc(deployment)
        self._write_usr(deployment.image)

    def reboot(self) -> str:
        """Start the machine anew from its own menu; returns the id that came up.

        ``/run`` is empty afterwards. Raises ``BootFailed`` where the loader or the initramfs would stop.
        """
        line = self.menu()[0]
        image = self.startable(line)
        shutil.rmtree(self.root / "run", ignore_errors=True)
        (self.root / "run").mkdir()
        options = tuple((line.get("options") or "").split())
        self.booted(Deployment(image, image.id, PREFIX, options))
        return image.id

    def startable(self, line: firmware.MenuLine) -> OsImage:
        """The image that a line of the menu starts; raises ``BootFailed`` where it would not."""
        # Of a shared kernel the path has the id of another deployment.
        named = re.search(r"composefs=\??([0-9a-f]{128})", line.get("options") or "")
        wanted = named.group(1) if named else line.text
        image = next((image for identifier, image in self.images.items() if identifier in wanted), None)
        if image is None:
            raise BootFailed(f"no known image in entry {line.name}: {line.text}")
        self._check_kernel(line, image)
        for needed in (self.repository / "images" / image.id, self.state(image.id) / "etc"):
            if not needed.exists():
                raise BootFailed(f"the initramfs does not find {needed}")
        return image

    def menu(self, *, staged: bool = False) -> list[firmware.MenuLine]:
        """The loader's menu, or what it would be if the staged set were live."""
        place = self.entries_staged if staged else self.entries
        if self._user_cfg:
            return firmware.grub_menu(place)
        return firmware.bls_menu(place, grub=self.kind.loader is not Loader.SYSTEMD)

    def _check_kernel(self, line: firmware.MenuLine, image: OsImage) -> None:
        partition = self.root / "efi"
        if self.kind.classic and not self.kind.uki:
            partition = self.root if not self.separate_boot else self.root / "boot"
        content = {"linux": image.recipe.linux, "initrd": image.recipe.initramfs}
        content |= dict.fromkeys(("efi", "uki", "chainloader"), image.uki or b"")
        for key, path in line.fields:
            file = partition / path.lstrip("/")
            if key in content and (not file.is_file() or file.read_bytes() != content[key]):
                raise BootFailed(f"entry {line.name} names {path}, which is not there or not whole")

    def _link_etc(self, deployment: Deployment) -> None:
        etc = self.root / "etc"
        if etc.is_symlink():
            etc.unlink()
        etc.symlink_to(f"sysroot/state/deploy/{deployment.id}/etc")

    def _write_usr(self, image: OsImage) -> None:
        usr = self.root / "usr"
        shutil.rmtree(usr, ignore_errors=True)
        for path, data in image.recipe.usr_files.items():
            _write(usr / path, data)

    def _mountinfo(self, source: str, identifier: str) -> str:
        lines = [
            f"36 1 0:31 / / ro,relatime shared:1 - overlay {source} ro,metacopy=on,redirect_dir=on",
            "37 36 253:3 / /sysroot ro,relatime shared:2 - ext4 /dev/vda3 rw",
            f"38 36 253:3 /state/deploy/{identifier}/etc /etc rw,relatime shared:3 - ext4 /dev/vda3 rw",
            "39 36 253:3 /state/os/default/var /var rw,relatime shared:4 - ext4 /dev/vda3 rw",
            "40 36 0:24 / /run rw,nosuid,nodev shared:5 - tmpfs tmpfs rw,size=400000k,mode=755",
        ]
        if self.separate_boot:
            lines.append("41 36 253:2 / /boot rw,relatime shared:6 - ext4 /dev/vda2 rw")
            lines.append("42 37 253:2 / /sysroot/boot rw,relatime shared:6 - ext4 /dev/vda2 rw")
        return "\n".join(lines) + "\n"

    @property
    def _user_cfg(self) -> bool:
        return self.kind.classic and self.kind.uki

    def _make_root(self) -> None:
        for path in ("sysroot/state/deploy", "sysroot/state/os/default/var", "efi/EFI/Linux", "run", "proc"):
            (self.root / path).mkdir(parents=True, exist_ok=True)
        if self.kind.classic:
            # bootc opens it even when the menu is made of BLS files.
            (self.root / "boot/grub2").mkdir(parents=True)
            (self.root / "boot/grub2/grub.cfg").write_text("blscfg\n")
        if self._user_cfg:
            (self.root / "boot/grub2/efiuuid.cfg").write_text(f'set EFI_PART_UUID="{ESP_UUID}"')
        name = {Loader.SYSTEMD: "systemd-boot 257.9-1", Loader.GRUB_CC: "GRUB CC 2.12"}.get(self.kind.loader)
        if name is not None:
            variable = self.root / "sys/firmware/efi/efivars" / LOADER_INFO
            variable.parent.mkdir(parents=True)
            variable.write_bytes(b"\x06\0\0\0" + name.encode("utf-16-le") + b"\0\0")


def _id(deployment: Deployment | str) -> str:
    return deployment if isinstance(deployment, str) else deployment.id


def _uki_arguments(image: OsImage) -> tuple[str, ...]:
    mark = "?" if image.recipe.insecure else ""
    return (f"composefs={mark}{image.id}", *image.recipe.uki_cmdline.split())


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
