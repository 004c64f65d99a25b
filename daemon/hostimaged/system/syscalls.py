"""System calls and ioctls that Python's ``os`` does not offer, each a thin typed function.

With ``mountcalls``, which makes mounts, the only module with ctypes, ioctls of files and flock. Policy
(retries, time-outs, what an error means for a repository) is not here. Functions raise ``OSError`` as ``os``
does, except where their contract says otherwise. Numbers are those of the Linux user-space headers;
fs-verity's come from ``linux/fsverity.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    #: A path below a directory descriptor, or a path of its own.
    StrPath: TypeAlias = str | os.PathLike[str]

AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2

_SYS_OPENAT2: Final = 437  # the same on every architecture
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
#: openat2 gives up with EAGAIN when a rename elsewhere races with a ``..``; a few tries are enough.
_OPENAT2_TRIES: Final = 16

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, path: StrPath | None = None) -> int:
    """``result`` of a libc call, or the ``OSError`` that errno tells."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *([] if path is None else [os.fspath(path)]))
    return result


# --- fs-verity ---------------------------------------------------------------------------------------------


class VerityUnsupported(OSError):
    """The file system, or the kernel, has no fs-verity (for this hash)."""


class VerityMissing(OSError):
    """The file system supports fs-verity, the file does not have it."""


def _ioc(direction: int, number: int, size: int, group: int = ord("f")) -> int:
    """An ioctl number. Some architectures encode the direction differently."""
    if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")):
        return {1: 4, 2: 2, 3: 6}[direction] << 29 | size << 16 | group << 8 | number
    return direction << 30 | size << 16 | group << 8 | number


_FS_IOC_ENABLE_VERITY: Final = _ioc(1, 133, 128)
_FS_IOC_MEASURE_VERITY: Final = _ioc(3, 134, 4)
_FICLONE: Final = _ioc(1, 9, 4, group=0x94)
#: Called after a long, they take an int (ioctl_iflags(2)).
_FS_IOC_GETFLAGS: Final = _ioc(2, 1, struct.calcsize("l"))
_FS_IOC_SETFLAGS: Final = _ioc(1, 2, struct.calcsize("l"))
#: FS_IMMUTABLE_FL and FS_APPEND_FL.
_UNCHANGEABLE: Final = 0x10 | 0x20
#: version, hash algorithm, block size, salt size, salt, signature size, reserved, signature, reserved.
_ENABLE_ARG: Final = struct.Struct("=IIIIQIIQ88s")
_MEASURE_HEADER: Final = struct.Struct("=HH")
_VERITY_BLOCK: Final = 4096


def enable_verity(fd: int, algorithm_id: int) -> None:
    """Enable fs-verity on the file that ``fd`` has open read-only: block size 4096, no salt, no signature.

    Raises ``FileExistsError`` if it is enabled already, ``OSError`` with ETXTBSY while any descriptor of the
    file is writable, ``VerityUnsupported`` where the file system has none or the kernel lacks the hash.
    """
    argument = _ENABLE_ARG.pack(1, algorithm_id, _VERITY_BLOCK, 0, 0, 0, 0, 0, b"")
    try:
        fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, argument)
    except OSError as error:
        if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOPKG}:
            raise VerityUnsupported(error.errno, error.strerror) from None
        raise


def make_changeable(fd: int) -> None:
    """Take away the attributes *immutable* and *append only* of the file open as ``fd`` (chattr(1)).

    Raises ``OSError``: EPERM without CAP_LINUX_IMMUTABLE, ENOTTY where the file system has no attributes.
    """
    buffer = bytearray(struct.calcsize("l"))
    fcntl.ioctl(fd, _FS_IOC_GETFLAGS, buffer)
    (flags,) = struct.unpack_from("=I", buffer)
    if flags & _UNCHANGEABLE:
        struct.pack_into("=I", buffer, 0, flags & ~_UNCHANGEABLE)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, buffer)


def measure_verity(fd: int, algorithm_id: int, digest_size: int) -> bytes:
    """The digest that the kernel enforces for the file open as ``fd``.

    Raises ``VerityMissing`` or ``VerityUnsupported``, and ``ValueError`` if the file has a digest of another
    hash.
    """
    buffer = bytearray(_MEASURE_HEADER.size + digest_size)
    _MEASURE_HEADER.pack_into(buffer, 0, 0, digest_size)
    try:
        fcntl.ioctl(fd, _FS_IOC_MEASURE_VERITY, buffer)
    except OSError as error:
        if error.errno == errno.ENODATA:
            raise VerityMissing(error.errno, error.strerror) from None
        if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP}:
            raise VerityUnsupported(error.errno, error.strerror) from None
        if error.errno == errno.EOVERFLOW:
            raise ValueError("fs-verity digest of another hash") from None
        raise
    if _MEASURE_HEADER.unpack_from(buffer) != (algorithm_id, digest_size):
        raise ValueError("fs-verity digest of another hash")
    return bytes(buffer[_MEASURE_HEADER.size :])


