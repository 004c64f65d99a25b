"""Extended attributes of an image being written: encoding, name filter, sharing.

Inodes with equal xattrs share one ``Group``, so the work is done once per distinct set, not once per inode.
What differs for every external file, the two overlayfs attributes that name its object, is kept apart in it.
Facts: EROFS on-disk format; composefs-rs 0.9, erofs writer.
"""

from __future__ import annotations

import struct
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from hostimaged.composefs.erofs.format import (
    PREFIX_TRUSTED,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_PREFIXES,
    Format,
    UnsupportedTree,
)
from hostimaged.composefs.erofs.xxh32 import xxh32
from hostimaged.ids import ObjectId

if TYPE_CHECKING:
    from hostimaged.composefs.fsverity import Algorithm

_FILTER_SEED: Final = 0x25BBE08F
_PREFIX_LUSTRE: Final = 5
_ACL_PREFIXES: Final = (2, 3)
_MAX_SUFFIX: Final = 255
_MAX_VALUE: Final = 65535
#: The count of references is one byte.
_MAX_REFERENCES: Final = 255
#: The size of the xattrs is a 16-bit count of words.
_MAX_ICOUNT: Final = 65535

_OVERLAY: Final = b"trusted.overlay."
_ESCAPED: Final = b"trusted.overlay.overlay."
METACOPY: Final = b"overlay.metacopy"
REDIRECT: Final = b"overlay.redirect"

#: Appended to an escaped whiteout, to a directory with whiteouts, to one in format V1, and to the root.
WHITEOUT: Final = ((_ESCAPED + b"whiteout", b""), (b"user.overlay.whiteout", b""))
WHITEOUTS: Final = ((_ESCAPED + b"whiteouts", b""), (b"user.overlay.whiteouts", b""))
OPAQUE_X: Final = ((_ESCAPED + b"opaque", b"x"), (b"user.overlay.opaque", b"x"))
ROOT_OPAQUE: Final = ((_OVERLAY + b"opaque", b"y"),)

Pairs: TypeAlias = tuple[tuple[bytes, bytes], ...]


class Overlay(Enum):
    """Which overlayfs attributes an inode has besides its own."""

    NONE = auto()
    #: An empty metacopy: a file without an object.
    SPARSE = auto()
    #: A metacopy with the digest, and the redirect.
    VERITY = auto()
    #: An empty metacopy, and the redirect.
    NO_VERITY = auto()


class Attribute(NamedTuple):
    """One xattr as stored: number of the prefix, rest of the name, value."""

    prefix: int
    suffix: bytes
    value: bytes

    def packed(self) -> bytes:
        """The entry on disk, padded to words."""
        head = XATTR_ENTRY.pack(len(self.suffix), self.prefix, len(self.value))
        entry = head + self.suffix + self.value
        return entry + bytes(-len(entry) % 4)

    def by_name(self) -> tuple[bytes, int, bytes]:
        """Sort key of formats V0 and V1."""
        return XATTR_PREFIXES[self.prefix] + self.suffix, len(self.value), self.value


class _Slot(Enum):
    """Stands in a list of attributes for one that depends on the object."""

    METACOPY = auto()
    REDIRECT = auto()


_EMPTY_METACOPY: Final = Attribute(PREFIX_TRUSTED, METACOPY, b"")
_Item: TypeAlias = Attribute | _Slot


@lru_cache(maxsize=4096)
def split_name(name: bytes, *, lustre: bool) -> tuple[int, bytes, int]:
    """(number of the prefix, rest of the name, bit in the name filter) of an xattr name."""
    for number in (6, 5, 4, 3, 2, 1, 0):
        if (number != _PREFIX_LUSTRE or lustre) and name.startswith(XATTR_PREFIXES[number]):
            break
    suffix = name[len(XATTR_PREFIXES[number]) :]
    return number, suffix, 1 << (xxh32(suffix, (_FILTER_SEED + number) & 0xFFFFFFFF) % 32)


