"""What a repository demands of fs-verity on its objects: the difference between secure and insecure ones.

Facts: composefs-rs 0.9, repository. Digests in user space are ``hostimaged.composefs.fsverity``'s.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final

from hostimaged.errors import NotSupported, StorageError, VerityMismatch
from hostimaged.system import syscalls
from hostimaged.system.durable import write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.composefs.fsverity import Algorithm
    from hostimaged.ids import ObjectId
    from hostimaged.system.durable import NewFile

#: A fork in another thread holds copies of our writable descriptors until its exec, for well under 1 ms.
_BUSY_TRIES: Final = 3
_BUSY_PAUSE: Final = 0.001
#: Copies made of a file that stays busy.
_COPIES: Final = 8
_COPY_PIECE: Final = 1 << 20


class VerityUnavailable(NotSupported):
    """the file system of the repository does not support fs-verity, which is required"""

    hint = (
        "use a file system with fs-verity (btrfs, or ext4 made with -O verity), "
        'or set verity = "opportunistic" in the settings to go without'
    )


class VerityPolicy:
    """Enables and checks fs-verity for one opened repository.

    ``secure``: every object must have it. Otherwise it is used where the file system has it, and its absence
    is accepted. Methods raise ``VerityMismatch``, ``VerityUnavailable`` or ``OSError``. Thread-safe.
    """

    __slots__ = ("_algorithm", "secure", "unsupported")

    def __init__(self, algorithm: Algorithm, *, secure: bool, unsupported: bool = False) -> None:
        self._algorithm = algorithm
        self.secure = secure
        #: The file system was seen not to support fs-verity: an insecure repository asks no more.
        self.unsupported = unsupported

    def relaxed(self) -> VerityPolicy:
        """The same for one who accepts objects without fs-verity."""
        return VerityPolicy(self._algorithm, secure=False, unsupported=self.unsupported)

    def verify(self, fd: int, id_: ObjectId) -> bool:
        """Check an object being opened; says whether the kernel vouches for it."""
        if self.unsupported and not self.secure:
            return False
        try:
            self._compare(fd, id_)
        except syscalls.VerityUnsupported:
            self.unsupported = True
        except syscalls.VerityMissing:
            pass
        else:
            return True
        if self.secure:
            raise VerityMismatch(f"object {id_.hex()} has no fs-verity, which this repository requires")
        return False

    def verify_or_enable(self, fd: int, id_: ObjectId) -> None:
        """Check an object that was found when the same bytes were to be stored, opened read-only."""
        if self.verify(fd, id_) or self.unsupported:
            return
        try:
            if not self._enable_with_retry(fd):
                raise StorageError("cannot enable fs-verity: an object is open for writing elsewhere")
            self._compare(fd, id_)
        except syscalls.VerityUnsupported:
            self.unsupported = True

    def protect(self, new: NewFile, id_: ObjectId, make_file: Callable[[], NewFile]) -> NewFile:
        """Enable fs-verity on a complete new file and check that the kernel comes to the same digest.

        The result takes the place of ``new``, which is closed if it is another: where a stray writable
        descriptor stays, a copy is made with ``make_file``.
        """
        if self.unsupported and not self.secure:
            return new
        try:
            new.seal()
            for _ in range(_COPIES):
                if self._enable_with_retry(new.fd):
                    break
                copy = _sealed_copy(new.fd, make_file())
                new.close()
                new = copy
            else:
                raise StorageError("cannot enable fs-verity: a file stays open for writing elsewhere")
            self._compare(new.fd, id_)
        except (syscalls.VerityUnsupported, syscalls.VerityMissing) as error:
            if self.secure:
                new.close()
                raise VerityUnavailable from error
            if isinstance(error, syscalls.VerityUnsupported):
                self.unsupported = True
        except BaseException:
            new.close()
            raise
        return new

    def protect_in_place(self, fd: int, id_: ObjectId) -> bool:
        """Enable fs-verity on a file of somebody else, open read-only, that is to be an object as it is.

        Says whether it has it: where the repository can do without, its owner may go on writing. Raises
        ``OSError`` with ETXTBSY where it stays open for writing.
        """
        if self.unsupported and not self.secure:
            return False
        try:
            if not self._enable_with_retry(fd):
                raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))
            self._compare(fd, id_)
        except (syscalls.VerityUnsupported, syscalls.VerityMissing) as error:
            if self.secure:
                raise VerityUnavailable from error
            if isinstance(error, syscalls.VerityUnsupported):
                self.unsupported = True
            return False
        return True

    def _enable_with_retry(self, fd: int) -> bool:
        """Enable fs-verity; False if the file stays open for writing elsewhere."""
        for attempt in range(_BUSY_TRIES):
            if attempt:
                time.sleep(_BUSY_PAUSE)
            try:
                syscalls.enable_verity(fd, self._algorithm.kernel_id)
            except FileExistsError:
                return True  # someone was faster, which is as good
            except OSError as error:
                if error.errno != errno.ETXTBSY:
                    raise
            else:
                return True
        return False

    def _compare(self, fd: int, id_: ObjectId) -> None:
        try:
            found = syscalls.measure_verity(fd, self._algorithm.kernel_id, self._algorithm.digest_size)
        except ValueError:
            raise VerityMismatch(f"object {id_.hex()} has fs-verity of another hash") from None
        if found != id_:
            raise VerityMismatch(f"object {id_.hex()} has the fs-verity digest {found.hex()}")


def probe(fd: int, algorithm: Algorithm) -> tuple[bool, bool]:
    """Whether the file open as ``fd`` has fs-verity, and whether its file system was seen not to support it.

    Raises ``VerityMismatch`` if it has that of another hash.
    """
    try:
        syscalls.measure_verity(fd, algorithm.kernel_id, algorithm.digest_size)
    except syscalls.VerityUnsupported:
        return False, True
    except syscalls.VerityMissing:
        return False, False
    except ValueError:
        raise VerityMismatch("meta.json of the repository has fs-verity of another hash") from None
    return True, False


def _sealed_copy(source: int, copy: NewFile) -> NewFile:
    """``copy`` with the content of ``source``, which nobody else can have open for writing."""
    try:
        at = 0
        while piece := os.pread(source, _COPY_PIECE, at):
            write_all(copy.fd, piece)
            at += len(piece)
        copy.seal()
    except BaseException:
        copy.close()
        raise
    return copy