# --- files -------------------------------------------------------------------------------------------------


def syncfs(fd: int) -> None:
    """Write everything of the file system that ``fd`` lies on to its device."""
    _checked(_libc.syncfs(fd))


#: Types of file systems as ``statfs`` tells them (linux/magic.h).
MSDOS_SUPER_MAGIC: Final = 0x4D44
EXFAT_SUPER_MAGIC: Final = 0x2011BAB0
#: Larger than the structure, whose first member is the type.
_STATFS_SIZE: Final = 256


def filesystem_type(fd: int) -> int:
    """The type of the file system that ``fd`` lies on, as ``statfs`` tells it."""
    found = ctypes.create_string_buffer(_STATFS_SIZE)
    _checked(_libc.fstatfs(fd, found))
    return ctypes.c_long.from_buffer(found).value


def open_beneath(root: int | StrPath, path: StrPath, flags: int, mode: int = 0) -> int:
    """Open ``path`` as if ``root``, a directory (descriptor or path), were the root directory; close-on-exec.

    Absolute symbolic links and ``..`` stay beneath ``root``; magic links of /proc are refused with ELOOP.
    """
    if not isinstance(root, int):
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_beneath(directory, path, flags, mode)
        finally:
            os.close(directory)
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _ in range(_OPENAT2_TRIES - 1):
        try:
            return _openat2(root, path, how)
        except (BlockingIOError, InterruptedError):
            continue
    return _openat2(root, path, how)


def _openat2(root: int, path: StrPath, how: bytes) -> int:
    number, at, size = ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(root), ctypes.c_size_t(len(how))
    return _checked(_libc.syscall(number, at, os.fsencode(path), how, size), path)


def link_fd(fd: int, directory: int, name: str) -> None:
    """Give the unnamed (O_TMPFILE) file open as ``fd`` the name ``name`` in ``directory``; needs /proc.

    Raises ``FileExistsError`` if the name is taken.
    """
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def clone_file(source: int, target: int) -> None:
    """Let the empty file open for writing as ``target`` share all blocks of the file ``source`` (FICLONE).

    Raises ``OSError``: EOPNOTSUPP or EXDEV where the file system cannot, or the two lie on different ones.
    """
    fcntl.ioctl(target, _FICLONE, source)


def _renameat2(source: StrPath, target: StrPath, source_fd: int, target_fd: int, flags: int) -> None:
    _checked(
        _libc.renameat2(source_fd, os.fsencode(source), target_fd, os.fsencode(target), ctypes.c_uint(flags)),
        target,
    )


def rename_noreplace(
    source: StrPath, target: StrPath, *, source_fd: int = AT_FDCWD, target_fd: int = AT_FDCWD
) -> None:
    """Rename; raises ``FileExistsError`` instead of replacing ``target``."""
    _renameat2(source, target, source_fd, target_fd, _RENAME_NOREPLACE)


def rename_exchange(
    source: StrPath, target: StrPath, *, source_fd: int = AT_FDCWD, target_fd: int = AT_FDCWD
) -> None:
    """Let two existing names change places in one step."""
    _renameat2(source, target, source_fd, target_fd, _RENAME_EXCHANGE)


# --- watching ----------------------------------------------------------------------------------------------


def inotify_init() -> int:
    """A new inotify instance, non-blocking, close-on-exec. Raises ``OSError`` with EMFILE if the user has
    too many.
    """
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(fd: int, path: StrPath, mask: int) -> int:
    """Watch what is at ``path``, or change the mask of its watch; the number of the watch, one per inode."""
    return _checked(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)), path)


def inotify_remove_watch(fd: int, watch: int) -> None:
    """Watch something no longer. Raises ``OSError`` with EINVAL for a watch that is gone."""
    _checked(_libc.inotify_rm_watch(fd, watch))


# --- locks -------------------------------------------------------------------------------------------------


