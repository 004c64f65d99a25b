"""Boot Loader Specification entries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hostimaged.boot import bls
from hostimaged.boot.bls import Entry, file_name, parse, sort_key
from hostimaged.errors import BootLoaderError
from hostimaged.ids import DeploymentId

A = DeploymentId("a" * 128)
B = DeploymentId("b" * 128)

TYPE_1 = Entry(
    title="Fedora Linux 44",
    version="44",
    linux=f"/boot/bootc_composefs-{B}/vmlinuz",
    initrd=(f"/boot/bootc_composefs-{B}/initrd", "/boot/microcode"),
    options=f"root=UUID=1 rw composefs=?{A}",
    sort_key="bootc-fedora-0",
)
UKI = Entry(
    title="T", version="1", efi=f"/EFI/Linux/bootc/bootc_composefs-{A}.efi", efi_key="uki", sort_key="k"
)


def test_bytes_of_a_kernel_entry() -> None:
    text = f"""\
title Fedora Linux 44
version 44
linux /boot/bootc_composefs-{B}/vmlinuz
initrd /boot/bootc_composefs-{B}/initrd
initrd /boot/microcode
options root=UUID=1 rw composefs=?{A}
machine-id 0123
sort-key bootc-fedora-0
x-key some value
y z
"""
    entry = replace(TYPE_1, machine_id="0123", extra=(("x-key", "some value"), ("y", "z")))
    assert entry.serialise() == text.encode()
    assert parse(text.encode(), "e.conf") == entry


def test_bytes_of_an_image_entry() -> None:
    text = f"title T\nversion 1\nuki /EFI/Linux/bootc/bootc_composefs-{A}.efi\nsort-key k\n"
    assert UKI.serialise() == text.encode()
    assert parse(text.encode(), "e.conf") == UKI
    assert replace(UKI, efi_key="efi").serialise() == text.replace("uki", "efi", 1).encode()


def test_keys_of_a_kernel_in_an_image_entry_are_kept() -> None:
    data = b"version 1\nefi /x.efi\ninitrd /a\noptions b\n"
    assert parse(data, "e.conf").serialise() == data


def test_deployment_and_artifact() -> None:
    assert (TYPE_1.deployment_id(), TYPE_1.artifact(), TYPE_1.has_prefix) == (A, str(B), True)
    assert (UKI.deployment_id(), UKI.artifact(), UKI.has_prefix) == (A, str(A), True)
    old = replace(TYPE_1, linux=f"/EFI/Linux/{B}/vmlinuz")
    assert (old.deployment_id(), old.artifact(), old.has_prefix) == (A, str(B), False)
    old = replace(UKI, efi=f"/EFI/Linux/bootc/{A}.efi")
    assert (old.deployment_id(), old.artifact(), old.has_prefix) == (A, str(A), False)


@pytest.mark.parametrize(
    "entry",
    [
        Entry(linux="/vmlinuz", options="root=/dev/sda1"),
        Entry(linux="/a/vmlinuz"),
        Entry(efi="/EFI/shell.efi"),
        Entry(efi=f"/EFI/{A}"),
        Entry(efi=f"/EFI/bootc_composefs-{A}x.efi"),
    ],
)
def test_foreign_entries_are_of_no_deployment(entry: Entry) -> None:
    assert entry.deployment_id() is None
    assert not entry.has_prefix or entry.efi


def test_an_entry_that_cannot_boot() -> None:
    with pytest.raises(BootLoaderError, match="composefs"):
        replace(TYPE_1, options="composefs=abc").deployment_id()


def test_reading_is_tolerant() -> None:
    data = b"""
# a comment
   title  A  B \r
version\t1
title C
noline
linux /vmlinuz
initrd /a
initrd /b
architecture x64
grub_users $grub_users
devicetree /x
devicetree /y
titel \xff
"""
    entry = parse(data, "e.conf")
    assert entry == Entry(
        title="C",
        version="1",
        linux="/vmlinuz",
        initrd=("/a", "/b"),
        extra=(
            ("architecture", "x64"),
            ("grub_users", "$grub_users"),
            ("devicetree", "/y"),
            ("titel", "\udcff"),
        ),
    )
    assert parse(entry.serialise(), "e.conf") == entry
    assert parse(b"efi /x", "e.conf").version == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"title x\nversion 1\n",
        b"linux /x\nefi /y\n",
        b"uki /x\nefi /y\n",
        b"linux\n",
        b"linux /x\n" + b"#" * bls.MAX_SIZE,
    ],
)
def test_what_cannot_be_an_entry(data: bytes) -> None:
    with pytest.raises(BootLoaderError, match=r"e\.conf"):
        parse(data, "e.conf")


@pytest.mark.parametrize(
    "entry",
    [
        replace(TYPE_1, version=""),
        replace(TYPE_1, title="a\nlinux /evil"),
        replace(TYPE_1, options="a\rb"),
        replace(TYPE_1, options="a\u2028b"),
        replace(TYPE_1, sort_key=" k"),
        replace(TYPE_1, linux=""),
        replace(TYPE_1, efi="/x"),
        replace(TYPE_1, extra=(("a b", "c"),)),
        replace(TYPE_1, extra=(("#a", "c"),)),
        replace(TYPE_1, extra=(("a", ""),)),
        replace(TYPE_1, options="x" * bls.MAX_SIZE),
    ],
)
def test_what_is_never_written(entry: Entry) -> None:
    with pytest.raises(BootLoaderError):
        entry.serialise()


def test_names() -> None:
    assert file_name("fedora-coreos", "44.2026", 1) == "bootc_fedora_coreos-44.2026-1.conf"
    assert file_name("x", "12 (bookworm)/../a", 0) == "bootc_x-12__bookworm__.._a-0.conf"
    assert sort_key("fedora-coreos", 1) == "bootc-fedora-coreos-1"
    assert TYPE_1.with_order("x", 1).sort_key == "bootc-x-1"
    assert bls.kernel_directory(A) == f"bootc_composefs-{A}"
    assert bls.uki_name(A) == f"bootc_composefs-{A}.efi"
    assert bls.addons_name(A) == f"bootc_composefs-{A}.efi.extra.d"
    assert bls.artifact_name(bls.uki_name("x")) == bls.artifact_name(bls.kernel_directory("x")) == "x"


def test_a_version_is_never_a_boot_counter() -> None:
    """``+3-1.conf`` at the end is one for systemd-boot, which renames the file at each boot."""
    assert "+" not in file_name("x+", "1.0+3", 1)


def test_long_names_fit_the_esp() -> None:
    assert len(file_name("é" * 900, "ü" * 900, 1)) <= 255
