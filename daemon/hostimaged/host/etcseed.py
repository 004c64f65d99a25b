"""The first ``/etc`` and ``/var`` of a deployment: written from the image's tree and objects, not a mount.

What ``cp -a`` from the mounted image gives: owner, mode, times, extended attributes, devices and hard links.
The directory appears under its name when it is whole::

    state/deploy/<id>/etc           modes bind: a copy; none and transient: empty, nothing looks there
    state/deploy/<id>/etc/upper     mode overlay: what differs from the image, with the metadata of its /etc
    state/deploy/<id>/etc/work      mode overlay: the kernel's
    state/deploy/<id>/.etc-seed     on the way; left by a crash
    state/os/default/var
    state/os/default/.var-seed      on the way; left by a crash

Nothing is synced but the name: whoever lets a deployment be found calls syncfs first.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.tree import (
    PERMISSION_MASK,
    BlockDevice,
    CharDevice,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Sparse,
    Symlink,
    link_counts,
)
from hostimaged.errors import VerityMismatch, from_os_error
from hostimaged.host.etctree import STAMP, subdirectory
from hostimaged.host.setuproot import MountMode
from hostimaged.system import durable, trees
from hostimaged.system.trees import Metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Content, Leaf, Stat
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter

ETC: Final = "etc"
UPPER: Final = b"upper"
WORK: Final = b"work"
SEED: Final = ".etc-seed"
VAR: Final = "var"
VAR_SEED: Final = ".var-seed"

_WORK_MODE: Final = 0o700
_PIECE: Final = 1 << 20
#: Bytes that a name takes besides its content, roughly: inode and entry.
_PER_NAME: Final = 512
_BLOCK: Final = 4096
#: The kernel has none of these for anything but files and directories.
_USER: Final = b"user."
#: Attributes by which overlayfs would take a directory of its upper layer for something else.
OVERLAY_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.")
#: Beyond the time of any file; more does not fit into the system call.
_MAX_TIME: Final = 1 << 40
_TYPES: Final = {
    CharDevice: st.S_IFCHR,
    BlockDevice: st.S_IFBLK,
    Fifo: st.S_IFIFO,
}


def seed_etc(
    image: Directory, repository: Repository, deployment: int, mode: MountMode, reporter: Reporter
) -> None:
    """Make ``etc`` in the state directory open as ``deployment``; one that is there is replaced.

    ``image`` is the root of the image's tree. Raises ``UnsupportedImage``, ``CorruptRepository``,
    ``VerityMismatch``, ``NoSpace``, ``ReadOnly`` or ``StorageError``; then what was there is there.
    """
    etc = subdirectory(image, b"etc")
    try:
        trees.remove_tree(SEED, deployment)
        with _built(SEED, ETC, deployment, lambda step: reporter.at(f"etc-seed.{step}")):
            _make_etc(etc, repository, deployment, mode, reporter)
    except OSError as error:
        raise from_os_error(error, "cannot write /etc of the deployment") from error


@contextlib.contextmanager
def _built(temporary: str, name: str, directory: int, at: Callable[[str], None]) -> Iterator[None]:
    """Build a tree as ``temporary`` inside the block; it then gets ``name``, or is removed after an error.

    ``at`` is called with ``made`` and ``named``.
    """
    try:
        yield
        at("made")
        _put(temporary, name, directory)
    except Exception:
        with contextlib.suppress(OSError):
            trees.remove_tree(temporary, directory)
        raise
    at("named")
    # After an exchange this is what was there before.
    trees.remove_tree(temporary, directory)


def _make_etc(
    etc: Directory, repository: Repository, deployment: int, mode: MountMode, reporter: Reporter
) -> None:
    with trees.new_directory(os.fsencode(SEED), deployment, image_metadata(etc.stat)) as seed:
        trees.forget_acl(seed)
        writer = ImageWriter(repository, seed, lambda: reporter.at("etc-seed.write"))
        if mode is MountMode.BIND:
            shown = {name: node for name, node in etc.entries.items() if name != STAMP}
            writer.write(Directory(etc.stat, shown), seed)
        elif mode is MountMode.OVERLAY:
            make_overlay(etc, seed)


def make_overlay(etc: Directory, parent: int) -> None:
    """Make the empty ``upper`` and ``work`` of an overlay on the image's ``etc``."""
    with trees.new_directory(UPPER, parent, upper_metadata(etc.stat)) as upper:
        if STAMP in etc.entries:
            whiteout(STAMP, upper)
    make_work(parent)


def make_work(parent: int) -> None:
    """Make the empty ``work`` of an overlay."""
    os.mkdir(WORK, _WORK_MODE, dir_fd=parent)


def whiteout(name: bytes, parent: int) -> None:
    """Hide ``name`` of the lower layer of an overlay."""
    os.mknod(name, st.S_IFCHR, 0, dir_fd=parent)


def _put(temporary: str, name: str, directory: int) -> None:
    """Give a whole tree its name; one that has it gets the temporary name."""
    try:
        durable.publish_name(directory, temporary, name)
    except FileExistsError:
        durable.exchange_names(directory, temporary, name)


def seed_var(image: Directory, repository: Repository, shared: int, reporter: Reporter) -> bool:
    """Make ``var`` in the directory open as ``shared``, unless there is one with content; says if it did.

    Raises as ``seed_etc`` does.
    """
    var = subdirectory(image, b"var")
    try:
        if VAR in os.listdir(shared):
            with trees.opened_directory(VAR, shared) as present:
                if os.listdir(present):
                    return False
        trees.remove_tree(VAR_SEED, shared)
    except OSError as error:
        raise from_os_error(error, "cannot read the shared /var") from error
    try:
        with (
            _built(VAR_SEED, VAR, shared, lambda step: reporter.at(f"var-seed.{step}")),
            trees.new_directory(os.fsencode(VAR_SEED), shared, image_metadata(var.stat)) as seed,
        ):
            trees.forget_acl(seed)
            ImageWriter(repository, seed, lambda: reporter.at("var-seed.write")).write(var, seed)
    except OSError as error:
        raise from_os_error(error, "cannot write /var") from error
    return True


