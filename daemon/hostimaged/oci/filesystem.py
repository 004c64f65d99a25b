"""From layers to the tree that becomes an image (composefs-rs 0.9, tar to filesystem).

Everything here changes image ids. Not here: labels and other changes for booting; the image itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, NoReturn

from hostimaged.composefs.bulk import no_gc
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import Directory, Leaf, Stat
from hostimaged.errors import UnsupportedImage
from hostimaged.oci.entries import HardLink, metadata_size, read_entries
from hostimaged.oci.paths import WHITEOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Node
    from hostimaged.ids import ObjectId
    from hostimaged.oci.entries import Entry, KeptEntries

#: Entries of all layers of an image. Bounds memory: an entry takes about 450 bytes as a tree.
MAX_ENTRIES: Final = 2_000_000
#: Bytes of names, link targets, attributes and inline contents of all entries of an image together, for the
#: same reason. An image of 100,000 files has about 10 MB.
MAX_METADATA: Final = 512 << 20

_OPAQUE: Final = WHITEOUT + b".wh..opq"
_CAPABILITY: Final = b"security.capability"
_USER: Final = b"user."
_NO_XATTRS: Final[dict[bytes, bytes]] = {}


class XattrMode(StrEnum):
    """Which extended attributes an image keeps; the values are composefs-rs's names."""

    #: Only file capabilities. The default.
    ALLOWLIST_ONLY = "allowlist-only"
    #: File capabilities and everything that begins with ``user.``.
    KEEP_USER_XATTRS = "keep-user-xattrs"


class TreeBuilder:
    """Applies the entries of layers, lowest layer first, and gives the tree of the image.

    Nothing is created that no entry asks for: a missing parent is an error, as in composefs-rs and unlike in
    container engines. An opaque marker hides everything present, entries of its own layer included.
    """

    def __init__(self, xattrs: XattrMode = XattrMode.ALLOWLIST_ONLY) -> None:
        self._keep_user = xattrs is XattrMode.KEEP_USER_XATTRS
        self._root = Directory(Stat(0, 0, 0, 0, 0, _NO_XATTRS), {})
        self._entries = 0
        self._metadata = 0
        # The directory of the previous entry: mostly that of the next one, too. Forgotten whenever a
        # directory may have gone from the tree.
        self._last_path: tuple[bytes, ...] = ()
        self._last: Directory | None = self._root

    def apply(self, entry: Entry) -> None:
        """Add, replace or remove what ``entry`` says. Raises ``UnsupportedImage``."""
        path, stat, item = entry
        self._account(entry)
        if stat.xattrs:
            stat = stat._replace(xattrs=self._kept(stat.xattrs))
        if not path:
            if item is not None:
                raise UnsupportedImage("a layer has a root that is not a directory")
            self._root.stat = stat
            return
        node: Node
        if item is None:
            node = Directory(stat, {})
        elif isinstance(item, HardLink):
            node = self._link_target(path, item)
        else:
            node = Leaf(stat, item)
        parent = self._directory(path)
        name = path[-1]
        if name.startswith(WHITEOUT):
            self._white_out(parent, name)
        else:
            self._put(parent, name, node)

    def _account(self, entry: Entry) -> None:
        path, stat, item = entry
        self._metadata += metadata_size(stat, item) + (len(path[-1]) if path else 0)
        self._entries += 1
        if self._entries > MAX_ENTRIES or self._metadata > MAX_METADATA:
            raise UnsupportedImage("the image has more files than can be held in memory")

    def _kept(self, xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """The attributes that the image keeps; dropping the others at the end would give the same."""
        if self._keep_user:
            return {k: v for k, v in xattrs.items() if k == _CAPABILITY or k.startswith(_USER)}
        if _CAPABILITY in xattrs:
            return {_CAPABILITY: xattrs[_CAPABILITY]}
        return _NO_XATTRS

    def _directory(self, path: tuple[bytes, ...]) -> Directory:
        """The directory that holds ``path``; it must exist, without symbolic links on the way."""
        parents = path[:-1]
        if self._last is not None and parents == self._last_path:
            return self._last
        directory = self._root
        for name in parents:
            child = directory.entries.get(name)
            if not isinstance(child, Directory):
                _refuse(path, "its directory is missing" if child is None else "its parent is no directory")
            directory = child
        self._last_path, self._last = parents, directory
        return directory

    def _link_target(self, path: tuple[bytes, ...], link: HardLink) -> Leaf:
        directory: Node | None = self._root
        for name in link.target:
            directory = directory.entries.get(name) if isinstance(directory, Directory) else None
        if not isinstance(directory, Leaf):
            _refuse(path, "a hard link to something that is not there, or a directory")
        return directory

    def _white_out(self, parent: Directory, name: bytes) -> None:
        if name == _OPAQUE:
            parent.entries.clear()
        else:
            parent.entries.pop(name.removeprefix(WHITEOUT), None)
        self._last = None

    def _put(self, parent: Directory, name: bytes, node: Node) -> None:
        present = parent.entries.get(name)
        if isinstance(present, Directory):
            if isinstance(node, Directory):
                present.stat = node.stat
                return
            self._last = None
        parent.entries[name] = node

    def finish(self) -> Directory:
        """The tree, made what an image holds: see ``transform_for_oci``."""
        transform_for_oci(self._root)
        return self._root


def transform_for_oci(root: Directory) -> None:
    """Give the root the metadata of ``/usr`` and empty ``/run``; attributes were filtered before.

    Layers mostly have no entry for the root, and engines put what they like into both. Raises
    ``UnsupportedImage`` if ``/usr`` is no directory, or ``/run`` is there and is none.
    """
    usr, run = root.entries.get(b"usr"), root.entries.get(b"run")
    if not isinstance(usr, Directory):
        raise UnsupportedImage("the image has no directory /usr")
    root.stat = usr.stat
    if run is not None:
        if not isinstance(run, Directory):
            raise UnsupportedImage("/run of the image is not a directory")
        run.entries.clear()
        run.stat = run.stat._replace(mtime=usr.stat.mtime, nsec=usr.stat.nsec)


def _refuse(path: tuple[bytes, ...], why: str) -> NoReturn:
    shown = (b"/" + b"/".join(path)).decode("utf-8", "backslashreplace")
    raise UnsupportedImage(f"{shown[:300]}: {why}")


def build_tree(
    repository: Repository,
    layers: Sequence[ObjectId],
    xattrs: XattrMode = XattrMode.ALLOWLIST_ONLY,
    kept: KeptEntries | None = None,
) -> Directory:
    """The tree of an image from the stream ids of its layers, lowest first.

    Entries that are ``kept`` are taken from there. The layers' digests are not verified again. Raises
    ``UnsupportedImage``, ``CorruptRepository``.
    """
    builder = TreeBuilder(xattrs)
    with no_gc():
        for layer in layers:
            if kept is not None and (entries := kept.take(layer)) is not None:
                for entry in entries:
                    builder.apply(entry)
                continue
            with repository.open_stream("", layer, ContentType.LAYER) as stream:
                for entry in read_entries(stream.chunks()):
                    builder.apply(entry)
    return builder.finish()
