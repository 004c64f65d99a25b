"""Objects out of files of another store, without copying them where the file system allows it.

Facts: composefs-rs 0.9, repository ("from an open file, sharing data"). A reflink is a file of its own with
the same blocks; a hard link is the very file of the other store, which is changed in one way: it gets
fs-verity where the repository's file system has it.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository.stored import How, Sharing, Stored
from hostimaged.errors import NotSupported, StorageError, VerityMismatch, from_os_error
from hostimaged.system import syscalls
from hostimaged.system.durable import NewFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hostimaged.composefs.fsverity import Algorithm, Buffer
    from hostimaged.composefs.repository.objects import ObjectStore
    from hostimaged.ids import ObjectId

#: Contents up to this size are read whole, and so need not be written where they are there already.
_SMALL: Final = 1 << 20
_PIECE: Final = 1 << 20
#: No file of this pair of file systems can be cloned: there is nothing to be tried again.
_NEVER: Final = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.ENOSYS})
#: What may not be done with one file, but with others.
_NOT_THIS: Final = frozenset(
    {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ETXTBSY, errno.EMLINK, errno.EROFS}
)
_PROBE: Final = bytes(4096)
_DOING: Final = "cannot store a file as an object of the repository"


class SharingImpossible(NotSupported):
    """{detail}"""

    hint = "keep both on one file system, with reflinks (btrfs, XFS) or hard links, or allow copying"


class ChangedWhileRead(StorageError):
    """a file changed while it was read"""


@dataclass(frozen=True, slots=True)
class Shareable:
    """Ways in which files of a store can become objects without being copied."""

    reflink: bool
    link: bool

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.reflink or self.link


class FileSharer:
    """Stores open files as objects of ``objects``. What was found not to work is not tried again.

    Thread-safe. Methods raise as those of ``ObjectStore`` do.
    """

    __slots__ = ("_algorithm", "_no_clone", "_no_link", "_objects")

    def __init__(self, objects: ObjectStore, algorithm: Algorithm) -> None:
        self._objects = objects
        self._algorithm = algorithm
        # Devices of sources; the objects are on one.
        self._no_clone: set[int] = set()
        self._no_link: set[int] = set()

    def store(
        self, fd: int, size: int, sharing: Sharing, seen: Callable[[Buffer], object] | None = None
    ) -> Stored:
        """Store the regular file open read-only as ``fd``, of ``size`` bytes, from its beginning.

        ``seen`` gets its bytes, in order and once; they are those of the object. Raises ``SharingImpossible``
        if it would have to be copied and ``sharing`` forbids that, ``ChangedWhileRead`` if it has not
        ``size`` bytes.
        """
        seen = seen or _ignore
        try:
            if sharing is Sharing.COPY:
                return self._copied(fd, size, seen, None)
            device = os.fstat(fd).st_dev
            if device not in self._no_clone and (clone := self._clone(fd, device)) is not None:
                return self._cloned(clone, size, seen)
            return self._linked(fd, device, size, sharing, seen)
        except OSError as error:
            raise from_os_error(error, _DOING) from error

    def _clone(self, fd: int, device: int) -> NewFile | None:
        new = self._objects.new_file()
        try:
            syscalls.clone_file(fd, new.fd)
        except OSError as error:
            new.close()
            if error.errno in _NEVER:
                self._no_clone.add(device)
            elif error.errno not in _NOT_THIS:
                raise
            return None
        except BaseException:
            new.close()
            raise
        return new

    def _cloned(self, clone: NewFile, size: int, seen: Callable[[Buffer], object]) -> Stored:
        """Nobody else can change the clone: what is read from it is what it holds."""
        with clone:
            id_ = self._digest(clone.fd, size, seen)
            return self._objects.commit(clone, id_, size, How.REFLINKED)

    def _linked(
        self, fd: int, device: int, size: int, sharing: Sharing, seen: Callable[[Buffer], object]
    ) -> Stored:
        if device in self._no_link:
            if sharing is Sharing.REQUIRE:
                raise _impossible(OSError(errno.EXDEV, os.strerror(errno.EXDEV)))
            return self._copied(fd, size, seen, None)
        id_ = self._digest(fd, size, seen)
        try:
            return self._objects.link(fd, id_, size)
        except VerityMismatch:
            raise ChangedWhileRead from None
        except OSError as error:
            if error.errno in _NEVER:
                self._no_link.add(device)
            elif error.errno not in _NOT_THIS:
                raise
            if sharing is Sharing.REQUIRE:
                raise _impossible(error) from error
        # It was seen; what is copied now must be the same.
        return self._copied(fd, size, _ignore, id_)

    def _copied(
        self, fd: int, size: int, seen: Callable[[Buffer], object], expected: ObjectId | None
    ) -> Stored:
        pieces = _pieces(fd, size)
        if size <= _SMALL:
            content = b"".join(pieces)
            seen(content)
            stored = self._objects.store(content)
        else:
            with self._objects.writer() as writer:
                for piece in pieces:
                    seen(piece)
                    writer.write(piece)
                stored = writer.commit()
        if expected is not None and stored.id != expected:
            raise ChangedWhileRead
        return stored

    def _digest(self, fd: int, size: int, seen: Callable[[Buffer], object]) -> ObjectId:
        if size <= _SMALL:
            content = b"".join(_pieces(fd, size))
            seen(content)
            return fsverity.digest(self._algorithm, content)
        hasher = fsverity.Hasher(self._algorithm)
        for piece in _pieces(fd, size):
            seen(piece)
            hasher.update(piece)
        return hasher.finish()


def _pieces(fd: int, size: int) -> Iterator[bytes]:
    """The content of ``fd`` from its beginning; raises ``ChangedWhileRead`` unless it has ``size`` bytes."""
    at = 0
    while at < size:
        piece = os.pread(fd, min(_PIECE, size - at), at)
        if not piece:
            raise ChangedWhileRead
        at += len(piece)
        yield piece
    if os.pread(fd, 1, size):
        raise ChangedWhileRead


def probe(store: Path, objects: ObjectStore) -> Shareable:
    """Which ways work from the directory ``store``, or where it would be made; leaves nothing behind.

    Tried with a small unnamed file in each. A way that cannot be tried counts as not working.
    """
    while not store.exists() and store != store.parent:
        store = store.parent
    try:
        directory = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return Shareable(reflink=False, link=False)
    try:
        with NewFile(directory, mode=0o600, prefix=".hostimaged-") as source:
            os.write(source.fd, _PROBE)
            return Shareable(_can_clone(source.fd, objects), _can_link(source.fd, objects))
    except OSError:
        return Shareable(reflink=False, link=False)
    finally:
        os.close(directory)


def _can_clone(fd: int, objects: ObjectStore) -> bool:
    try:
        with objects.new_file() as target:
            syscalls.clone_file(fd, target.fd)
    except OSError:
        return False
    return True


def _can_link(fd: int, objects: ObjectStore) -> bool:
    try:
        objects.try_link(fd)
    except OSError:
        return False
    return True


def _ignore(_: Buffer) -> None:
    pass


def _impossible(error: OSError) -> SharingImpossible:
    reason = error.strerror or "input/output error"
    return SharingImpossible(f"a file can neither be cloned nor linked into the repository: {reason}")