def seed_bytes(directory: Directory, mode: MountMode = MountMode.BIND) -> int:
    """About how many bytes of a file system the seed of ``directory`` takes."""
    if mode is not MountMode.BIND:
        return 4 * _BLOCK
    leaves = link_counts(directory)
    total = 0
    pending = [directory]
    while pending:
        total += _BLOCK
        for node in pending.pop().entries.values():
            total += _PER_NAME
            if isinstance(node, Directory):
                pending.append(node)
    return total + sum(-(-_content_size(leaf.content) // _BLOCK) * _BLOCK for leaf in leaves)


def _content_size(content: Content) -> int:
    if isinstance(content, External | ExternalNoVerity):
        return content.size
    return len(content.data) if isinstance(content, Inline) else 0


# --- metadata ----------------------------------------------------------------------------------------------


def image_metadata(stat: Stat, *, regular: bool = True) -> Metadata:
    """Metadata of an inode of an image; ``regular``: it is a file or a directory."""
    xattrs: Mapping[bytes, bytes] = stat.xattrs
    if xattrs and not regular:
        xattrs = {name: value for name, value in xattrs.items() if not name.startswith(_USER)}
    mtime = min(stat.mtime, _MAX_TIME) * 1_000_000_000 + stat.nsec
    return Metadata(stat.mode & PERMISSION_MASK, stat.uid, stat.gid, mtime, xattrs)


def upper_metadata(stat: Stat) -> Metadata:
    """Metadata of a directory of an image in the upper layer of an overlay."""
    return without_overlay(image_metadata(stat))


def without_overlay(metadata: Metadata) -> Metadata:
    """The metadata without what would mean something to overlayfs."""
    if not any(name.startswith(OVERLAY_XATTRS) for name in metadata.xattrs):
        return metadata
    kept = {name: value for name, value in metadata.xattrs.items() if not name.startswith(OVERLAY_XATTRS)}
    return metadata._replace(xattrs=kept)


# --- writing -----------------------------------------------------------------------------------------------


class ImageWriter:
    """Writes nodes of an image beneath the directory open as ``root``; ``tick`` is called once per name."""

    def __init__(self, repository: Repository, root: int, tick: Callable[[], None]) -> None:
        self._repository = repository
        self._root = root
        self._tick = tick
        self._counts: dict[Leaf, int] = {}
        #: Path from the root of the first name of a leaf that has several.
        self._made: dict[Leaf, bytes] = {}

    def write(self, directory: Directory, target: int) -> None:
        """Write what is in ``directory`` to the root. Raises ``OSError``, and as opening objects does."""
        self._counts = link_counts(directory)
        self._directory(directory, target, b"", 0)

    def _directory(self, directory: Directory, target: int, prefix: bytes, depth: int) -> None:
        if depth > trees.MAX_DEPTH:
            raise trees.TooDeep
        for name, node in sorted(directory.entries.items()):
            self._tick()
            if isinstance(node, Directory):
                with trees.new_directory(name, target, image_metadata(node.stat)) as below:
                    self._directory(node, below, prefix + name + b"/", depth + 1)
            else:
                self._leaf(node, name, target, prefix + name)

    def _leaf(self, leaf: Leaf, name: bytes, target: int, path: bytes) -> None:
        shared = self._counts[leaf] > 1
        if shared and leaf in self._made and trees.link(self._made[leaf], self._root, name, target):
            return
        match leaf.content:
            case Symlink(text):
                trees.new_symlink(name, target, text, image_metadata(leaf.stat, regular=False))
            case Inline() | External() | ExternalNoVerity() | Sparse():
                with trees.new_file(name, target, image_metadata(leaf.stat)) as fd:
                    self._content(leaf.content, fd)
            case CharDevice() | BlockDevice() | Fifo():
                self._special(leaf, name, target, _TYPES[type(leaf.content)])
            case _:
                self._special(leaf, name, target, st.S_IFSOCK)
        if shared:
            self._made[leaf] = path

    def _special(self, leaf: Leaf, name: bytes, target: int, kind: int) -> None:
        content = leaf.content
        device = content.rdev if isinstance(content, CharDevice | BlockDevice) else 0
        metadata = image_metadata(leaf.stat, regular=False)
        trees.new_special(name, target, kind, device, metadata)

    def _content(self, content: Inline | External | ExternalNoVerity | Sparse, fd: int) -> None:
        match content:
            case Inline(data):
                durable.write_all(fd, data)
            case Sparse(size):
                os.ftruncate(fd, size)
            case External(object_id, size) | ExternalNoVerity(object_id, size):
                source = self._repository.open_object(object_id)
                try:
                    self._copy_object(source, object_id, size, fd)
                finally:
                    os.close(source)

    def _copy_object(self, source: int, object_id: ObjectId, size: int, fd: int) -> None:
        if self._repository.secure:
            # The kernel checks what it reads.
            trees.copy_content(source, fd, size)
            return
        hasher = fsverity.Hasher(self._repository.algorithm)
        while data := os.read(source, _PIECE):
            hasher.update(data)
            durable.write_all(fd, data)
        if (found := hasher.finish()) != object_id:
            raise VerityMismatch(f"object {object_id.hex()} has content with the digest {found.hex()}")
