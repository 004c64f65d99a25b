r"""The dump file: a composefs tree as text, one name a line.

``PATH SIZE MODE NLINK UID GID RDEV MTIME PAYLOAD CONTENT DIGEST [KEY=VALUE ...]``, fields divided by one
space, bytes escaped as ``\xHH``. Facts: composefs-dump(5) of C composefs, with the limits and the strictness
of composefs-rs 0.9 (dumpfile, dumpfile_parse). Reads and writes no files by name.
"""

from __future__ import annotations

import io
import re
import stat as st
from typing import TYPE_CHECKING, BinaryIO, Final

from hostimage_dbus.errors import ErrorName
from hostimaged.composefs.bulk import no_gc
from hostimaged.composefs.fsverity import Algorithm, FsVerityError, parse_hex, parse_pathname
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Content,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Leaf,
    Node,
    Socket,
    Sparse,
    Stat,
    Symlink,
    link_counts,
    lookup,
    walk,
)
from hostimaged.errors import HostimageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Limits of composefs-rs 0.9.
MAX_PATH: Final = 4096
MAX_INLINE_CONTENT: Final = 512
MAX_SYMLINK: Final = 1024
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 65535
MAX_XATTR_NAMES: Final = 65535

#: Ours. Far above any line a file system can give, whose xattrs are limited to 64 KiB of names and values.
MAX_LINE: Final = 16 << 20
#: Ours: some fifty times the entries of a large OS; about 4 GiB of memory.
MAX_ENTRIES: Final = 1 << 22

_NUMBER: Final = re.compile(rb"\+?[0-9]{1,40}\Z")
_OCTAL: Final = re.compile(rb"\+?[0-7]{1,40}\Z")
_ESCAPE: Final = re.compile(rb"\\(x[0-9a-fA-F]{2}|.|\Z)", re.DOTALL)
_SIMPLE_ESCAPES: Final = {b"\\": b"\\", b"n": b"\n", b"r": b"\r", b"t": b"\t"}

_WRITTEN: Final = [bytes((c,)) if 0x21 <= c <= 0x7E else b"\\x%02x" % c for c in range(256)]
for _raw, _text in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
    _WRITTEN[_raw[0]] = _text
_WRITTEN_XATTR: Final = [*_WRITTEN]
_WRITTEN_XATTR[ord("=")] = b"\\x3d"
_UNSAFE: Final = re.compile(rb"[^\x21-\x5b\x5d-\x7e]")
_UNSAFE_XATTR: Final = re.compile(rb"[^\x21-\x3c\x3e-\x5b\x5d-\x7e]")

_LINK_LINE: Final = b"%b 0 @120000 - - - - 0.0 %b - -\n"


class DumpfileError(HostimageError):
    """{detail}"""

    name = ErrorName.INVALID_ARGS


def parse(
    data: bytes | BinaryIO | Iterable[bytes], algorithm: Algorithm, *, name: str = "dump file"
) -> Directory:
    """The tree that a dump file describes.

    ``data`` is the whole text, an open binary file, or its lines. ``algorithm`` is the hash of the objects it
    names. Raises ``DumpfileError`` naming ``name`` and the line. ``NLINK`` of files is not looked at.
    """
    parser = _Parser(algorithm)
    try:
        with no_gc():
            for line in _lines(data):
                parser.line(line)
            return parser.finish()
    except (_Bad, FsVerityError) as error:
        where = f"{name}, line {parser.number}" if parser.number else name
        raise DumpfileError(f"{where}: {error}") from None


class _Bad(Exception):
    """What is wrong with a line. Never leaves this module."""


def _lines(data: bytes | BinaryIO | Iterable[bytes]) -> Iterable[bytes]:
    if isinstance(data, bytes):
        data = io.BytesIO(data)
    if isinstance(data, io.RawIOBase | io.BufferedIOBase):
        readline = data.readline
        return iter(lambda: readline(MAX_LINE + 1), b"")
    return data


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    return _ESCAPE.sub(_unescape_one, field)


