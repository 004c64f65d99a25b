"""GRUB itself reads boot entries that we write: it starts the kernel of the first, with its arguments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from hostimage_testing import boot_programs, bootable, emulator, loaders
from hostimage_testing.debian_root import bootstrap
from hostimage_testing.tools import require
from hostimaged.boot.bls import kernel_directory
from hostimaged.boot.loader import Bootloader
from hostimaged.host.bootwrite import Planned, kernel_entry, render_bls
from hostimaged.ids import DeploymentId

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]

LIMIT = 600.0
#: Only the end of an archive in cpio's format "newc": 13 fields and a name.
_EMPTY_ARCHIVE = (b"070701" + b"00000000" * 11 + b"0000000b" + b"00000000" + b"TRAILER!!!\0").ljust(
    4096, b"\0"
)
#: Systems and versions that a plain comparison of names puts in the wrong order, the first in the menu first.
MENUS = {
    "same": [("debian", "13"), ("debian", "13")],
    "up": [("fedora", "9.10"), ("fedora", "9.9")],
    "down": [("fedora", "9.9"), ("fedora", "9.10")],
    "other-system": [("alpine", "3"), ("zorin", "17")],
}


@pytest.fixture(scope="session")
def grub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, beside the kernel of the images."""
    directory = tmp_path_factory.mktemp("grub")
    given = os.environ.get("HOSTIMAGE_TEST_CACHE")
    cache = Path(given) / "vm" if given else directory
    cache.mkdir(parents=True, exist_ok=True)
    base = cache / "bootable.tar"
    if not base.exists():
        bootstrap(base, bootable.PACKAGES)
    with tarfile.open(base) as archive:
        for member in archive:
            if re.match(r"\./boot/vmlinuz-", member.name):
                source = archive.extractfile(member)
                assert source is not None
                (directory / "vmlinuz").write_bytes(source.read())
    return boot_programs.grub(loaders.GRUB_2_14, directory, cache)


@pytest.mark.parametrize("name", MENUS)
def test_the_first_entry_is_started(tmp_path: Path, grub: Path, name: str) -> None:
    root = tmp_path / "root"
    ids = [DeploymentId(digit * 128) for digit in "ab"]
    _write_boot(root / "boot", grub.with_name("vmlinuz"), MENUS[name], ids)
    system = tmp_path / "system.img"
    mkfs = [require("mkfs.ext4"), "-q", "-O", "verity", "-b", "4096", "-L", loaders.ROOT_LABEL]
    subprocess.run([*mkfs, "-d", root, system, "128M"], check=True)
    esp = tmp_path / "esp/EFI/BOOT"
    esp.mkdir(parents=True)
    shutil.copy(grub, esp / "BOOTX64.EFI")
    said = _boot(tmp_path, esp.parents[1], system)
    assert f"composefs={ids[0]} " in said + " "
    assert "second-entry" not in said
    # GRUB puts the quotes around the whole word, which is the same to the kernel.
    assert said.endswith(' rw "quoted=a b" first-entry')


def _write_boot(boot: Path, kernel: Path, systems: list[tuple[str, str]], ids: list[DeploymentId]) -> None:
    menu = []
    for (system, version), id_, word in zip(systems, ids, ("first", "second"), strict=True):
        directory = boot / kernel_directory(id_)
        directory.mkdir(parents=True)
        shutil.copy(kernel, directory / "vmlinuz")
        (directory / "initrd").write_bytes(_EMPTY_ARCHIVE)
        options = f'composefs={id_} console=ttyS0 panic=-1 rw quoted="a b" {word}-entry'
        entry = kernel_entry(
            id_, title=word, version=version, options=options, directory=directory.name, prefix="/boot"
        )
        menu.append(Planned(entry, system))
    entries = boot / "loader/entries"
    entries.mkdir(parents=True)
    for name, content in render_bls(Bootloader.GRUB, menu, []).files:
        (entries / name).write_bytes(content)
    (boot / "grub2").mkdir()
    (boot / "grub2/grub.cfg").write_text(f"set timeout=0\nset default=0\n{loaders.GRUB_2_14.menu}\n")


def _boot(directory: Path, esp: Path, system: Path) -> str:
    """The line in which the kernel repeats its arguments."""
    code, variables = emulator.firmware()
    own, console = shutil.copy(variables, directory / "variables.fd"), directory / "console"
    argv = [
        "setpriv", "--pdeathsig", "KILL", require("qemu-system-x86_64"), *emulator.EMULATOR,
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
        "-drive", f"if=pflash,format=raw,unit=1,file={own}",
        "-drive", f"file=fat:{esp},format=raw,if=virtio,readonly=on",
        "-drive", f"file={system},format=raw,if=virtio,cache=unsafe",
        "-serial", f"file:{console}",
    ]  # fmt: skip
    end = time.monotonic() + LIMIT
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            while time.monotonic() < end and process.poll() is None:
                said = console.read_text(errors="replace") if console.exists() else ""
                if found := re.search(r"Command line: (.*)\n", said):
                    return found[1].strip()
                time.sleep(0.5)
        finally:
            process.kill()
    pytest.fail(f"GRUB started no kernel:\n{console.read_text(errors='replace')[-4000:]}")
