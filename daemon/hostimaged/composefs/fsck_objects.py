"""Checks that every object of a repository is what its name says, with all processors.

Threads do not help: a digest is some thousand hash calls of 4 KiB, and two threads that hand the interpreter
lock to each other after each of them take nearly as long as one (measured; from four threads on, longer). So
a check that turns out to be long gets *helpers*: processes that are this module, given the number of a
directory on a line of their standard input, and answering with a line of JSON. They end with their input, so
they do not outlive us by more than the directory they are at.

Findings are those of composefs-rs 0.9.4.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsck_report import Finding, Findings, Kind, shown
from hostimaged.composefs.fsverity import Algorithm, FsVerityError, Hasher
from hostimaged.errors import HostimageError, from_os_error
from hostimaged.system import syscalls

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from hostimaged.ids import ObjectId

OBJECTS: Final = "objects"
#: Large enough to amortise the call, small enough for the cache; most objects fit.
_BUFFER: Final = 1 << 18
#: Seconds of work that are worth helpers, each of which takes a tenth of a second of a processor to start.
_WORTH: Final = 0.3
#: Processes at most, us included. Disks feed no more, and each takes some 12 MB.
_MAX_PROCESSES: Final = 8
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: O_NONBLOCK: a fifo in the place of an object must not hang us.
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


@dataclass(slots=True)
class Tally:
    """Outcome for some objects."""

    checked: int = 0
    corrupted: int = 0
    findings: Findings = field(default_factory=Findings)

    def corrupt(self, kind: Kind, path: str, detail: object = "") -> None:
        """Note a corrupted object."""
        self.corrupted += 1
        self.findings.add(kind, path, detail)

    def encode(self) -> bytes:
        """As one line."""
        kept = [(finding.kind, finding.path, finding.detail) for finding in self.findings]
        return json.dumps([self.checked, self.corrupted, self.findings.count, kept]).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """From ``encode``; raises ``ValueError`` or ``TypeError``."""
        checked, corrupted, count, kept = json.loads(line)
        return cls(checked, corrupted, Findings((Finding(*parts) for parts in kept), count))


class DirectoryCheck:
    """Checks directories of objects of the repository open as ``root``, in one thread.

    ``secure``: objects must have fs-verity; then, and wherever they have it, the kernel's word is taken for
    the digest, and the content is read, as that is when the kernel compares it: a measured digest alone says
    nothing of what the disk made of it since. Others are read and hashed. Without the lock of the repository,
    which may be given up in ``pause``, called before each object and now and then in a long one, what others
    remove is no finding.
    """

    __slots__ = ("_algorithm", "_buffers", "_pause", "_root", "_secure", "_unsupported", "_view")

    def __init__(
        self, root: int, algorithm: Algorithm, *, secure: bool, pause: Callable[[], None] | None = None
    ) -> None:
        self._pause = pause
        self._root = root
        self._algorithm = algorithm
        self._secure = secure
        self._unsupported = False
        buffer = bytearray(_BUFFER)
        self._buffers = [buffer]
        self._view = memoryview(buffer)

    def check(self, byte: int) -> Tally:
        """Check ``objects/<byte>``; raises ``StorageError`` if the directory cannot be read."""
        tally = Tally()
        where = f"{OBJECTS}/{byte:02x}"
        try:
            directory = os.open(where, _DIRECTORY_FLAGS, dir_fd=self._root)
        except FileNotFoundError:
            return tally
        except OSError as error:
            raise from_os_error(error, f"cannot open {where} of the repository") from error
        try:
            with os.scandir(directory) as entries:
                found = sorted((entry.name, entry.is_file(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            os.close(directory)
            raise from_os_error(error, f"cannot list {where} of the repository") from error
        prefix, length = f"{byte:02x}", self._algorithm.hex_length - 2
        try:
            for name, regular in found:
                if self._pause is not None:
                    self._pause()
                # Nearly all of them: no more than this is done for each.
                if not (regular and len(name) == length and self._is_good(directory, prefix, name)):
                    self._examine(directory, prefix, name, tally)
        finally:
            os.close(directory)
        tally.checked += len(found)
        return tally

    def _is_good(self, directory: int, prefix: str, name: str) -> bool:
        """Whether all is well with a regular file; what is not, ``_examine`` finds out."""
        try:
            fd = os.open(name, _FILE_FLAGS, dir_fd=directory)
        except OSError:
            return False
        try:
            found = self._measured(fd)
            if found is None:
                if self._secure:
                    return False
                found = self._hashed(fd)
            else:
                self._read(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
        return found.hex() == prefix + name

    def _examine(self, directory: int, prefix: str, name: str, tally: Tally) -> None:
        """Check any entry and say what is wrong with it, if anything."""
        path = f"{OBJECTS}/{prefix}/{shown(name)}"
        try:
            expected = fsverity.parse_hex(self._algorithm, prefix + name)
        except FsVerityError:
            tally.corrupt(Kind.OBJECT_INVALID_NAME, path, f"not a {self._algorithm.label} digest")
            return
        try:
            fd = self._open(directory, f"{OBJECTS}/{prefix}/{name}", name)
        except OSError as error:
            if _is_gone(directory, name):
                tally.checked -= 1
            else:
                tally.corrupt(Kind.OBJECT_OPEN_FAILED, path, error.strerror)
            return
        where = f"{OBJECTS}/{expected.pathname}"
        try:
            found = self._measured(fd)
            if found is None:
                if self._secure:
                    tally.corrupt(Kind.OBJECT_VERITY_MISSING, where)
                    return
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    # A fifo, or a device that never ends.
                    tally.corrupt(Kind.OBJECT_VERITY_FAILED, where, "not a regular file")
                    return
                found = self._hashed(fd)
            else:
                self._read(fd)
        except OSError as error:
            tally.corrupt(Kind.OBJECT_VERITY_FAILED, where, error.strerror)
            return
        finally:
            os.close(fd)
        if found != expected:
            tally.corrupt(Kind.OBJECT_DIGEST_MISMATCH, where, f"measured {found.hex()}")

    def _open(self, directory: int, path: str, name: str) -> int:
        try:
            return os.open(name, _FILE_FLAGS, dir_fd=directory)
        except OSError:
            # A link, perhaps: it is followed within the repository only.
            return syscalls.open_beneath(self._root, path, _FILE_FLAGS & ~os.O_NOFOLLOW)

    def _measured(self, fd: int) -> bytes | None:
        """The digest that the kernel enforces; None if there is none of our hash."""
        if self._unsupported:
            return None
        algorithm = self._algorithm
        try:
            return syscalls.measure_verity(fd, algorithm.kernel_id, algorithm.digest_size)
        except syscalls.VerityUnsupported:
            # Only files tell what the file system can do.
            self._unsupported = stat.S_ISREG(os.fstat(fd).st_mode)
        except (OSError, ValueError):
            pass
        return None

    def _read(self, fd: int) -> None:
        """Have the kernel compare all of a file that has fs-verity; raises ``OSError`` where it differs."""
        while os.readv(fd, self._buffers) == _BUFFER:
            if self._pause is not None:
                self._pause()

    def _hashed(self, fd: int) -> ObjectId:
        """The digest of a regular file."""
        count = os.readv(fd, self._buffers)
        if count <= fsverity.BLOCK:
            return fsverity.digest_small(self._algorithm, bytes(self._view[:count]))
        if count < _BUFFER:
            return fsverity.digest(self._algorithm, self._view[:count])
        hasher = Hasher(self._algorithm)
        while count:
            hasher.update(self._view[:count])
            if self._pause is not None:
                self._pause()
            count = os.readv(fd, self._buffers)
        return hasher.finish()


def _is_gone(directory: int, name: str) -> bool:
    """Whether an entry that was listed was removed meanwhile."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def object_sizes(root: int) -> list[int]:
    """Bytes of the objects in each directory of a repository open as ``root``; 0 where it cannot be told."""
    sizes = [0] * 256
    for byte in range(256):
        with suppress(OSError):
            directory = os.open(f"{OBJECTS}/{byte:02x}", _DIRECTORY_FLAGS, dir_fd=root)
            try:
                with os.scandir(directory) as entries:
                    sizes[byte] = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
            finally:
                os.close(directory)
    return sizes