def _unescape_one(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if len(code) == 3:
        return bytes.fromhex(code[1:].decode("ascii"))
    try:
        return _SIMPLE_ESCAPES[code]
    except KeyError:
        raise _Bad("invalid escape") from None


def _number(field: bytes, bits: int, what: str) -> int:
    if not _NUMBER.match(field) or (value := int(field)) >> bits:
        raise _Bad(f"invalid {what}")
    return value


def _mode(field: bytes) -> int:
    if not _OCTAL.match(field) or (value := int(field, 8)) >> 32:
        raise _Bad("invalid mode")
    return value


def _mtime(field: bytes) -> tuple[int, int]:
    seconds, dot, nanoseconds = field.partition(b".")
    if not dot:
        raise _Bad("invalid modification time")
    sec = _number(seconds, 64, "modification time")
    nsec = _number(nanoseconds, 64, "modification time")
    if nsec >= 1_000_000_000:
        raise _Bad("nanoseconds of the modification time are out of range")
    return (sec - (1 << 64) if sec >> 63 else sec), nsec


def _path(field: bytes, what: str) -> bytes:
    path = _unescape(field)
    if not path:
        raise _Bad(f"{what} is empty")
    if b"\0" in path:
        raise _Bad(f"{what} has a NUL in it")
    if len(path) > MAX_PATH:
        raise _Bad(f"{what} is too long")
    return path


def _canonical(field: bytes, what: str) -> bytes:
    path = _path(field, what)
    if path == b"/":
        return path
    start, *names = path.split(b"/")
    if start or not names or b"" in names or b"." in names or b".." in names:
        raise _Bad(f"{what} is not absolute and canonical")
    return path


def _xattrs(fields: list[bytes]) -> dict[bytes, bytes]:
    pairs = []
    total = 0
    for field in fields:
        key, equals, value = field.partition(b"=")
        if not equals:
            raise _Bad("extended attribute without =")
        key, value = _unescape(key), _unescape(value)
        total += len(key)
        if b"\0" in key:
            raise _Bad("name of an extended attribute has a NUL in it")
        if len(key) > MAX_XATTR_NAME or len(value) > MAX_XATTR_VALUE or total > MAX_XATTR_NAMES:
            raise _Bad("extended attributes are too long")
        pairs.append((key, value))
    # Of two with one name the greater value wins, as in composefs-rs.
    return dict(sorted(pairs))


class _Parser:
    """Builds the tree line by line."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        #: Line being parsed; 0 when what is wrong is not about one line.
        self.number = 0
        self._root: Directory | None = None
        self._count = 0
        # By path. A hard link may name a file that is not there any more, as in composefs-rs.
        self._directories: dict[bytes, Directory] = {}
        self._leaves: dict[bytes, Leaf] = {}
        self._replaced: list[tuple[bytes, Node]] = []
        # Most inodes of an OS have one of a few sets of xattrs; sharing them saves memory, and time when an
        # image is made.
        self._xattr_sets: dict[tuple[bytes, ...], dict[bytes, bytes]] = {}

    def line(self, line: bytes) -> None:
        """Parse the next line."""
        self.number += 1
        if len(line) > MAX_LINE:
            raise _Bad("line is too long")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if line and not line.isspace():
            self._entry(line)

    def _entry(self, line: bytes) -> None:
        if not line.isascii():
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise _Bad("not UTF-8") from None
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise _Bad("too many entries")
        fields = line.split(b" ")
        if len(fields) < 9:
            raise _Bad("fields are missing")
        path = _canonical(fields[0], "path")
        if self._root is None and path != b"/":
            raise _Bad("the first entry is not /")
        if b"@" in fields[2]:
            self._hard_link(path, fields)
            return
        if len(fields) < 11:
            raise _Bad("fields are missing")
        mode = _mode(fields[2])
        if path == b"/":
            # The type of the root's line does not matter, but the line must be a good one.
            self._content(fields, mode)
            self._set_root(self._stat(fields, mode))
        elif st.S_ISDIR(mode):
            self._content(fields, mode)
            directory = Directory(self._stat(fields, mode), {})
            self._insert(path, directory)
            self._directories[path] = directory
        else:
            content = self._content(fields, mode)
            assert content is not None
            leaf = Leaf(self._stat(fields, mode), content)
            self._insert(path, leaf)
            self._leaves[path] = leaf

    def finish(self) -> Directory:
        """The tree."""
        self.number = 0
        if self._root is None:
            raise _Bad("there is no entry for /")
        if self._replaced:
            # composefs-rs makes no image from a tree in which a file was replaced and has no name left.
            counts = link_counts(self._root)
            for path, node in self._replaced:
                lost = link_counts(node) if isinstance(node, Directory) else [node]
                if not all(leaf in counts for leaf in lost):
                    raise _Bad(f"{path.decode('utf-8', 'backslashreplace')} is replaced by a later entry")
        return self._root

    def _set_root(self, stat: Stat) -> None:
        if self._root is None:
            self._root = self._directories[b"/"] = Directory(stat, {})
        else:
            self._root.stat = stat

    def _insert(self, path: bytes, node: Directory | Leaf) -> None:
        above, _, name = path.rpartition(b"/")
        parent = self._directories.get(above or b"/")
        if parent is None:
            assert self._root is not None
            found = lookup(self._root, above)
            if not isinstance(found, Directory):
                raise _Bad("the parent directory does not come before")
            parent = self._directories[above] = found
        old = parent.entries.get(name)
        if old is not None:
            self._replaced.append((path, old))
            if isinstance(old, Directory):
                self._directories.clear()
        parent.entries[name] = node

    def _hard_link(self, path: bytes, fields: list[bytes]) -> None:
        _number(fields[1], 64, "size")
        if st.S_ISDIR(_mode(fields[2].partition(b"@")[2])):
            raise _Bad("hard link to a directory")
        if fields[8] == b"-":
            raise _Bad("hard link without a target")
        leaf = self._leaves.get(_canonical(fields[8], "target of the hard link"))
        if leaf is None:
            raise _Bad("the target of the hard link does not come before")
        if path == b"/":
            # composefs-rs gives the root no metadata then, which nobody can want.
            raise _Bad("/ is not a directory")
        self._insert(path, leaf)
        self._leaves[path] = leaf

    def _stat(self, fields: list[bytes], mode: int) -> Stat:
        key = tuple(fields[11:])
        xattrs = self._xattr_sets.get(key)
        if xattrs is None:
            xattrs = self._xattr_sets[key] = _xattrs(fields[11:])
        uid = _number(fields[4], 32, "user")
        gid = _number(fields[5], 32, "group")
        sec, nsec = _mtime(fields[7])
        return Stat(mode & 0o7777, uid, gid, sec, nsec, xattrs)

    def _content(self, fields: list[bytes], mode: int) -> Content | None:
        """What the entry holds, None for a directory."""
        size = _number(fields[1], 64, "size")
        nlink = _number(fields[3], 32, "link count")
        rdev = _number(fields[6], 64, "device number")
        kind = st.S_IFMT(mode)
        if kind not in (st.S_IFBLK, st.S_IFCHR) and rdev:
            raise _Bad("device number on something else than a device")
        if kind == st.S_IFREG:
            return self._regular(fields, size)
        if fields[9] != b"-":
            raise _Bad("content on something else than a regular file")
        if fields[10] != b"-":
            raise _Bad("digest on something else than a regular file")
        if kind == st.S_IFLNK:
            if fields[8] == b"-":
                raise _Bad("symbolic link without a target")
            target = _path(fields[8], "target of the symbolic link")
            if len(target) > MAX_SYMLINK:
                raise _Bad("target of the symbolic link is too long")
            return Symlink(target)
        if kind == st.S_IFCHR and not rdev and nlink > 1:
            raise _Bad("whiteout with hard links")
        return _special(kind, rdev)

    def _regular(self, fields: list[bytes], size: int) -> Content:
        payload, content, digest = fields[8:11]
        if payload == b"-":
            data = b"" if content == b"-" else _unescape(content)
            if len(data) > MAX_INLINE_CONTENT:
                raise _Bad("inline content is too long")
            if digest != b"-":
                raise _Bad("digest on a file without an object")
            return Sparse(size) if size and not data else Inline(data)
        path = _path(payload, "path of the object")
        if digest == b"-":
            return ExternalNoVerity(parse_pathname(self._algorithm, path), size)
        return External(parse_hex(self._algorithm, digest), size)


def _special(kind: int, rdev: int) -> Content | None:
    if kind == st.S_IFDIR:
        return None
    if kind == st.S_IFCHR:
        return CharDevice(rdev)
    if kind == st.S_IFBLK:
        return BlockDevice(rdev)
    if kind == st.S_IFIFO:
        return Fifo()
    if kind == st.S_IFSOCK:
        return Socket()
    raise _Bad("mode without a file type")


def write(root: Directory) -> Iterator[bytes]:
    """The lines of the dump file of a tree, in the canonical form of composefs-rs 0.9.

    Depth first, children by name. A leaf with several names is written in full at its first name in that
    order. An ``ExternalNoVerity`` is written like an ``External``; negative times are written, but cannot be
    read back.
    """
    counts = link_counts(root)
    first_name: dict[Leaf, bytes] = {}
    for path, node in walk(root):
        shown = _escape(path)
        if isinstance(node, Directory):
            children = sum(isinstance(child, Directory) for child in node.entries.values())
            yield _line(shown, 0, st.S_IFDIR, 2 + children, node.stat, 0, b"- - -")
            continue
        nlink = counts[node]
        if nlink > 1:
            if node in first_name:
                yield _LINK_LINE % (shown, first_name[node])
                continue
            first_name[node] = shown
        yield _leaf_line(shown, node, nlink)


def _leaf_line(shown: bytes, leaf: Leaf, nlink: int) -> bytes:
    kind, size, rdev, rest = st.S_IFREG, 0, 0, b"- - -"
    match leaf.content:
        case Inline(data):
            size, rest = len(data), b"- %b -" % _escape(data)
        case External(object_id, size) | ExternalNoVerity(object_id, size):
            rest = f"{object_id.pathname} - {object_id.hex()}".encode("ascii")
        case Sparse(size):
            pass
        case Symlink(target):
            kind, size, rest = st.S_IFLNK, len(target), b"%b - -" % _escape(target)
        case CharDevice(rdev):
            kind = st.S_IFCHR
        case BlockDevice(rdev):
            kind = st.S_IFBLK
        case Fifo():
            kind = st.S_IFIFO
        case Socket():
            kind = st.S_IFSOCK
    return _line(shown, size, kind, nlink, leaf.stat, rdev, rest)


def _line(shown: bytes, size: int, kind: int, nlink: int, stat: Stat, rdev: int, rest: bytes) -> bytes:
    mode, uid, gid, mtime, nsec, xattrs = stat
    line = b"%b %d %o %d %d %d %d %d.%d %b" % (
        shown, size, mode | kind, nlink, uid, gid, rdev, mtime, nsec, rest,
    )  # fmt: skip
    for key, value in sorted(xattrs.items()):
        line += b" %b=%b" % (_escape_xattr(key), _escape_xattr(value))
    return line + b"\n"


def _escape(data: bytes) -> bytes:
    if not data:
        return b"-"
    if data == b"-":
        return b"\\x2d"
    if _UNSAFE.search(data):
        return b"".join([_WRITTEN[c] for c in data])
    return data


def _escape_xattr(data: bytes) -> bytes:
    # An empty value and a lone dash stand for themselves here, unlike in the other fields.
    if _UNSAFE_XATTR.search(data):
        return b"".join([_WRITTEN_XATTR[c] for c in data])
    return data
