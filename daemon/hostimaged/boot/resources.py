"""What an image brings to boot with: a kernel and its initrd, or a unified kernel image.

Facts: bootc, boot entries (what an image offers); composefs-rs 0.9, ``composefs-boot`` (boot loader). Looked
for in the tree as the layers make it, before ``/boot`` is emptied; symbolic links are not followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NoReturn

from hostimaged.boot.files import is_regular
from hostimaged.composefs.tree import Directory, Leaf
from hostimaged.errors import UnsupportedImage, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Directories in each other below a place for unified kernel images; add-ons lie one level down.
MAX_DEPTH: Final = 8
#: Unified kernel images and add-ons of one image together.
MAX_UKIS: Final = 1000

_ENTRIES: Final = "boot/loader/entries"
_UKIS: Final = "boot/EFI/Linux"
_MODULES: Final = "usr/lib/modules"
_EFI: Final = b".efi"
_ADDON: Final = b".addon.efi"
_ADDONS: Final = b".efi.extra.d"


class BootType(StrEnum):
    """How an image boots; the values are those of bootc's records."""

    #: Kernel and initrd apart, with an entry of the boot loader that has the arguments.
    BLS = "bls"
    #: One signed file with kernel, initrd and arguments.
    UKI = "uki"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and its initrd, from ``/usr/lib/modules/<version>``."""

    version: str
    vmlinuz: Leaf
    initrd: Leaf

    @property
    def boot_type(self) -> BootType:
        """What this makes of the image."""
        return BootType.BLS


@dataclass(frozen=True, slots=True)
class Addon:
    """An add-on that belongs to a unified kernel image; ``name`` is its file name."""

    name: str
    leaf: Leaf


@dataclass(frozen=True, slots=True)
class UnifiedKernel:
    """A unified kernel image and its add-ons; ``name`` is its file name. ``version`` is "" in ``/boot``."""

    name: str
    version: str
    leaf: Leaf
    addons: tuple[Addon, ...]

    @property
    def boot_type(self) -> BootType:
        """What this makes of the image."""
        return BootType.UKI


def find_resources(root: Directory) -> Kernel | UnifiedKernel:
    """What the image boots with. Of several kernels it is the first in the order of their names.

    A unified kernel image comes first, one in ``/boot`` before one with the modules. Raises
    ``UnsupportedImage`` for none, for a kernel without initrd, and for boot entries of the image's own, whose
    files could not be told from those of other deployments.
    """
    entries = _directory(root, _ENTRIES)
    if entries is not None and any(name.endswith(b".conf") for name in entries.entries):
        raise UnsupportedImage(f"the image has boot entries of its own in /{_ENTRIES}")
    found = _unified(_directory(root, _UKIS), "")
    modules = sorted(_modules(root))
    for version, directory in modules:
        found = found or _unified(directory, _text(version))
    if found is not None:
        return found
    for version, directory in modules:
        vmlinuz = _file(directory, b"vmlinuz")
        if vmlinuz is None:
            continue
        initrd = _file(directory, b"initramfs.img")
        if initrd is None:
            raise UnsupportedImage(f"kernel {printable(version)} of the image has no initramfs.img")
        return Kernel(_text(version), vmlinuz, initrd)
    raise UnsupportedImage(f"the image has no kernel: neither /{_MODULES}/*/vmlinuz nor /{_UKIS}/*.efi")


def _directory(root: Directory, path: str) -> Directory | None:
    """The directory at ``path``, None if it or one above it is absent."""
    directory = root
    for name in path.encode().split(b"/"):
        child = directory.entries.get(name)
        if child is None:
            return None
        if not isinstance(child, Directory):
            raise UnsupportedImage(f"{name.decode()} of /{path} in the image is not a directory")
        directory = child
    return directory


def _modules(root: Directory) -> Iterator[tuple[bytes, Directory]]:
    modules = _directory(root, _MODULES)
    for name, node in modules.entries.items() if modules is not None else ():
        if isinstance(node, Directory):
            yield name, node


def _file(directory: Directory, name: bytes) -> Leaf | None:
    node = directory.entries.get(name)
    return node if isinstance(node, Leaf) and is_regular(node) else None


def _unified(directory: Directory | None, version: str) -> UnifiedKernel | None:
    """The first unified kernel image below ``directory``, one at the top before those further down."""
    if directory is None:
        return None
    found = list(_efi_files(directory))
    kernels = [
        (depth, name, holder, leaf) for depth, name, holder, leaf in found if not name.endswith(_ADDON)
    ]
    if not kernels:
        return None
    _, name, holder, leaf = min(kernels, key=lambda kernel: kernel[:2])
    extra = holder.entries.get(name.removesuffix(_EFI) + _ADDONS)
    addons = sorted(extra.entries.items()) if isinstance(extra, Directory) else []
    return UnifiedKernel(
        _text(name),
        version,
        leaf,
        tuple(
            Addon(_text(addon), node)
            for addon, node in addons
            if addon.endswith(_ADDON) and isinstance(node, Leaf) and is_regular(node)
        ),
    )


def _efi_files(directory: Directory) -> Iterator[tuple[int, bytes, Directory, Leaf]]:
    """Files whose names end in ``.efi``: how deep they lie, name, directory, file."""
    pending = [(0, directory)]
    count = 0
    while pending:
        depth, holder = pending.pop()
        for name, node in holder.entries.items():
            if isinstance(node, Directory):
                if depth < MAX_DEPTH:
                    pending.append((depth + 1, node))
                continue
            if not name.endswith(_EFI):
                continue
            if not is_regular(node):
                _refuse(name, "is not a regular file")
            count += 1
            if count > MAX_UKIS:
                raise UnsupportedImage(f"the image has more than {MAX_UKIS} EFI programs in one place")
            yield depth, name, holder, node


def _text(name: bytes) -> str:
    """A name that boot loaders can be told: printable ASCII without separators."""
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        _refuse(name, "is no name for a boot loader")
    if not text.isprintable() or " " in text or "\\" in text:
        _refuse(name, "is no name for a boot loader")
    return text


def _refuse(name: bytes, why: str) -> NoReturn:
    raise UnsupportedImage(f"{printable(name)} in the image {why}")
