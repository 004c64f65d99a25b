"""The objects of a repository: files named by the fs-verity digest of their content.

Facts: composefs-rs 0.9, repository. Files become visible whole, but are not synced one by one: whoever names
them calls ``syncfs`` first (``Repository.sync``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository.stored import How, Stored
from hostimaged.errors import CorruptRepository, LimitsExceeded, VerityMismatch, from_os_error
from hostimaged.system.durable import NewFile, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.fsverity import Algorithm, Buffer
    from hostimaged.composefs.repository.verity import VerityPolicy
    from hostimaged.ids import ObjectId

DIRECTORY: Final = "objects"
_DIRECTORY_MODE: Final = 0o755
_FILE_MODE: Final = 0o644
#: Temporary names stand directly in ``objects``, where the garbage collector does not look for objects.
_PREFIX: Final = ".tmp-object-"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: O_NONBLOCK: a fifo in the place of an object must not hang us.
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_HEX: Final = tuple(f"{byte:02x}" for byte in range(256))
_BLOCK: Final = 512  # unit of st_blocks
_DOING: Final = "cannot write an object of the repository"


class ObjectMissing(CorruptRepository):
    """object {id} is missing from the repository"""


class ObjectStore:
    """Stores and opens objects below the repository directory open as ``root``, which stays the caller's.

    Descriptors of ``objects`` and of its up to 256 directories are kept until ``close``. Thread-safe, save
    that ``close`` comes after the last use. Methods raise ``NoSpace``, ``ReadOnly``, ``StorageError``, and
    what ``VerityPolicy`` raises.
    """

    __slots__ = ("_algorithm", "_base", "_directories", "_lock", "_policy", "_root", "distrusted")

    #: Objects that are there, but damaged: they count as missing, and are replaced when they are stored.
    distrusted: set[ObjectId]

    def __init__(self, root: int, algorithm: Algorithm, policy: VerityPolicy) -> None:
        self._root = root
        self._algorithm = algorithm
        self._policy = policy
        self._base = -1
        self._directories = [-1] * 256
        self._lock = threading.Lock()
        self.distrusted = set()

    def store(self, buffer: Buffer) -> Stored:
        """Store bytes that are in memory: hashed first, written only if they are not there."""
        id_ = fsverity.digest(self._algorithm, buffer)
        size = memoryview(buffer).nbytes
        try:
            present = self._present(id_, size)
            if present:
                return Stored(id_, How.PRESENT)
            new = self.new_file()
            try:
                write_all(new.fd, buffer)
                new = self._policy.protect(new, id_, self.new_file)
                return self._publish(new, id_, size, replace=present is False)
            finally:
                new.close()
        except OSError as error:
            raise from_os_error(error, _DOING) from error

    def writer(self) -> ObjectWriter:
        """A writer for content that comes in pieces."""
        try:
            return ObjectWriter(self, self._algorithm, self.new_file())
        except OSError as error:
            raise from_os_error(error, _DOING) from error

    def commit(self, new: NewFile, id_: ObjectId, size: int, how: How = How.COPIED) -> Stored:
        """Make the complete file ``new``, whose digest the caller has computed, the object ``id_``.

        ``how`` says how its content came into it.
        """
        try:
            present = self._present(id_, size)
            if present:
                return Stored(id_, How.PRESENT)
            new = self._policy.protect(new, id_, self.new_file)
            try:
                return self._publish(new, id_, size, replace=present is False, how=how)
            finally:
                new.close()
        except OSError as error:
            raise from_os_error(error, _DOING) from error

    def link(self, fd: int, id_: ObjectId, size: int) -> Stored:
        """Make the file open read-only as ``fd``, whose digest the caller has computed, the object ``id_``.

        It has another name elsewhere, and gets fs-verity as any object does. Raises ``OSError`` where it
        cannot be linked, or somebody else could still write to it; ``VerityMismatch`` where it was changed
        since its digest was computed.
        """
        present = self._present(id_, size)
        if present:
            return Stored(id_, How.PRESENT)
        if not self._policy.protect_in_place(fd, id_) and not _is_ours_alone(fd):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with NewFile.linked(fd, self._base_directory(create=True), prefix=_PREFIX) as named:
            return self._publish(named, id_, size, replace=present is False, how=How.LINKED)

    def try_link(self, fd: int) -> None:
        """Give the file open as ``fd`` a temporary name here and take it away; raises ``OSError``."""
        with NewFile.linked(fd, self._base_directory(create=True), prefix=_PREFIX) as named:
            named.name_temporarily()

    def new_file(self) -> NewFile:
        """An unnamed file on the repository's file system; raises ``OSError``."""
        return NewFile(self._base_directory(create=True), mode=_FILE_MODE, prefix=_PREFIX)

    def _publish(
        self, new: NewFile, id_: ObjectId, size: int, *, replace: bool, how: How = How.COPIED
    ) -> Stored:
        directory = self._directory(id_[0], create=True)
        try:
            new.publish(directory, id_.hex()[2:], replace=replace)
        except FileExistsError:
            # Another writer was faster; its file must pass as any that is found.
            if self._present(id_, size):
                return Stored(id_, How.PRESENT)
            new.publish(directory, id_.hex()[2:], replace=True)
        self.distrusted.discard(id_)
        return Stored(id_, how)

    def _present(self, id_: ObjectId, size: int) -> bool | None:
        """Whether the object is there (None: not), and of the right size (False: not).

        A power cut before ``syncfs`` can leave an object that is empty or cut short. It is proved not to be
        what its name says, and without fs-verity nothing else would ever notice: it is to be replaced.
        """
        if id_ in self.distrusted:
            return False
        try:
            directory = self._directory(id_[0])
            name = id_.hex()[2:]
            if self._policy.unsupported and not self._policy.secure:
                return os.stat(name, dir_fd=directory).st_size == size
            fd = os.open(name, _FILE_FLAGS, dir_fd=directory)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(fd).st_size != size:
                return False
            self._policy.verify_or_enable(fd, id_)
        finally:
            os.close(fd)
        return True

    def open(self, id_: ObjectId) -> int:
        """A descriptor of the object, the caller's to close, checked as far as the repository demands.

        Raises ``ObjectMissing`` or ``VerityMismatch``.
        """
        fd, _ = self._open(id_)
        return fd

    def open_verified(self, id_: ObjectId) -> int:
        """As ``open``, and the digest is checked in any case: where the kernel does not, all is read."""
        fd, vouched = self._open(id_)
        try:
            if not vouched and (found := fsverity.digest_fd(self._algorithm, fd)) != id_:
                raise VerityMismatch(f"object {id_.hex()} has content with the digest {found.hex()}")
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"cannot read object {id_.hex()}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self, id_: ObjectId) -> tuple[int, bool]:
        """The descriptor, and whether the kernel vouches for the content."""
        self.check_trusted(id_)
        try:
            fd = os.open(id_.hex()[2:], _FILE_FLAGS, dir_fd=self._directory(id_[0]))
        except FileNotFoundError:
            raise ObjectMissing(id=id_.hex()) from None
        except OSError as error:
            raise from_os_error(error, f"cannot open object {id_.hex()}") from error
        try:
            return fd, self._policy.verify(fd, id_)
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"cannot check object {id_.hex()}") from error
        except BaseException:
            os.close(fd)
            raise

    def read(self, id_: ObjectId, limit: int) -> bytes:
        """The whole content of an object of at most ``limit`` bytes, its digest checked in any case.

        Raises ``LimitsExceeded``, ``ObjectMissing`` or ``VerityMismatch``.
        """
        fd, vouched = self._open(id_)
        try:
            with os.fdopen(fd, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise from_os_error(error, f"cannot read object {id_.hex()}") from error
        if len(data) > limit:
            raise LimitsExceeded(f"object {id_.hex()} is larger than {limit} bytes")
        if not vouched and (found := fsverity.digest(self._algorithm, data)) != id_:
            raise VerityMismatch(f"object {id_.hex()} has content with the digest {found.hex()}")
        return data

    def check_trusted(self, id_: ObjectId) -> None:
        """Raises ``VerityMismatch`` for an object that is known to be damaged."""
        if id_ in self.distrusted:
            raise VerityMismatch(f"object {id_.hex()} is damaged")

    def size(self, id_: ObjectId) -> int | None:
        """Bytes of an object; None if it is missing. The content is not looked at."""
        if id_ in self.distrusted:
            return None
        try:
            return os.stat(id_.hex()[2:], dir_fd=self._directory(id_[0])).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, f"cannot open object {id_.hex()}") from error

    def used_bytes(self) -> int:
        """Bytes that the objects take on disk."""
        return sum(status.st_blocks * _BLOCK for _, status in self.scan())

    def scan(self) -> Iterator[tuple[str, os.stat_result]]:
        """All files below ``objects/00`` to ``ff``: path from ``objects`` and status. Takes no lock: files
        that vanish meanwhile are left out.
        """
        for byte, prefix in enumerate(_HEX):
            try:
                with os.scandir(self._directory(byte)) as entries:
                    for entry in entries:
                        try:
                            yield f"{prefix}/{entry.name}", entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
            except FileNotFoundError:
                continue
            except OSError as error:
                raise from_os_error(error, "cannot list the objects of the repository") from error

    def _base_directory(self, *, create: bool) -> int:
        if self._base < 0:
            with self._lock:
                if self._base < 0:
                    self._base = _open_directory(DIRECTORY, self._root, create=create)
        return self._base

    def _directory(self, byte: int, *, create: bool = False) -> int:
        """A descriptor of the directory of objects beginning with ``byte``, kept open."""
        fd = self._directories[byte]
        if fd < 0:
            base = self._base_directory(create=create)
            with self._lock:
                fd = self._directories[byte]
                if fd < 0:
                    fd = self._directories[byte] = _open_directory(_HEX[byte], base, create=create)
        return fd

    def close(self) -> None:
        """Close all descriptors. Twice is harmless."""
        with self._lock:
            kept = [self._base, *self._directories]
            self._base = -1
            self._directories = [-1] * 256
        for fd in kept:
            if fd >= 0:
                os.close(fd)


