"""What is fuzzed of what boots: entries, menus, unified kernel images, arguments, os-release.

See ``targets.py``, which registers these functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable

from hostimaged.boot import automaton, bls, grubcfg, kargs, osrelease, patterns, pe, selinux
from hostimaged.boot.cmdline import Cmdline, validate_arguments
from hostimaged.boot.expressions import Concat, Literal
from hostimaged.boot.loader import Bootloader
from hostimaged.boot.order import boot_counter, choose_names, menu_order, same_for_all
from hostimaged.composefs.tree import Directory, Inline, Leaf, Stat, Symlink, walk
from hostimaged.errors import BootLoaderError, HostimageError, InvalidArgs, UnsupportedImage
from hostimaged.ids import DeploymentId

# What takes its time is refused then, and told from what never ends.
automaton.MAX_WORK = 2_000_000  # type: ignore[misc]
automaton.MAX_NODES = 100_000  # type: ignore[misc]
DEPLOYMENT = DeploymentId("a" * 128)


def entry(data: bytes) -> None:
    """A boot entry; what is written of it is read as the same."""
    found = bls.parse(data, "x.conf")
    assert bool(found.linux) != bool(found.efi)
    assert "/" not in found.artifact()
    named = [("a-1.conf", found), ("a-1_.conf", found), ("b+3.conf", bls.Entry(linux="/x", sort_key="b"))]
    for loader in Bootloader:
        assert menu_order(loader, named) == menu_order(loader, named[::-1])
    with contextlib.suppress(BootLoaderError):
        assert bls.parse(found.serialise(), "x.conf") == found
    found.deployment_id()


def menu(data: bytes) -> None:
    """A menu of GRUB; what is written of it is read as the same."""
    found = grubcfg.parse_user_cfg(data)
    for item in found:
        assert item.label or item.title
        assert "/" not in item.artifact()
        assert item.deployment_id() is None or str(item.deployment_id()) in item.chainloader
    with contextlib.suppress(BootLoaderError):
        around = grubcfg.parse_surroundings(data)
        written = grubcfg.serialise_user_cfg(found, around)
        assert grubcfg.parse_user_cfg(written) == found
        assert not found or grubcfg.parse_surroundings(written) == around
    uuid = grubcfg.parse_efiuuid(data)
    if uuid is not None:
        assert grubcfg.parse_efiuuid(grubcfg.serialise_efiuuid(uuid)) == uuid


def uki(data: bytes) -> None:
    """A unified kernel image, and the digest of its sections, computed from the whole."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        found = pe.Uki.read(fd, "x.efi")
        assert pe.read_cmdline(fd, "x.efi") == found.cmdline
    finally:
        os.close(fd)
    sections = [_section(data, name) for name in (b".linux", b".initrd", b".cmdline", b".osrel")]
    linux, initrd, cmdline, osrel = sections
    assert linux is not None
    assert initrd is not None
    assert found.boot_digest.hex == hashlib.sha256(linux + initrd).hexdigest()
    assert found.osrel == osrel
    assert (cmdline or b"").startswith(found.cmdline.encode())
    Cmdline.parse(found.cmdline).composefs()


def _section(data: bytes, name: bytes) -> bytes | None:
    start = struct.unpack_from("<I", data, 0x3C)[0]
    count, optional = struct.unpack_from("<6xH12xH", data, start)
    for at in range(count):
        header = start + 24 + optional + 40 * at
        virtual_size, _, _, offset = struct.unpack_from("<IIII", data, header + 8)
        if data[header : header + 8] == name.ljust(8, b"\0"):
            return data[offset : offset + virtual_size]
    return None


def drop_in(data: bytes) -> None:
    """A drop-in of kernel arguments, applied to a command line."""
    found = [parameter.raw for parameter in kargs.parse_file(data, "x.toml", "x86_64")]
    before = Cmdline.parse("root=x quiet").with_composefs(DEPLOYMENT, optional=True)
    after = kargs.apply(before, ("quiet",), found)
    assert Cmdline.parse(str(after)) == after
    argument = after.composefs()
    assert argument is not None
    assert argument.id == DEPLOYMENT
    assert bls.Entry(version="1", linux="/x", options=str(after)).serialise().count(b"\n") == 3