class Variant:
    """The xattrs of the inodes of a group for which the same attributes are shared."""

    __slots__ = ("_local", "_references", "constant", "head", "icount", "size")

    def __init__(
        self, references: list[_Item], local: list[_Item], names: int, id_sizes: dict[_Slot, int]
    ) -> None:
        #: The bytes, where they are the same for all and known; else None.
        self.constant: bytes | None = None
        self._references = references
        # Constant bytes and slots, in order.
        self._local: list[bytes | _Slot] = []
        size = 4 * len(references)
        for item in local:
            if isinstance(item, _Slot):
                size += id_sizes[item]
                self._local.append(item)
                continue
            packed = item.packed()
            size += len(packed)
            if self._local and isinstance(last := self._local[-1], bytes):
                self._local[-1] = last + packed
            else:
                self._local.append(packed)
        #: Bytes of the xattrs in the inode.
        self.size = size + XATTR_HEADER.size if size else 0
        #: Value of the inode's icount field.
        self.icount = 1 + size // 4 if size else 0
        if len(references) > _MAX_REFERENCES or self.icount > _MAX_ICOUNT:
            raise UnsupportedTree("an inode has too many extended attributes")
        self.head = XATTR_HEADER.pack(~names & 0xFFFFFFFF, len(references))
        if not size:
            self.constant = b""
        elif not references and len(self._local) == 1 and isinstance(only := self._local[0], bytes):
            self.constant = self.head + only

    def pack(self, table: XattrTable, object_id: ObjectId | None) -> bytes:
        """The bytes for an inode; to be called after ``XattrTable.place``."""
        if self.constant is not None:
            return self.constant
        parts = [self.head]
        per_object = False
        for item in self._references:
            if isinstance(item, _Slot):
                assert object_id is not None
                item = table.of_object(item, object_id)
                per_object = True
            parts.append(table.reference[item])
        for piece in self._local:
            if isinstance(piece, _Slot):
                assert object_id is not None
                piece = table.pack_of_object(piece, object_id)
                per_object = True
            parts.append(piece)
        packed = b"".join(parts)
        if not per_object:
            self.constant = packed
        return packed


class Group:
    """All inodes with the same own xattrs and the same kind of overlayfs attributes."""

    __slots__ = ("count", "items", "names", "variants")

    def __init__(self, items: list[_Item], names: int) -> None:
        self.items = items
        #: Bits of the name filter.
        self.names = names
        self.count = 0
        self.variants: dict[tuple[bool, bool], Variant] = {}


