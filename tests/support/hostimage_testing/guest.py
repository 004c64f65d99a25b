"""A Debian 13 guest under emulation: one boot that runs a pytest suite inside and hands back its report.

What the test machines' own kernel lacks (fs-verity, vfat) is tested there. The guest boots its kernel
directly; its root is ext4 with the verity feature; its init is our script: no service manager is waited for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.tools import REPOSITORY_ROOT, absent, find, require

PACKAGES = "linux-image-cloud-amd64,python3,util-linux,e2fsprogs,dosfstools,kmod,fsverity"
MODULES = "virtio_console loop erofs overlay vfat nls_cp437 nls_ascii"
# What the tests inside import beside our own packages, for the guest's Python.
WHEELS = ("zstandard", "pydantic", "structlog", "pytest", "pytest-timeout")
GUEST_PYTHON = "3.13"
BOOT_LIMIT = 900
_HOME = "opt/hostimage"

_INIT = f"""\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
for module in {MODULES}; do modprobe "$module"; done
cd /{_HOME}
PYTHONPATH=site:tree/daemon:tree/client:tree/dbus:tree/tests/support PATH="$PWD/bin:$PATH" TMPDIR=/var/tmp \\
    python3 -m pytest -c /dev/null --rootdir tree --confcutdir tree/tests/vm/inside --import-mode=importlib \\
    -p no:cacheprovider -W error --junitxml=/var/tmp/report.xml tree/tests/vm/inside
cat /var/tmp/report.xml >/dev/vport0p1
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Case:
    """Outcome of one test that ran in the guest; ``problem`` is empty if it passed."""

    name: str
    problem: str
    skipped: bool


def build_disk(directory: Path) -> tuple[Path, Path, Path]:
    """Make disk, kernel and initial RAM disk below ``directory``; a base that is there is used again."""
    mmdebstrap = require("mmdebstrap")
    if os.geteuid() != 0:
        absent("making a guest's root needs root")
    directory.mkdir(parents=True, exist_ok=True)
    base = directory / "guest.tar"
    if not base.exists():
        partial = directory / "guest.partial.tar"
        argv = [mmdebstrap, "--variant=minbase", "--mode=root", f"--include={PACKAGES}", "--quiet", "trixie"]
        done = subprocess.run(
            [*argv, str(partial)], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            absent(f"mmdebstrap failed: {done.stderr[-500:]}")
        partial.rename(base)
    root = directory / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    subprocess.run(["tar", "-C", root, "--numeric-owner", "-xpf", base], check=True)
    _add_payload(root / _HOME)
    init = root / "sbin/guest-init"
    init.write_text(_INIT)
    init.chmod(0o755)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    (ramdisk,) = (root / "boot").glob("initrd.img-*")
    kernel, ramdisk = (Path(shutil.copy(file, directory)) for file in (kernel, ramdisk))
    disk = directory / "disk.img"
    disk.unlink(missing_ok=True)
    mkfs = require("mkfs.ext4")
    subprocess.run([mkfs, "-q", "-O", "verity", "-b", "4096", "-d", root, disk, "3G"], check=True)
    shutil.rmtree(root)
    return disk, kernel, ramdisk


def _add_payload(home: Path) -> None:
    """Our sources, the libraries they need, and cfsctl."""
    tree = home / "tree"
    for source in ("daemon", "client", "dbus", "systemd", "tests/support", "tests/vm/inside"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY_ROOT / source, tree / source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    platform = ["--target", str(home / "site"), "--python-version", GUEST_PYTHON, "--only-binary=:all:"]
    subprocess.run([*pip, *platform, *WHEELS], check=True)
    if cfsctl := find("cfsctl"):
        (home / "bin").mkdir()
        shutil.copy(cfsctl, home / "bin/cfsctl")
    else:
        absent("cfsctl is not installed")


def run(directory: Path) -> list[Case]:
    """Boot the guest once; returns what its tests said. ``RuntimeError`` shows the console if it failed."""
    qemu = require("qemu-system-x86_64")
    disk, kernel, ramdisk = build_disk(directory)
    report, console = directory / "report.xml", directory / "console"
    report.unlink(missing_ok=True)
    argv = [
        qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", "-display", "none",
        "-no-reboot", "-nodefaults", "-kernel", str(kernel), "-initrd", str(ramdisk),
        "-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/sbin/guest-init",
        "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
        "-serial", f"file:{console}",
        "-device", "virtio-serial", "-chardev", f"file,id=report,path={report}",
        "-device", "virtserialport,chardev=report",
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=BOOT_LIMIT)
    except subprocess.TimeoutExpired:
        errors = b"the guest did not finish in time"
    finally:
        process.kill()
        process.wait()
        disk.unlink(missing_ok=True)
    if not report.exists() or not report.stat().st_size:
        said = console.read_text(errors="replace")[-8000:] if console.exists() else ""
        raise RuntimeError(f"no report from the guest: {errors.decode(errors='replace')}\n{said}")
    return [_case(element) for element in ET.parse(report).getroot().iter("testcase")]


def _case(element: ET.Element) -> Case:
    problems = [
        child.text or child.get("message", "") for child in element if child.tag in ("failure", "error")
    ]
    name = f"{element.get('classname', '').rsplit('.', 1)[-1]}::{element.get('name', '')}"
    return Case(name, "\n".join(problems), element.find("skipped") is not None)
