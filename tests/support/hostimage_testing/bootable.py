"""Bootable images of Debian 13 with the project in them, as OCI layouts, in the arrangement of bootc.

``v1`` to ``v3`` share their first layer and differ in their own: ``v2`` in files of /usr and /etc and in a
kernel argument, ``v3`` in the kernel too. Each is a layout directory of its own with the tag
``latest``; all share their blobs, so that one file system holds them in little space.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing import guest_registry, tars
from hostimage_testing.debian_root import (
    ADMINISTRATOR,
    USER,
    add_people,
    bootstrap,
    in_root,
    install_wheel,
    unpack,
)
from hostimage_testing.layout import Layer, Layout
from hostimage_testing.registry import Certificate

PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "libpam-systemd"),
    *("dbus", "polkitd", "login", "passwd", "util-linux", "udev", "kmod", "e2fsprogs", "fdisk", "dosfstools"),
    *("fsverity", "systemd-boot-efi", "skopeo", "python3", "python3-pip", "python3-zstandard"),
    *("python3-pydantic", "python3-structlog", "python3-dbus-next"),
)
#: Of ``v3``.
OTHER_KERNEL = ("linux-image-amd64",)
#: A file of ``v2`` and ``v3`` that nothing uses.
MATERIAL = "usr/share/hostimage-testing.material"
CREATED = {f"v{n}": f"2026-11-0{n}T08:00:00Z" for n in (1, 2, 3)}
#: What updates follow: a link that tests point to the layout of a version.
TRACKED = "oci:/run/os:latest"
#: What a guest says on its second serial line when commands may be sent there.
SHELL_READY = "hostimage-testing: the shell is ready"
#: Not needed by what the tests do, and many files to import under emulation.
_LEFT_OUT = (
    *(
        "boot",
        "root",
        "home",
        "vmlinuz",
        "vmlinuz.old",
        "initrd.img",
        "initrd.img.old",
        "var/cache",
        "var/log",
        "var/lib/apt",
        "var/lib/dpkg/info",
        "var/backups",
    ),
    *("usr/lib/udev/hwdb.d", "usr/lib/udev/hwdb.bin", "usr/share/zoneinfo", "usr/share/bash-completion"),
    *("usr/lib/x86_64-linux-gnu/gconv", "usr/share/perl5", "usr/lib/python3/dist-packages/pip"),
    *("etc/ssl/certs", "usr/share/ca-certificates", "usr/share/lintian", "usr/share/bug", "usr/share/zsh"),
    *("usr/lib/python3.13/test", "usr/lib/python3.13/_pyrepl", "usr/lib/x86_64-linux-gnu/xtables"),
    # Agents that a session's manager would wait for.
    "usr/lib/systemd/user/sockets.target.wants",
)
#: What is kept of modules, by directory: a guest needs few, and each is a file more to import and to check.
_MODULES_KEPT = {
    "": {"arch", "crypto", "drivers", "fs", "lib", "net"},
    "drivers": {"block", "virtio", "char", "tty", "net"},
    "drivers/net": {"virtio_net", "net_failover"},
    "fs": {
        "ext4",
        "jbd2",
        "mbcache",
        "erofs",
        "overlayfs",
        "fat",
        "nls",
        "fuse",
        "autofs",
        "configfs",
        "efivarfs",
        "netfs",
    },
    "net": {"core", "ipv4", "ipv6", "packet", "unix"},
}
#: What starts at each boot and serves nobody here; emulation makes it long.
_MASKED = (
    "e2scrub_reap.service",
    "e2scrub_all.timer",
    "systemd-binfmt.service",
    "systemd-tpm2-setup.service",
)
#: The product (SMBIOS) that a guest claims to be which logs people in on its serial console.
FOR_PEOPLE = "hostimage-for-people"
_FILES = {
    "etc/fstab": "PARTLABEL=esp /efi vfat umask=0077 0 2\n",
    "etc/hostname": "guest\n",
    # Empty: a machine id is made, but nobody is asked anything.
    "etc/machine-id": "",
    "etc/containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}\n',
    "etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=persistent\n",
    # An emulated disk takes longer to be there than a real one, if others work on the machine too.
    "etc/systemd/system.conf.d/test.conf": (
        "[Manager]\nDefaultDeviceTimeoutSec=10min\nDefaultTimeoutStartSec=10min\n"
    ),
    "etc/systemd/system/hostimaged-boot-check.service.d/test.conf": "[Service]\nTimeoutStartSec=10min\n",
    # Whoever is at the serial console may do everything: this is a machine for tests.
    "etc/systemd/system/serial-getty@ttyS0.service.d/test.conf": (
        f'[Unit]\nConditionFirmware=smbios-field(product_name = "{FOR_PEOPLE}")\n\n'
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear %I linux\n"
    ),
    "usr/lib/systemd/system/hostimage-testing-shell.service": f"""\