class ObjectCheck:
    """Checks all objects of the repository open as ``root``.

    ``begin`` works until it can tell whether helpers are worth it, and starts them; the caller may do
    something else until ``finish``. Leaving the context ends the helpers. ``check`` is called often, in this
    thread, and may raise to give up, or give up the lock for a while. ``done`` is called, in any thread, with
    the number of each directory that was checked.
    """

    def __init__(
        self,
        root: int,
        algorithm: Algorithm,
        *,
        secure: bool,
        check: Callable[[], None] | None = None,
        done: Callable[[int], None] | None = None,
    ) -> None:
        self._root = root
        self._algorithm = algorithm
        self._secure = secure
        self._give_up = check
        self._mine = DirectoryCheck(root, algorithm, secure=secure, pause=check)
        self._tell = done
        # Both are shared with the threads: single appends and pops are atomic.
        self._pending = deque(range(256))
        self._done: list[tuple[int, Tally]] = []
        self._helpers: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
        #: Whether helpers may begin with another directory.
        self._go_on = threading.Event()
        self._go_on.set()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While this lasts no helper begins with another directory.

        Each goes on with the one it is at: that may take longer than anybody waits for the lock, and what is
        removed meanwhile does not disturb it.
        """
        self._go_on.clear()
        try:
            yield
        finally:
            self._go_on.set()

    def _add(self, byte: int, tally: Tally) -> None:
        self._done.append((byte, tally))
        if self._tell is not None:
            self._tell(byte)

    def begin(self) -> None:
        """Check some directories, as fast as which the rest will go; start helpers for that, and return."""
        begun = time.monotonic()
        left = 0.0
        while self._pending and left < _WORTH:
            self._work_on_one()
            left = (time.monotonic() - begun) / len(self._done) * len(self._pending)
        if self._pending:
            for _ in range(min(len(os.sched_getaffinity(0)), _MAX_PROCESSES) - 1):
                self._start_helper()

    def finish(self) -> Tally:
        """Check what is left; the outcome for all objects, in the order of their names.

        Raises ``StorageError`` if a directory cannot be read.
        """
        while True:
            while self._pending:
                self._work_on_one()
            for _, thread in self._helpers:
                thread.join()
            # A helper that died gave its directory back.
            if not self._pending:
                break
        total = Tally()
        for _, tally in sorted(self._done, key=lambda done: done[0]):
            total.checked += tally.checked
            total.corrupted += tally.corrupted
            total.findings.extend(tally.findings)
        return total

    def _work_on_one(self) -> None:
        if self._give_up is not None:
            self._give_up()
        try:
            byte = self._pending.popleft()
        except IndexError:
            return  # a helper was faster
        self._add(byte, self._mine.check(byte))

    def _start_helper(self) -> None:
        import subprocess

        argv = [sys.executable, "-P", "-m", "hostimaged.composefs.fsck_objects", str(self._root)]
        argv += [self._algorithm.label, "secure" if self._secure else "insecure"]
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[self._root],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except OSError:
            return  # too many processes, or no memory: it takes longer
        thread = threading.Thread(target=self._drive, args=(process,), name="fsck-helper")
        self._helpers.append((process, thread))
        thread.start()

    def _drive(self, process: subprocess.Popen[bytes]) -> None:
        """Hand out directories to a helper until there are none, or it fails."""
        while True:
            self._go_on.wait()
            try:
                byte = self._pending.popleft()
            except IndexError:
                return
            try:
                self._add(byte, _ask(process, byte))
            except (OSError, ValueError, TypeError):
                # Killed, or a directory cannot be read: whoever takes it next will see.
                self._pending.append(byte)
                return

    def close(self) -> None:
        """End the helpers."""
        for process, _ in self._helpers:
            process.kill()
        for process, thread in self._helpers:
            thread.join()
            with process:
                pass
        self._helpers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ask(process: subprocess.Popen[bytes], byte: int) -> Tally:
    assert process.stdin is not None
    assert process.stdout is not None
    # Past the file object, which would try to write again when it is closed.
    os.write(process.stdin.fileno(), b"%02x\n" % byte)
    return Tally.decode(process.stdout.readline())


def main(argv: Sequence[str]) -> int:
    """The helper. Its arguments are a descriptor of the repository, the hash, and ``secure`` or not."""
    root, label, secure = argv
    directories = DirectoryCheck(int(root), Algorithm.from_label(label), secure=secure == "secure")
    out = sys.stdout.buffer
    while line := sys.stdin.buffer.readline():
        try:
            out.write(directories.check(int(line, 16)).encode())
            out.flush()
        except (HostimageError, BrokenPipeError):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
