"""Stores objects with all processors: helper processes beside the caller.

Hashing in blocks of 4 KiB and making files is most of the work of a pull, and goes in and out of the
interpreter all the time: threads at it hand the interpreter's lock to each other, and are slower together
than one alone. Helpers (``store_helper``) are processes started from scratch: a fork would take along
whatever other threads hold.

Contents travel in shared memory, a ring of slots for each helper; a slot is filled, sent, and free again with
its answer. Memory is the slots and a process of some 15 MB for each helper.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.repository.store_helper import (
    MAX_ANSWER,
    MAX_CONTENTS,
    decode_answer,
    encode_contents,
    encode_piece,
)
from hostimaged.errors import HostimageError, StorageError

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.fsverity import Algorithm, Buffer
    from hostimaged.composefs.repository.repository import Repository
    from hostimaged.composefs.repository.stored import Stored

#: Bytes of a slot, the largest content that is sent whole.
SLOT: Final = 1 << 20
#: Slots of a helper: it has something to do while others are filled and answers are read.
_SLOTS: Final = 4
#: Bytes stored without helpers, from which on these save more than they cost; making a file counts as well.
WORTH: Final = 16 << 20
_FILE: Final = 16 << 10
#: Seconds a helper may take to end when its socket has: it finishes one slot at most.
_PATIENCE: Final = 5.0
#: Seconds that another thread may need between two lines.
_MOMENT: Final = 0.0005
_ENDED: Final = "a helper process that stores objects ended unexpectedly"
_PROGRAM: Final = (
    "import sys; from hostimaged.composefs.repository.store_helper import main; main(sys.argv[1:])"
)


class Slot:
    """Contents, or a piece of one, on their way to a helper. Filled and sent by one thread."""

    __slots__ = ("_sizes", "_start", "_used", "error", "helper", "stored")

    def __init__(self, helper: _Helper, start: int) -> None:
        self.helper = helper
        self._start = start
        self._used = 0
        self._sizes: list[int] = []
        #: The answer, once there is one: what was stored, in order.
        self.stored: list[Stored] | None = None
        #: What went wrong instead.
        self.error: HostimageError | None = None

    def has_room(self, size: int) -> bool:
        """Whether a content of ``size`` bytes can be added."""
        return self._used + size <= SLOT and len(self._sizes) < MAX_CONTENTS

    @property
    def room(self) -> int:
        """Bytes that can be added."""
        return SLOT - self._used

    @property
    def range(self) -> tuple[int, int]:
        """Where it begins in the memory, and bytes in it."""
        return self._start, self._used

    @property
    def content(self) -> memoryview:
        """What is in it."""
        return self.helper.memory[self._start : self._start + self._used]

    def append(self, content: Buffer) -> int:
        """Add a content for which there is room; its index in ``stored``."""
        at = self._start + self._used
        self._used += len(content)
        self.helper.memory[at : at + len(content)] = content
        self._sizes.append(len(content))
        return len(self._sizes) - 1

    def send(self) -> None:
        """Let what was added be stored."""
        self.helper.send(self, encode_contents(self._start, self._sizes))

    @property
    def is_answered(self) -> bool:
        """Whether ``wait`` returns or raises at once."""
        return self.stored is not None or self.error is not None

    def wait(self) -> list[Stored]:
        """Wait for the answer; raises what storing raises, and ``StorageError`` where the helper died."""
        self.helper.wait(self)
        if self.error is not None:
            raise self.error
        assert self.stored is not None
        return self.stored

    def drop(self) -> None:
        """Give back a slot that was not sent."""
        self.helper.release(self._start)


class PoolWriter:
    """Lets a helper store one object that comes in pieces, as ``ObjectWriter`` does. For one thread.

    ``write`` returns before the piece is stored, and raises what storing the ones before it raised.
    """

    __slots__ = ("_helper", "_number", "_slot")

    def __init__(self, helper: _Helper, number: int) -> None:
        self._helper = helper
        self._number = number
        # Being filled.
        self._slot: Slot | None = None

    def write(self, buffer: Buffer) -> None:
        """Append ``buffer``."""
        view = memoryview(buffer)
        while view:
            slot = self._slot
            if slot is None:
                slot = self._slot = self._helper.slot()
            piece = view[: slot.room]
            slot.append(piece)
            view = view[len(piece) :]
            if not slot.room:
                self._send_full(slot)

    def _send_full(self, slot: Slot) -> None:
        """Send a whole slot; where the helper has enough to do, hash it here instead of waiting for it."""
        digests = b""
        self._helper.poll()
        if self._helper.is_full:
            digests = fsverity.block_digests(self._helper.algorithm, slot.content)
        self._send(slot, digests)

    def commit(self) -> Slot:
        """Make what was written an object, the only one in ``Slot.stored``. Ends the writing."""
        slot = self._slot or self._helper.slot()
        self._send(slot, last=True)
        return slot

    def _send(self, slot: Slot, digests: bytes = b"", *, last: bool = False) -> None:
        self._slot = None
        start, size = slot.range
        self._helper.send(slot, encode_piece(self._number, start, size, digests, last=last))

    def close(self) -> None:
        """Drop what was not sent. Twice is harmless."""
        if self._slot is not None:
            self._slot.drop()
            self._slot = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Helper:
    """One process, and the memory shared with it. Any thread may use it."""

    def __init__(self, repository: Repository) -> None:
        self.algorithm: Algorithm = repository.algorithm
        self._lock = threading.Lock()
        self._sent: deque[Slot] = deque()
        self._free = deque(at * SLOT for at in range(_SLOTS))
        # Why there will be no more answers.
        self._error: HostimageError | None = None
        shared = os.memfd_create("hostimaged-store", os.MFD_CLOEXEC)
        try:
            os.ftruncate(shared, _SLOTS * SLOT)
            self._map = mmap.mmap(shared, _SLOTS * SLOT)
            self.memory = memoryview(self._map)
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, ExitStack() as stack:
                stack.callback(self._socket.close)
                self._process = _start(repository, shared, theirs.fileno())
                stack.pop_all()
        finally:
            os.close(shared)

    @property
    def load(self) -> int:
        """Slots in use."""
        return _SLOTS - len(self._free)

    @property
    def is_full(self) -> bool:
        """Whether there is no free slot."""
        return not self._free

    def try_slot(self) -> Slot | None:
        """A free slot, if there is one now; the last is left to pieces, which are sent at once."""
        if len(self._free) > 1 and self._lock.acquire(blocking=False):
            try:
                if len(self._free) > 1:
                    return Slot(self, self._free.popleft())
            finally:
                self._lock.release()
        return None

    def slot(self) -> Slot:
        """A free slot for a piece, waiting for it."""
        while True:
            with self._lock:
                if self._error is not None:
                    raise self._error
                if self._free:
                    return Slot(self, self._free.popleft())
                if self._sent:
                    self._receive()
                    continue
            # Another thread is about to send the last one.
            time.sleep(_MOMENT)

    def send(self, slot: Slot, request: bytes) -> None:
        """Send a slot; what goes wrong is its answer."""
        with self._lock:
            self._sent.append(slot)
            try:
                self._socket.send(request)
            except OSError:
                # No more requests: the helper ends if it has not yet. Answers it gave before come first.
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)
                while self._sent:
                    self._receive()

    def poll(self) -> None:
        """Take the answers that are there."""
        if not self._sent or not self._lock.acquire(blocking=False):
            return
        try:
            while self._sent:
                if not self._receive(socket.MSG_DONTWAIT):
                    break
        finally:
            self._lock.release()

    def wait(self, slot: Slot) -> None:
        """Take answers until ``slot`` has its own."""
        while not slot.is_answered:
            with self._lock:
                # Another thread may have taken it meanwhile.
                if not slot.is_answered:
                    self._receive()

    def release(self, start: int) -> None:
        """Take back the slot that begins at ``start``."""
        self._free.append(start)

    def _receive(self, flags: int = 0) -> bool:
        """Take the next answer; False if there is none yet. The lock is held."""
        try:
            answer = self._socket.recv(MAX_ANSWER, flags)
        except BlockingIOError:
            return False
        except OSError:
            answer = b""
        slot = self._sent.popleft()
        try:
            if not answer:
                raise self._error or StorageError(_ENDED)
            slot.stored = decode_answer(answer, self.algorithm)
        except HostimageError as error:
            slot.error = self._error = error
        self._free.append(slot.range[0])
        return True

    def close(self) -> None:
        """End the process; what it was sent may be stored or not."""
        self._socket.close()
        import subprocess

        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.memory.release()
        self._map.close()


def _start(repository: Repository, shared: int, sock: int) -> subprocess.Popen[bytes]:
    """Start the program; raises ``OSError``."""
    import subprocess

    descriptors = (repository.fileno(), shared, sock)
    # -S: all that it would find is on the path already.
    argv = [sys.executable, "-S", "-P", "-c", _PROGRAM, *map(str, descriptors)]
    argv += [repository.algorithm.label, "secure" if repository.secure else "insecure"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=descriptors,
        env=os.environ | {"PYTHONPATH": path},
    )


class StorePool:
    """``processes`` helpers that store objects in ``repository``. A context manager; any thread may use it.

    They are started once so much was stored without them (``spend``) that they are worth it: ``worth`` bytes,
    0 for at once. Those that cannot be started, for want of memory or processes, are done without. Raises
    ``ReadOnly``.
    """

    def __init__(self, repository: Repository, processes: int, *, worth: int = WORTH) -> None:
        repository.check_writable()
        #: To be held while an object is stored in this process. That goes in and out of the interpreter all
        #: the time: two threads at it take turns every few microseconds, slower together than one alone.
        self.storing = threading.Lock()
        self._repository = repository
        self._processes = processes
        self._worth = worth
        self._helpers: list[_Helper] = []
        self._numbers = itertools.count(1)
        self._wanted = threading.Event()
        self._started = threading.Event()
        self._closing = threading.Event()
        # The kernel kills helpers when the thread that started them ends: it is one of their own.
        self._keeper = threading.Thread(target=self._keep, name="store-pool", daemon=True)
        if processes:
            self._keeper.start()
            if not worth:
                self._wanted.set()
                self._started.wait()

    def _keep(self) -> None:
        """Start the helpers when they are wanted, and end them."""
        self._wanted.wait()
        try:
            with suppress(OSError):
                while len(self._helpers) < self._processes and not self._closing.is_set():
                    self._helpers.append(_Helper(self._repository))
        finally:
            self._started.set()
        self._closing.wait()
        for helper in self._helpers:
            helper.close()

    def spend(self, size: int) -> None:
        """A content of ``size`` bytes, or a piece of one, is stored without a helper."""
        if not self._started.is_set():
            self._worth -= size + _FILE
            if self._worth <= 0:
                self._wanted.set()

    def slot(self) -> Slot | None:
        """A free slot of the helper with the least to do; None if all have enough."""
        for helper in self._helpers:
            helper.poll()
        for helper in sorted(self._helpers, key=lambda helper: helper.load):
            if (slot := helper.try_slot()) is not None:
                return slot
        return None

    def writer(self) -> PoolWriter | None:
        """A writer for content that comes in pieces; None without helpers."""
        if not self._helpers:
            return None
        for helper in self._helpers:
            helper.poll()
        return PoolWriter(min(self._helpers, key=lambda helper: helper.load), next(self._numbers))

    def close(self) -> None:
        """End the helpers. Twice is harmless."""
        self._closing.set()
        self._wanted.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        self._helpers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