class XattrTable:
    """All xattrs of an image.

    First ``group`` once per inode, then ``share``; then ``variant``; once the place of the shared table is
    known, ``place``, ``table`` and ``Variant.pack``.
    """

    def __init__(self, image_format: Format, algorithm: Algorithm) -> None:
        self._epoch1 = image_format is not Format.V2
        size = algorithm.digest_size
        self._metacopy_head = bytes((0, 4 + size, 0, algorithm.kernel_id))
        metacopy = Attribute(PREFIX_TRUSTED, METACOPY, self._metacopy_head + bytes(size)).packed()
        redirect = Attribute(
            PREFIX_TRUSTED, REDIRECT, b"/" + ObjectId(bytes(size)).pathname.encode()
        ).packed()
        # What stands before digest and path in the entries; both fit words or are padded at the end.
        self._metacopy_prefix = metacopy[:-size]
        self._redirect_prefix = redirect[: XATTR_ENTRY.size + len(REDIRECT)] + b"/"
        self._redirect_padding = bytes(-(len(self._redirect_prefix) + 2 * size + 1) % 4)
        self._id_sizes = {_Slot.METACOPY: len(metacopy), _Slot.REDIRECT: len(redirect)}
        self._groups: dict[tuple[Pairs, Overlay], Group] = {}
        self._by_identity: dict[tuple[int, Overlay], Group] = {}
        # How often each object is named, and how often of that without its digest, which is rare.
        self._ids: dict[ObjectId, int] = {}
        self._bare_ids: dict[ObjectId, int] = {}
        self._shared: set[Attribute] = set()
        self._order: list[Attribute] = []
        #: Reference value of each shared attribute, packed.
        self.reference: dict[Attribute, bytes] = {}
        #: Whether any inode has an attribute with the prefix of an ACL.
        self.has_acl = False

    def group(
        self, xattrs: dict[bytes, bytes], appended: Pairs, overlay: Overlay, object_id: ObjectId | None
    ) -> Group:
        """Count an inode with its own ``xattrs`` and some ``appended`` ones, and return its group.

        ``xattrs`` must not be changed or freed while the image is made.
        """
        if overlay is Overlay.VERITY or overlay is Overlay.NO_VERITY:
            assert object_id is not None
            self._ids[object_id] = self._ids.get(object_id, 0) + 1
            if overlay is Overlay.NO_VERITY:
                self._bare_ids[object_id] = self._bare_ids.get(object_id, 0) + 1
        if not appended:
            # Trees share dictionaries, and this is much cheaper than comparing them.
            group = self._by_identity.get((id(xattrs), overlay))
            if group is None:
                group = self._by_identity[id(xattrs), overlay] = self._find(xattrs, (), overlay)
        else:
            group = self._find(xattrs, appended, overlay)
        group.count += 1
        return group

    def _find(self, xattrs: dict[bytes, bytes], appended: Pairs, overlay: Overlay) -> Group:
        pairs = (
            *(
                (_ESCAPED + name[len(_OVERLAY) :] if name.startswith(_OVERLAY) else name, value)
                for name, value in sorted(xattrs.items())
            ),
            *appended,
        )
        group = self._groups.get((pairs, overlay))
        if group is None:
            group = self._groups[pairs, overlay] = self._make(pairs, overlay)
        return group

    def _make(self, pairs: Pairs, overlay: Overlay) -> Group:
        names = 0
        # (sort key, item); V2 keeps the order of adding.
        items: list[tuple[tuple[bytes, int, bytes], _Item]] = []
        if overlay is not Overlay.NONE:
            names |= split_name(_OVERLAY + b"metacopy", lustre=False)[2]
            slot = _Slot.METACOPY if overlay is Overlay.VERITY else _EMPTY_METACOPY
            items.append(((_OVERLAY + b"metacopy", 0, b""), slot))
            if overlay is not Overlay.SPARSE:
                names |= split_name(_OVERLAY + b"redirect", lustre=False)[2]
                items.append(((_OVERLAY + b"redirect", 0, b""), _Slot.REDIRECT))
        for name, value in pairs:
            number, suffix, bit = split_name(name, lustre=not self._epoch1)
            if len(suffix) > _MAX_SUFFIX or len(value) > _MAX_VALUE:
                raise UnsupportedTree("the name or value of an extended attribute is too long")
            names |= bit
            self.has_acl |= self._epoch1 and number in _ACL_PREFIXES
            items.append(((name, len(value), value), Attribute(number, suffix, value)))
        if self._epoch1:
            items.sort(key=lambda pair: pair[0])
        return Group([item for _, item in items], names)

    def share(self) -> None:
        """Find the attributes that are stored once: those which occur twice or more."""
        counts: dict[Attribute, int] = {}
        for group in self._groups.values():
            for item in group.items:
                if isinstance(item, Attribute):
                    counts[item] = counts.get(item, 0) + group.count
        self._shared = {attribute for attribute, count in counts.items() if count > 1}
        for id_, count in self._ids.items():
            if count > 1:
                self._shared.add(self.of_object(_Slot.REDIRECT, id_))
                if self._has_shared_metacopy(id_):
                    self._shared.add(self.of_object(_Slot.METACOPY, id_))
        if self._epoch1:
            self._order = sorted(self._shared, key=Attribute.by_name, reverse=True)
        else:
            self._order = sorted(self._shared)

    def _has_shared_metacopy(self, object_id: ObjectId) -> bool:
        return self._ids[object_id] - self._bare_ids.get(object_id, 0) > 1

    def variant(self, group: Group, object_id: ObjectId | None) -> Variant:
        """The xattrs of an inode; its ``size`` is known now, its bytes after ``place``."""
        if object_id is None:
            key = (False, False)
        else:
            several = self._ids[object_id] > 1
            key = (several and self._has_shared_metacopy(object_id), several)
        variant = group.variants.get(key)
        if variant is None:
            shared_slots = {
                slot for slot, shared in zip((_Slot.METACOPY, _Slot.REDIRECT), key, strict=True) if shared
            }
            references = [i for i in group.items if i in self._shared or i in shared_slots]
            local = [i for i in group.items if not (i in self._shared or i in shared_slots)]
            variant = group.variants[key] = Variant(references, local, group.names, self._id_sizes)
        return variant

    def place(self, offset: int) -> bytes:
        """Fix the place of the shared table in the image, the end of the inodes, and return its bytes."""
        # V0 and V1 count from the start of the block in which the table begins, V2 from that of the image.
        at = offset % 4096 if self._epoch1 else offset
        table = bytearray()
        for attribute in self._order:
            self.reference[attribute] = struct.pack("<I", (at + len(table)) // 4)
            table += attribute.packed()
        return bytes(table)

    def of_object(self, slot: _Slot, object_id: ObjectId) -> Attribute:
        """The attribute that ``slot`` stands for."""
        if slot is _Slot.METACOPY:
            return Attribute(PREFIX_TRUSTED, METACOPY, self._metacopy_head + object_id)
        return Attribute(PREFIX_TRUSTED, REDIRECT, b"/" + object_id.pathname.encode("ascii"))

    def pack_of_object(self, slot: _Slot, object_id: ObjectId) -> bytes:
        """``of_object(…).packed()``, faster: it runs twice for every file."""
        if slot is _Slot.METACOPY:
            return self._metacopy_prefix + object_id
        return self._redirect_prefix + object_id.pathname.encode("ascii") + self._redirect_padding