[Unit]
Description=Shell for Tests on the Second Serial Line
After=multi-user.target systemd-user-sessions.service

[Service]
ExecStartPre=/bin/stty -F /dev/ttyS1 raw -echo
ExecStart=/bin/sh -c 'echo "{SHELL_READY}"; PS1= PS2= exec /bin/bash --noprofile --norc --noediting'
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
Environment=LC_ALL=C.UTF-8 HOME=/root TERM=dumb
WorkingDirectory=/
KillMode=process
SendSIGHUP=yes

[Install]
WantedBy=graphical.target
""",
    "usr/lib/bootc/kargs.d/10-test.toml": 'kargs = ["hostimage.version=v1"]\n',
    "usr/share/version": "v1\n",
    "etc/image-setting": "of v1\n",
    "etc/initramfs-tools/conf.d/test": "MODULES=list\nCOMPRESS=zstd\nRESUME=none\nFSTYPE=ext4\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
_UNITS = (
    *("hostimaged.service", "hostimaged-finalize.service", "hostimaged-boot-check.service"),
    *("hostimage-testing-shell.service", "serial-getty@ttyS0.service"),
    *("hostimaged-update.timer", "systemd-networkd.service"),
)
#: Directories and links of an image whose root is read-only (bootc's "filesystem layout").
_DIRECTORIES = ("boot", "efi", "sysroot", "var")
_LINKS = {"root": "var/roothome", "home": "var/home"}
_TMPFILES = f"""\
d /var/roothome 0700 root root -
d /var/home 0755 root root -
d /var/home/{ADMINISTRATOR} 0700 {ADMINISTRATOR} {ADMINISTRATOR} -
d /var/home/{USER} 0700 {USER} {USER} -
d /var/log/journal 2755 root root -
"""


@dataclass(frozen=True)
class Bootable:
    """``root`` is the tree of ``v1``; ``images`` a directory with the layouts by version."""

    root: Path
    images: Path
    kernel: Path
    initramfs: Path


def prepare(directory: Path, cache: Path, known: Certificate) -> Bootable:
    """Make the images below the new ``directory``; what Debian gives to them is kept in ``cache``.

    ``known``: the certificate of the registry that they know.
    """
    base, other = cache / "bootable.tar", cache / "other-kernel.tar"
    if not base.exists():
        bootstrap(base, PACKAGES)
    if not other.exists():
        bootstrap(other, OTHER_KERNEL, variant="extract")
    root, other_root = directory / "root", directory / "other"
    unpack(base, root)
    install_wheel(root, directory)
    for path, text in (_FILES | guest_registry.files(known)).items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (release,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    _add_kernel(root, release)
    kernel_layer = _other_kernel(root, other, other_root, release)
    _arrange(root)
    images = directory / "images"
    _write_layouts(root, kernel_layer, images)
    shutil.rmtree(other_root)
    modules = root / "usr/lib/modules" / release
    return Bootable(root, images, modules / "vmlinuz", modules / "initramfs.img")


def _add_kernel(root: Path, release: str) -> None:
    """Make the directory of a kernel one of an image: with the kernel and its initramfs, and little else."""
    modules = root / "usr/lib/modules" / release
    for directory, kept in _MODULES_KEPT.items():
        for path in (modules / "kernel" / directory).iterdir():
            if path.name.split(".")[0] in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    in_root(root, "depmod", release)
    in_root(root, "mkinitramfs", "-o", f"/usr/lib/modules/{release}/initramfs.img", release)
    (root / f"boot/vmlinuz-{release}").rename(modules / "vmlinuz")


def _other_kernel(root: Path, archive: Path, unpacked: Path, replaced: str) -> Path:
    """The tree of a layer that has the kernel of ``archive`` in the place of the one ``replaced``.

    Its initramfs is made in ``root``, which is left as it was but for /boot.
    """
    unpack(archive, unpacked)
    (release,) = (path.name for path in (unpacked / "usr/lib/modules").iterdir())
    for path in (*(unpacked / "boot").iterdir(), unpacked / "usr/lib/modules" / release):
        shutil.move(path, root / path.relative_to(unpacked))
    _add_kernel(root, release)
    layer = unpacked / "layer"
    modules = layer / "usr/lib/modules"
    modules.mkdir(parents=True)
    shutil.move(root / "usr/lib/modules" / release, modules)
    (modules / f".wh.{replaced}").touch()
    return layer


def _arrange(root: Path) -> None:
    """Turn a Debian root into the tree of an image."""
    (root / "usr/lib/tmpfiles.d/guest.conf").write_text(_TMPFILES)
    add_people(root)
    in_root(root, "systemctl", "enable", "--quiet", *_UNITS)
    in_root(root, "systemctl", "mask", "--quiet", *_MASKED)
    for path in _LEFT_OUT:
        left_out = root / path
        if left_out.is_dir() and not left_out.is_symlink():
            shutil.rmtree(left_out)
        else:
            left_out.unlink(missing_ok=True)
    for name in _DIRECTORIES:
        (root / name).mkdir(exist_ok=True)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)


def _write_layouts(root: Path, kernel_layer: Path, images: Path) -> None:
    shared = Layout(images / "shared")
    base = shared.layer(_tar(root), "zstd", 1)
    layers = {
        "v1": [base],
        "v2": [base, shared.layer(_changes("v2") + tars.END)],
        "v3": [base, shared.layer(_tar(kernel_layer), "zstd", 1), shared.layer(_changes("v3") + tars.END)],
    }
    for version, of_version in layers.items():
        _write_layout(shared, version, of_version)


def _write_layout(shared: Layout, version: str, layers: list[Layer]) -> None:
    """Blobs go where all are; the directory of the version has its own index."""
    shared.manifests.clear()
    labels = {"org.opencontainers.image.version": version}
    shared.image("latest", layers, labels=labels, config_extra={"created": CREATED[version]})
    directory = shared.path.with_name(version)
    directory.mkdir()
    (directory / "blobs").symlink_to("../shared/blobs")
    for name in ("oci-layout", "index.json"):
        shutil.copy(shared.path / name, directory)


def _changes(version: str) -> bytes:
    argument = f'kargs = ["hostimage.version={version}"]\n'.encode()
    return (
        tars.file(b"usr/share/version", f"{version}\n".encode(), mode=0o644)
        + tars.file(b"usr/lib/bootc/kargs.d/10-test.toml", argument, mode=0o644)
        + tars.file(b"etc/image-setting", f"of {version}\n".encode(), mode=0o644)
        + tars.file(MATERIAL.encode(), random.Random(version).randbytes(1 << 18), mode=0o644)
    )


def _tar(root: Path) -> Iterator[bytes]:
    argv = [
        "tar",
        "-C",
        root,
        "--numeric-owner",
        "--sort=name",
        "--xattrs",
        "--xattrs-include=security.capability",
    ]
    with subprocess.Popen([*argv, "-cf", "-", "."], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while data := process.stdout.read(1 << 20):
            yield data
    if process.returncode:
        raise RuntimeError("tar failed")
