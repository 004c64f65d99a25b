"""Layers of bootable images: one like those of Fedora, with a SELinux policy, attributes and hard links."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hostimage_testing import selinux_policy, tars

CONTEXTS = "etc/selinux/targeted/contexts/files/file_contexts"
KERNEL = b"kernel " * 5000
INITRD = b"initrd " * 9000
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)
#: What a root needs to become a boot image, besides a kernel.
DIRECTORIES = ("boot", "sysroot", "usr", "etc", "var", "run")


def layer(
    files: Mapping[str, bytes], directories: Iterable[str] = (), *, mtime: str = "1700000000.25"
) -> bytes:
    """A layer with these files and directories, and those above them."""
    above = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    parts = [_directory(name, mtime) for name in sorted({*above, *directories})]
    parts += [tars.file(name.encode(), data, mtime=5) for name, data in sorted(files.items())]
    return b"".join([*parts, tars.END])


def kernel(version: str = "6.12.0-1.fc44.x86_64") -> dict[str, bytes]:
    """The files of a kernel."""
    place = f"usr/lib/modules/{version}"
    return {f"{place}/vmlinuz": KERNEL, f"{place}/initramfs.img": INITRD}


def policy_files(rules: int) -> dict[str, bytes]:
    """A policy of about ``rules`` rules in several files."""
    return {
        "etc/selinux/config": b"SELINUX=enforcing\nSELINUXTYPE=targeted\n",
        CONTEXTS: selinux_policy.file_contexts(rules),
        CONTEXTS + ".local": b"/usr/bin/local -- system_u:object_r:local_t:s0\n",
        CONTEXTS + ".homedirs": b"/home/[^/]+/.+ system_u:object_r:user_home_t:s0\n/home -d <<none>>\n",
        CONTEXTS + ".subs": b"/usr/lib64 /usr/share\n",
        CONTEXTS + ".subs_dist": selinux_policy.SUBSTITUTIONS.encode(),
        CONTEXTS + ".bin": bytes(100),
    }


def fedora_like(inodes: int, rules: int) -> list[bytes]:
    """Two layers: the files, and what the second changes."""
    return [b"".join([*_first(inodes, rules), tars.END]), b"".join([*_second(), tars.END])]


def _first(inodes: int, rules: int) -> Iterator[bytes]:
    paths = selinux_policy.paths(inodes)
    files = kernel() | policy_files(rules)
    files |= {
        "boot/grub2/grub.cfg": b"x" * 100,
        "sysroot/ostree/repo/config": b"",
        "usr/bin/local": b"#!" * 50,
    }
    above = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    directories = {path for path, kind in paths.items() if kind == "d"} | above
    yield tars.pax((b"SCHILY.xattr.security.selinux", b"build"), (b"SCHILY.xattr.user.dir", b"of the root"))
    yield tars.directory(b"usr", mtime=1_700_000_000)
    directories.discard("usr")
    for number, name in enumerate(sorted(directories)):
        yield _directory(name, f"{1_600_000_000 + number}.{number % 1000:03}")
    for number, (name, kind) in enumerate(sorted(paths.items())):
        if kind == "l":
            yield _long(name) + tars.header(name.encode()[:100], kind=b"2", link=b"../target", mtime=number)
        elif kind == "f":
            yield from _file(number, name)
    for name, data in sorted(files.items()):
        yield tars.file(name.encode(), data, mtime=7)


def _file(number: int, name: str) -> Iterator[bytes]:
    if number % 50 == 1:
        yield tars.pax(
            (b"path", name.encode()),
            (b"SCHILY.xattr.user.number", b"%d" % number),
            (b"SCHILY.xattr.security.selinux", b"system_u:object_r:container_file_t:s0"),
            (b"SCHILY.xattr.security.capability", CAPABILITY),
        )
    else:
        yield _long(name)
    content = b"%d " % number * (1 + number % 40)
    yield tars.file(name.encode()[:100], content, mode=0o644 + number % 2 * 0o111, mtime=number)


def _second() -> Iterator[bytes]:
    """Hard links between places with different labels and with the same, devices, a pipe."""
    yield tars.directory(b"usr/libexec/again", mtime=9)
    links = (
        "usr/share/linked",
        "usr/libexec/again/linked",
        "etc/linked",
        "usr/lib/linked.so",
        "etc/linked-too",
    )
    for name in links:
        yield tars.header(name.encode(), kind=b"1", link=b"usr/bin/local")
    yield tars.directory(b"dev", mtime=9)
    yield tars.header(b"dev/kako", kind=b"3", device=(1, 3))
    yield tars.header(b"dev/kako1", kind=b"4", device=(8, 1))
    yield tars.header(b"run/pipe", kind=b"6")
    yield tars.header(b"etc/pipe", kind=b"6")
    yield tars.header(b"var/run", kind=b"2", link=b"../run")


def _directory(name: str, mtime: str) -> bytes:
    return tars.pax((b"path", f"{name}/".encode()), (b"mtime", mtime.encode())) + tars.directory(
        name.encode()[:99] + b"/"
    )


def _long(name: str) -> bytes:
    return tars.pax((b"path", name.encode())) if len(name.encode()) > 100 else b""