def os_release(data: bytes) -> None:
    """An os-release, and what it makes of a boot entry."""
    found = osrelease.parse(data)
    version, title = found.entry_version("1"), found.title("x")
    made = bls.Entry(title=title, version=version, linux="/x", sort_key=bls.sort_key(found.id, 0))
    assert bls.parse(made.serialise(), "x") == made
    names = choose_names([(found.id, version), ("fedora", "44"), (found.id, "9.10")])
    assert same_for_all(names)
    assert not any(boot_counter(name)[1] for name in names)
    item = grubcfg.MenuEntry.new(found.boot_label("x"), DEPLOYMENT)
    assert grubcfg.parse_user_cfg(grubcfg.serialise_user_cfg([item])) == [item]
    assert item.label == found.boot_label("x")


def cmdline(data: bytes) -> None:
    """A kernel command line, as such and as the arguments of a caller."""
    text = data.decode("utf-8", "surrogateescape")
    found = Cmdline.parse(text)
    assert Cmdline.parse(str(found)) == found
    if text.count('"') % 2 == 0:
        argument = Cmdline.parse(str(found.with_composefs(DEPLOYMENT, optional=False))).composefs()
        assert argument is not None
        assert argument.id == DEPLOYMENT
    assert found.same_parameters(found)
    assert not found.removing(found.parameters).parameters
    assert found.adding(found.parameters) == found
    with contextlib.suppress(InvalidArgs):
        accepted = validate_arguments([p.raw for p in found.parameters], grub=True)
        assert accepted == found.parameters
        assert text.strip().isascii()
    found.composefs()


#: Paths that rules may be about; those of the rules themselves come besides.
PATHS = (
    b"/",
    b"/usr/lib/a.so.1",
    b"/var/run",
    b"/etc/x-1.conf",
    b"/a\nb/\xff",
    b"/dev/[a]",
    b"/home/a/.ssh/id",
)


def file_contexts(data: bytes) -> None:
    """Rules of SELinux: all at once decide as each on its own, and a tree gets what its paths get."""
    aliases = {}
    with contextlib.suppress(UnsupportedImage):
        aliases = selinux.parse_substitutions(data, "file_contexts.subs")
    rules = list(selinux.parse_contexts(data, "file_contexts"))
    policy = selinux.Policy(rules, {})
    nodes = [patterns.parse(rule.expression)[0] for rule in rules]
    alone = automaton.Automaton()
    for path in (*PATHS, *(rule.expression.replace("\\", "").encode() for rule in rules[:4])):
        for kind in b"d-":
            ending = Literal(bytes([kind]))
            matching = [
                rule.label
                for rule, node in zip(rules, nodes, strict=True)
                if rule.kind in (None, kind) and alone.matches(Concat((node, ending)), path + ending.data)
            ]
            assert policy.label(path, kind) == (matching[-1] if matching else None), path
    _label_tree(rules, aliases)


def _label_tree(rules: list[selinux.Rule], aliases: dict[bytes, bytes]) -> None:
    stat = Stat(0o755, 0, 0, 0, 0, {b"user.a": b"b", selinux.XATTR: b"old"})
    linked = Leaf(stat, Symlink(b"x"))
    lib = Directory(stat, {b"a": linked, b"b": Leaf(stat, Inline(b""))})
    root = Directory(stat, {b"usr": Directory(stat, {b"lib": lib}), b"l": linked})
    policy = selinux.Policy(rules, aliases)
    selinux.relabel(root, policy)
    labels = [node.stat.xattrs.get(selinux.XATTR) for _, node in walk(root)]
    selinux.relabel(root, policy)
    assert [node.stat.xattrs.get(selinux.XATTR) for _, node in walk(root)] == labels
    assert root.stat.xattrs.get(selinux.XATTR) == policy.label(b"/", ord("d"))
    selinux.relabel(root, None)
    assert not any(selinux.XATTR in node.stat.xattrs for _, node in walk(root))


Function = Callable[[bytes], None]
#: Functions with the errors that each may raise and the longest input worth trying.
FUNCTIONS: tuple[tuple[Function, tuple[type[HostimageError], ...], int], ...] = (
    (entry, (BootLoaderError,), 4 << 10),
    (menu, (BootLoaderError,), 4 << 10),
    (uki, (UnsupportedImage, BootLoaderError), 8 << 10),
    (drop_in, (UnsupportedImage,), 4 << 10),
    (os_release, (UnsupportedImage,), 4 << 10),
    (cmdline, (BootLoaderError,), 4 << 10),
    (file_contexts, (UnsupportedImage,), 1 << 10),
)
