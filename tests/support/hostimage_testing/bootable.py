"""Bootable images of Debian 13 with the project in them, as OCI layouts, in the arrangement of bootc.

``v1`` to ``v3`` share their first layer and differ in one of their own: ``v2`` in files of /usr and /etc and
in a kernel argument, ``v3`` in the initramfs too. Each is a layout directory of its own with the tag
``latest``; all share their blobs, so that one file system holds them in little space.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing import tars
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

PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "libpam-systemd"),
    *("dbus", "polkitd", "login", "passwd", "util-linux", "udev", "kmod", "e2fsprogs", "fdisk", "dosfstools"),
    *("fsverity", "systemd-boot-efi", "skopeo", "python3", "python3-pip", "python3-zstandard"),
    *("python3-pydantic", "python3-structlog", "python3-dbus-next"),
)
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
    *("etc/ssl/certs", "usr/share/ca-certificates"),
)
_DRIVERS_KEPT = frozenset({"block", "virtio", "char", "tty"})
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


def prepare(directory: Path, cache: Path) -> Bootable:
    """Make the images below the new ``directory``; what Debian gives to them is kept in ``cache``."""
    base = cache / "bootable.tar"
    if not base.exists():
        bootstrap(base, PACKAGES)
    root = directory / "root"
    unpack(base, root)
    install_wheel(root, directory)
    modules = _arrange(root)
    images = directory / "images"
    _write_layouts(root, modules, images)
    return Bootable(root, images, modules / "vmlinuz", modules / "initramfs.img")


def _arrange(root: Path) -> Path:
    """Turn a Debian root into the tree of an image; gives the directory of its kernel."""
    for path, text in _FILES.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (root / "usr/lib/tmpfiles.d/guest.conf").write_text(_TMPFILES)
    add_people(root)
    (modules,) = (root / "usr/lib/modules").iterdir()
    for group in (modules / "kernel/drivers").iterdir():
        if group.name not in _DRIVERS_KEPT:
            shutil.rmtree(group)
    in_root(root, "depmod", modules.name)
    in_root(root, "systemctl", "enable", "--quiet", *_UNITS)
    in_root(root, "mkinitramfs", "-o", f"/usr/lib/modules/{modules.name}/initramfs.img", modules.name)
    (root / f"boot/vmlinuz-{modules.name}").rename(modules / "vmlinuz")
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
    return modules


def _write_layouts(root: Path, modules: Path, images: Path) -> None:
    shared = Layout(images / "shared")
    base = shared.layer(_tar(root), "zstd", 1)
    initramfs = f"usr/lib/modules/{modules.name}/initramfs.img"
    # The kernel passes over zeros between and after the archives in it.
    other = tars.file(initramfs.encode(), (modules / "initramfs.img").read_bytes() + bytes(512), mode=0o644)
    layers = {
        "v1": [base],
        "v2": [base, shared.layer(_changes("v2") + tars.END)],
        "v3": [base, shared.layer(_changes("v3") + other + tars.END)],
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
