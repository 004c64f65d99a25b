"""A disk on which ``hostimaged deploy`` put an image, done in a guest: this needs fs-verity and vfat.

Made once per content of all that goes into it (kept below ``HOSTIMAGE_TEST_CACHE``); each test boots a copy
that stores differences only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing import bootable, debian_root, emulator, guest_registry, loaders
from hostimage_testing.loaders import Loader
from hostimage_testing.registry import Certificate
from hostimage_testing.tools import REPOSITORY_ROOT, require

INSTALL_LIMIT = 1500.0
_DONE = "hostimage-testing: installed"
#: Arguments of the kernel, for images that have them in the boot entry, as options of ``hostimaged deploy``.
ARGUMENTS = (
    '--karg "root=UUID=$(blkid -p -s UUID -o value /dev/vdb2)"'
    " --karg console=ttyS0 --karg panic=-1 --karg systemd.show_status=1"
    " --karg systemd.condition_needs_update=no --karg systemd.default_device_timeout_sec=600"
)
_INSTALLER = f"""\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run LC_ALL=C.UTF-8
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mountpoint -q /run || mount -t tmpfs tmpfs /run
install_it() {{
    set -ex
    for module in vfat nls_cp437 nls_ascii; do modprobe "$module"; done
    sfdisk --quiet /dev/vdb <<'TABLE'
label: gpt
size=256MiB, type=uefi, name=esp
type=linux-root-x86-64, name=root
TABLE
    mkfs.vfat -n ESP /dev/vdb1
    mkfs.ext4 -q -O verity -b 4096 -L root /dev/vdb2
    mkdir -p /run/root /run/esp /run/images
    mount /dev/vdb2 /run/root
    mount /dev/vdb1 /run/esp
    mount -o ro /dev/vdc /run/images
    mkdir /run/root/boot
    cat /proc/uptime
    hostimaged deploy --sysroot /run/root --boot /run/root/boot --esp /run/esp \\
        @OPTIONS@ --target-image @TRACKED@ oci:/run/images/@IMAGE@:latest
    cat /proc/uptime
    mkdir -p /run/esp/EFI/BOOT
@LOADER@
    find /run/esp -type f
    umount /run/images /run/esp /run/root
}}
if ( install_it ); then echo "{_DONE}"; fi
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Installed:
    """``disk`` boots ``v1``; ``images`` is the disk with all versions, which are in ``layouts`` too.

    ``certificate``: of the registry that they know.
    """

    disk: Path
    images: Path
    layouts: Path
    certificate: Certificate

    def overlay(self, directory: Path) -> str:
        """A new disk below ``directory`` that stores what becomes different from ``disk``."""
        path = directory / "disk.qcow2"
        path.unlink(missing_ok=True)
        argv = [require("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.disk, path]
        subprocess.run(argv, check=True)
        return f"file={path},format=qcow2,cache=unsafe"

    def raw(self, directory: Path) -> Path:
        """A copy of ``disk`` as a plain file below ``directory``."""
        path = directory / "disk.raw"
        subprocess.run([require("qemu-img"), "convert", "-q", "-O", "raw", self.disk, path], check=True)
        return path


def prepare(directory: Path, cache: Path) -> Installed:
    """Make the disks, working below ``directory``, or take those of this content from ``cache``."""
    require("mmdebstrap")
    require("mkfs.ext4")
    require("qemu-img")
    require("qemu-system-x86_64")
    emulator.firmware()
    base = cache / "bootable.tar"
    if not base.exists():
        debian_root.bootstrap(base, bootable.PACKAGES)
    known = guest_registry.certificate(cache)
    kept = cache / f"installed-{_content(base, known)}"
    found = Installed(kept / "disk.qcow2", kept / "images.img", kept / "images", known)
    if kept.exists():
        return found
    for old in cache.glob("installed-*"):
        shutil.rmtree(old)
    made = bootable.prepare(directory, cache, known)
    partial = cache / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    file_system(made.images, partial / "images.img", "1G")
    disk = partial / "disk.qcow2"
    script = installer(loaders.SYSTEMD, guest_registry.FOLLOWED)
    install(script, made.root, made.kernel, made.initramfs, partial / "images.img", disk, directory)
    shutil.move(made.images, partial)
    partial.rename(kept)
    shutil.rmtree(made.root)
    return found


def installer(loader: Loader, tracked: str) -> str:
    """The script that puts the image ``v1`` with this boot loader on a disk; updates follow ``tracked``."""
    options = loader.option if loader.unified else f"{loader.option} {ARGUMENTS}"
    lines = {"OPTIONS": options, "IMAGE": loader.image("v1"), "LOADER": loader.install, "TRACKED": tracked}
    return re.sub("@([A-Z]+)@", lambda found: lines[found[1]], _INSTALLER)


def _content(base: Path, known: Certificate) -> str:
    """What tells apart disks that differ: the project, what makes images and disks, and Debian's part."""
    digest = hashlib.sha256()
    trees = [REPOSITORY_ROOT / name for name in ("daemon", "client", "dbus", "systemd")]
    files = [path for tree in trees for path in tree.rglob("*") if "__pycache__" not in path.parts]
    files += [
        REPOSITORY_ROOT / "pyproject.toml",
        Path(__file__),
        Path(bootable.__file__),
        Path(debian_root.__file__),
        Path(guest_registry.__file__),
        Path(loaders.__file__),
    ]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(REPOSITORY_ROOT)}\0{path.stat().st_mode}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(known.certificate.read_bytes())
    status = base.stat()
    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def file_system(tree: Path, image: Path, size: str) -> None:
    """Make a file system with fs-verity that holds ``tree``."""
    subprocess.run(
        [require("mkfs.ext4"), "-q", "-O", "verity", "-b", "4096", "-d", tree, image, size], check=True
    )


def install(
    script: str, root: Path, kernel: Path, initramfs: Path, images: Path, disk: Path, directory: Path
) -> None:
    """Run an installer in a guest whose root is the tree ``root``; it makes ``disk`` from ``images``."""
    init = root / "usr/sbin/install-guest"
    init.write_text(script)
    init.chmod(0o755)
    system = directory / "installer.img"
    file_system(root, system, "2G")
    console = directory / "console"
    make_disk = [require("qemu-img"), "create", "-q", "-f", "qcow2", disk, "3G"]
    argv = [
        "setpriv", "--pdeathsig", "KILL", require("qemu-system-x86_64"), *emulator.EMULATOR, "-no-reboot",
        "-kernel", kernel, "-initrd", initramfs,
        "-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/usr/sbin/install-guest",
        "-drive", f"file={system},format=raw,if=virtio,cache=unsafe",
        "-drive", f"file={disk},format=qcow2,if=virtio,cache=unsafe",
        "-drive", f"file={images},format=raw,if=virtio,readonly=on",
        "-serial", f"file:{console}",
    ]  # fmt: skip
    try:
        subprocess.run(make_disk, check=True)
        said = _run_to_the_end(argv, console)
        if _DONE not in said.splitlines() and emulator.EMULATORS_CRASH in said:
            print("the emulator made the kernel crash: installed again")
            subprocess.run(make_disk, check=True)
            said = _run_to_the_end(argv, console)
    finally:
        system.unlink()
    if _DONE not in said.splitlines():
        raise RuntimeError(f"the image was not installed:\n{said[-8000:]}")


def _run_to_the_end(argv: Sequence[str | Path], console: Path) -> str:
    """Run the emulator until the guest switches itself off; gives what its console shows."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        process.wait(INSTALL_LIMIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
    return console.read_text(errors="replace")