def _open_directory(name: str, parent: int, *, create: bool) -> int:
    try:
        return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):  # another writer was faster
        os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
    return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)


class ObjectWriter:
    """Writes one object from pieces, hashing as it goes; nothing is visible before ``commit``.

    A context manager; leaving it without ``commit`` drops the content. One thread at a time.
    Methods raise as those of ``ObjectStore`` do.
    """

    __slots__ = ("_hasher", "_new", "_store")

    def __init__(self, store: ObjectStore, algorithm: Algorithm, new: NewFile) -> None:
        self._store = store
        self._hasher = fsverity.Hasher(algorithm)
        self._new = new

    def write(self, buffer: Buffer, digests: bytes = b"") -> None:
        """Append ``buffer``; pieces that are multiples of 4096 bytes are the fastest.

        ``digests`` are those of its blocks (``fsverity.block_digests``) if the caller has computed them, for
        whole blocks after whole blocks.
        """
        if digests:
            self._hasher.update_digested(len(buffer), digests)
        else:
            self._hasher.update(buffer)
        try:
            write_all(self._new.fd, buffer)
        except OSError as error:
            raise from_os_error(error, _DOING) from error

    def commit(self, expected: ObjectId | None = None) -> Stored:
        """Make what was written an object. Ends the writing.

        Raises ``VerityMismatch``, and stores nothing, if another one than ``expected`` would come of it.
        """
        id_ = self._hasher.finish()
        if expected is not None and id_ != expected:
            raise VerityMismatch(f"what should be object {expected.hex()} has the digest {id_.hex()}")
        return self._store.commit(self._new, id_, self._hasher.size)

    def close(self) -> None:
        """Drop what was not committed. Twice is harmless."""
        self._new.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ours_alone(fd: int) -> bool:
    """Whether nobody else may open the file for writing."""
    status = os.fstat(fd)
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
