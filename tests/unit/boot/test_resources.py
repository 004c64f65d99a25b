"""What an image boots with, and the tree that is left for booting."""

from __future__ import annotations

import pytest

from hostimaged.boot.resources import MAX_UKIS, BootType, Kernel, UnifiedKernel, find_resources
from hostimaged.boot.selinux import XATTR
from hostimaged.boot.transform import transform_for_boot
from hostimaged.composefs.tree import Directory, Inline, Leaf, Stat, Symlink
from hostimaged.errors import UnsupportedImage

STAT = Stat(0o755, 0, 0, 7, 8, {XATTR: b"old"})


def tree(*names: str) -> Directory:
    """Files with their path as content; ``->`` makes a link, ``/`` at the end a directory."""
    root = Directory(STAT, {})
    for item in names:
        name, _, target = item.partition("->")
        *above, last = name.encode().split(b"/")
        directory = root
        for part in above:
            found = directory.entries.setdefault(part, Directory(STAT, {}))
            assert isinstance(found, Directory)
            directory = found
        if last:
            content = Symlink(target.encode()) if target else Inline(name.encode())
            directory.entries[last] = Leaf(STAT, content)
    return root


def content(leaf: Leaf) -> str:
    assert isinstance(leaf.content, Inline)
    return leaf.content.data.decode()


def kernel(version: str) -> tuple[str, str]:
    return f"usr/lib/modules/{version}/vmlinuz", f"usr/lib/modules/{version}/initramfs.img"


def test_a_kernel() -> None:
    found = find_resources(tree(*kernel("6.9"), *kernel("6.12"), "usr/lib/modules/0/modules.dep", "boot/x"))
    assert isinstance(found, Kernel)
    assert found.boot_type is BootType.BLS
    assert found.version == "6.12"
    assert content(found.vmlinuz) == "usr/lib/modules/6.12/vmlinuz"
    assert content(found.initrd) == "usr/lib/modules/6.12/initramfs.img"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["boot/EFI/Linux/b.efi", "boot/EFI/Linux/a/x.efi", "usr/lib/modules/6/a.efi"],
            "boot/EFI/Linux/b.efi",
        ),
        (["boot/EFI/Linux/b.efi", "boot/EFI/Linux/a.addon.efi"], "boot/EFI/Linux/b.efi"),
        (["boot/EFI/Linux/c.efi", "boot/EFI/Linux/b.efi"], "boot/EFI/Linux/b.efi"),
        (["boot/EFI/Linux/a/x.efi"], "boot/EFI/Linux/a/x.efi"),
        (
            ["usr/lib/modules/6/x.efi", "usr/lib/modules/5/y.efi", "boot/EFI/Linux/x"],
            "usr/lib/modules/5/y.efi",
        ),
        (["usr/lib/modules/6/x.efi", "usr/lib/modules/5/y.addon.efi"], "usr/lib/modules/6/x.efi"),
    ],
)
def test_unified_kernels(names: list[str], expected: str) -> None:
    found = find_resources(tree(*names, *kernel("1")))
    assert isinstance(found, UnifiedKernel)
    assert found.boot_type is BootType.UKI
    assert content(found.leaf) == expected
    assert found.name == expected.rsplit("/", 1)[1]
    assert found.version == (expected.split("/")[3] if expected.startswith("usr") else "")


def test_addons() -> None:
    place = "boot/EFI/Linux/k.efi"
    extra = [
        f"{place}.extra.d/{name}"
        for name in ("b.addon.efi", "a.addon.efi", "README", "x.efi", "l.addon.efi->a")
    ]
    with pytest.raises(UnsupportedImage, match=r"l\.addon\.efi in the image is not a regular file"):
        find_resources(tree(place, *extra))
    found = find_resources(tree(place, *extra[:-1]))
    assert isinstance(found, UnifiedKernel)
    assert [addon.name for addon in found.addons] == ["a.addon.efi", "b.addon.efi"]
    assert content(found.addons[0].leaf) == f"{place}.extra.d/a.addon.efi"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no kernel"),
        (["usr/lib/modules->x"], "modules of /usr/lib/modules in the image is not a directory"),
        (["usr/lib/modules/6"], "has no kernel"),
        (["usr/lib/modules/6/vmlinuz->x"], "has no kernel"),
        (["usr/lib/modules/6/initramfs.img"], "has no kernel"),
        (["usr/lib/modules/6/vmlinuz", *kernel("7")], "kernel 6 of the image has no initramfs.img"),
        (["usr/lib/modules/6/vmlinuz", "usr/lib/modules/6/initramfs.img->x"], "no initramfs.img"),
        ([*kernel("6 7")], "6 7 in the image is no name for a boot loader"),
        ([*kernel("6é")], "is no name for a boot loader"),
        ([*kernel("6\n7")], r"6\\n7 in the image is no name for a boot loader"),
        (["boot/EFI/Linux/a.efi->x"], "a.efi in the image is not a regular file"),
        (["boot/loader/entries/x.conf", *kernel("6")], "boot entries of its own"),
        (["boot/loader->x", *kernel("6")], "loader of /boot/loader/entries"),
        ([f"boot/EFI/Linux/{n}.efi" for n in range(MAX_UKIS + 1)], "more than 1000 EFI programs"),
    ],
)
def test_refused(names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedImage, match=message):
        find_resources(tree("usr/bin/x", *names))


class Files:
    """Of an image without a policy."""

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        return None

    def names(self, path: str) -> list[bytes]:
        return []

    def open(self, path: str) -> int | None:
        return None


def test_transforming() -> None:
    root = tree("usr/x", "boot/EFI/x.efi", "sysroot/ostree/x", "etc/x")
    for name, stat in ((b"usr", STAT._replace(mtime=3, nsec=4)), (b"boot", STAT._replace(mode=0o700, uid=5))):
        root.entries[name].stat = stat
    transform_for_boot(root, Files())
    boot, sysroot = root.entries[b"boot"], root.entries[b"sysroot"]
    assert isinstance(boot, Directory)
    assert isinstance(sysroot, Directory)
    assert boot.entries == sysroot.entries == {}
    assert boot.stat == Stat(0o700, 5, 0, 3, 4, {})
    assert sysroot.stat == Stat(0o755, 0, 0, 3, 4, {})
    assert root.entries[b"etc"].stat == Stat(0o755, 0, 0, 7, 8, {})


@pytest.mark.parametrize(
    "names", [["usr/x", "boot/"], ["usr/x", "sysroot/"], ["usr/x", "boot", "sysroot/"], []]
)
def test_directories_that_must_be_there(names: list[str]) -> None:
    with pytest.raises(UnsupportedImage, match="cannot be booted"):
        transform_for_boot(tree(*names), Files())