def try_flock(fd: int, *, exclusive: bool) -> bool:
    """Take the flock of ``fd`` if that is possible at once; says whether it was.

    Changing the kind of a lock one holds drops it first: after False nothing is held.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


#: l_type, l_whence, l_start, l_len, l_pid of ``struct flock``, with 64-bit offsets.
_RECORD_LOCK: Final = struct.Struct("@hhqqi4x")


def try_record_lock(fd: int) -> bool:
    """Take a shared record lock on all of the file open as ``fd`` if that is possible at once; says whether.

    An open file description lock (fcntl(2)): it excludes exclusive record locks of any kind, and ends when
    the file is closed.
    """
    wanted = _RECORD_LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock(fd: int) -> None:
    """Drop the flock of ``fd``."""
    fcntl.flock(fd, fcntl.LOCK_UN)


# --- the process -------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_PR_SET_PDEATHSIG: Final = 1
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522


def _prctl(option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *padded))


def set_parent_death_signal(signal: int) -> None:
    """Have ``signal`` sent to this process when the *thread* that started it ends; 0 for none.

    Does not survive a change of credentials. The caller checks afterwards that its parent is still there.
    """
    _prctl(_PR_SET_PDEATHSIG, signal)


def set_no_new_privs() -> None:
    """From now on no program this thread, or a child, executes gains privileges. Cannot be undone."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def keep_freed_memory(buffers: int, total: int) -> None:
    """Have the C library keep up to ``total`` freed bytes, of buffers of up to ``buffers`` bytes each.

    By default it returns each large buffer to the kernel, which clears the pages of the next one. Concerns
    this process only; without effect where the C library has no such setting.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(buffers))
        mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(total))


class Capability(IntEnum):
    """Capabilities, as numbered in ``linux/capability.h``."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    NET_BIND_SERVICE = 10
    NET_BROADCAST = 11
    NET_ADMIN = 12
    NET_RAW = 13
    IPC_LOCK = 14
    IPC_OWNER = 15
    SYS_MODULE = 16
    SYS_RAWIO = 17
    SYS_CHROOT = 18
    SYS_PTRACE = 19
    SYS_PACCT = 20
    SYS_ADMIN = 21
    SYS_BOOT = 22
    SYS_NICE = 23
    SYS_RESOURCE = 24
    SYS_TIME = 25
    SYS_TTY_CONFIG = 26
    MKNOD = 27
    LEASE = 28
    AUDIT_WRITE = 29
    AUDIT_CONTROL = 30
    SETFCAP = 31
    MAC_OVERRIDE = 32
    MAC_ADMIN = 33
    SYSLOG = 34
    WAKE_ALARM = 35
    BLOCK_SUSPEND = 36
    AUDIT_READ = 37
    PERFMON = 38
    BPF = 39
    CHECKPOINT_RESTORE = 40


def effective_capabilities() -> frozenset[int]:
    """Numbers of the capabilities in this thread's effective set, unknown ones included."""
    return _members(_capget()[0])


def drop_capabilities(keep: Iterable[Capability]) -> None:
    """Give up every capability but ``keep``: effective, permitted, inheritable, ambient and bounding set.

    What is not held is not gained. Concerns the calling thread and those it starts later: call it before the
    first thread. Without CAP_SETPCAP the bounding set cannot be changed; ``set_no_new_privs``, which callers
    set as well, then keeps a program from regaining anything.
    """
    mask = sum(1 << capability for capability in keep)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    effective, permitted, inheritable = _capget()
    if effective >> Capability.SETPCAP & 1:
        for number in range(_last_capability() + 1):
            if not mask >> number & 1 and _prctl(_PR_CAPBSET_READ, number):
                _prctl(_PR_CAPBSET_DROP, number)
    _capset(effective & mask, permitted & mask, inheritable & mask)


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _members(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(64) if mask >> number & 1)


def _capget() -> tuple[int, int, int]:
    """Effective, permitted and inheritable set of this thread as bit masks."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _checked(_libc.capget(header, data))
    words = struct.unpack("=6I", data.raw)
    return words[0] | words[3] << 32, words[1] | words[4] << 32, words[2] | words[5] << 32


def _capset(effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = (effective, permitted, inheritable)
    words = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in sets]
    _checked(_libc.capset(header, struct.pack("=6I", *words)))


# --- mounts ------------------------------------------------------------------------------------------------

MS_RDONLY: Final = 1
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
_CLONE_NEWNS: Final = 0x00020000


def unshare_mounts() -> None:
    """Give this process mounts of its own. Call it before the first thread."""
    _checked(_libc.unshare(ctypes.c_int(_CLONE_NEWNS)))


def mount(target: StrPath | bytes, flags: int, source: StrPath | bytes | None = None) -> None:
    """mount(2) without type and options: a bind mount of ``source``, a remount, a change of propagation."""
    name = None if source is None else os.fsencode(source)
    _checked(_libc.mount(name, os.fsencode(target), None, ctypes.c_ulong(flags), None), os.fsdecode(target))
