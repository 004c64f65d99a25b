"""The parts of a layer into the repository: contents become objects, and their ids part of the stream."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.repository import ObjectWriter
from hostimaged.composefs.repository.store_pool import Slot
from hostimaged.oci.layer_parts import Part

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import How, Repository, Sharing, Stored
    from hostimaged.composefs.repository.store_pool import PoolWriter, StorePool
    from hostimaged.composefs.splitstream import Writer
    from hostimaged.ids import ObjectId
    from hostimaged.progress import Reporter

#: Bytes that may wait for an object before them that is not stored yet.
_WAITING: Final = 4 << 20
#: What a part that waits takes at least.
_OVERHEAD: Final = 200


class LayerStore:
    """Makes objects of contents, and writes the stream in order.

    Contents go to the helpers of ``pool`` as long as those have room; what they cannot take at once is stored
    here and now, so that nobody waits. ``noticed`` is told the id of each, in order. A context manager, for
    one thread.
    """

    def __init__(
        self,
        repository: Repository,
        writer: Writer,
        reporter: Reporter,
        pool: StorePool | None,
        noticed: Callable[[ObjectId], object] | None,
    ) -> None:
        self._repository = repository
        self._writer = writer
        self._reporter = reporter
        self._pool = pool
        self._storing = pool.storing if pool is not None else nullcontext()
        self._noticed = noticed
        # Being filled, not sent yet.
        self._slot: Slot | None = None
        # Parts from the first object on that is stored elsewhere: inline bytes, or an object and its size.
        self._waiting: deque[bytes | tuple[Stored, int] | tuple[Slot, int, int]] = deque()
        self._waiting_bytes = 0
        self._large: ObjectWriter | PoolWriter | None = None
        self._large_size = 0
        self.objects_new = self.objects_present = self.bytes_new = self.bytes_present = 0
        # Objects and bytes by how they were stored.
        self.how: dict[How, tuple[int, int]] = {}

    def add(self, part: Part, buffer: Buffer) -> None:
        """Store the next part."""
        if part is Part.INLINE:
            if self._waiting:
                self._wait_with(bytes(buffer), len(buffer))
            else:
                self._writer.inline(buffer)
        elif part is Part.CONTENT:
            self._content(buffer)
        else:
            self._piece(buffer, last=part is Part.LAST_PIECE)

    def _content(self, buffer: Buffer) -> None:
        size = len(buffer)
        slot = self._slot
        if slot is not None and not slot.has_room(size):
            self._send()
            slot = None
        if slot is None and self._pool is not None:
            slot = self._slot = self._pool.slot()
            self._settle()
        if slot is not None:
            self._wait_with((slot, slot.append(buffer), size))
            return
        self._reporter.at("layer.store")
        if self._pool is not None:
            self._pool.spend(size)
        with self._storing:
            stored = self._repository.store_object(buffer)
        self._stored(stored, size)

    def _piece(self, buffer: Buffer, *, last: bool) -> None:
        self._reporter.at("layer.store")
        large = self._large
        if large is None:
            # In front of a wait for the helper.
            self._send()
            large = self._pool.writer() if self._pool is not None else None
            large = self._large = large or self._repository.object_writer()
            self._large_size = 0
        if isinstance(large, ObjectWriter):
            if self._pool is not None:
                self._pool.spend(len(buffer))
            with self._storing:
                large.write(buffer)
        else:
            large.write(buffer)
        self._large_size += len(buffer)
        if last:
            self._large = None
            with large:
                stored = large.commit()
            if isinstance(stored, Slot):
                self._wait_with((stored, 0, self._large_size))
            else:
                self._stored(stored, self._large_size)
        self._settle()

    def add_file(self, fd: int, size: int, sharing: Sharing, seen: Callable[[Buffer], object]) -> None:
        """Store the next content, that of an open file; ``seen`` gets it, too."""
        self._reporter.at("layer.store")
        with self._storing:
            stored = self._repository.store_file(fd, size, sharing, seen)
        self._stored(stored, size)

    def _send(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._reporter.at("layer.store")
            slot.send()

    def _stored(self, stored: Stored, size: int) -> None:
        if self._waiting:
            self._wait_with((stored, size))
        else:
            self._append(stored, size)

    def _wait_with(self, part: bytes | tuple[Stored, int] | tuple[Slot, int, int], size: int = 0) -> None:
        self._waiting.append(part)
        self._waiting_bytes += size + _OVERHEAD
        if self._waiting_bytes > _WAITING:
            self._settle(wait=True)

    def _settle(self, *, wait: bool = False) -> None:
        """Write what waited for objects that are stored by now; with ``wait``, all that waits."""
        waiting = self._waiting
        while waiting:
            head = waiting[0]
            if isinstance(head, bytes):
                self._writer.inline(head)
            elif len(head) == 2:
                self._append(*head)
            else:
                slot, index, size = head
                if wait and slot is self._slot:
                    self._send()
                if not (wait or slot.is_answered):
                    return
                self._append(slot.wait()[index], size)
            waiting.popleft()
            self._waiting_bytes -= _OVERHEAD + (len(head) if isinstance(head, bytes) else 0)

    def _append(self, stored: Stored, size: int) -> None:
        self._writer.external(stored.id, size)
        if self._noticed is not None:
            self._noticed(stored.id)
        objects, total = self.how.get(stored.how, (0, 0))
        self.how[stored.how] = objects + 1, total + size
        if stored.is_new:
            self.objects_new += 1
            self.bytes_new += size
        else:
            self.objects_present += 1
            self.bytes_present += size

    def finish(self) -> None:
        """Write all that was added to the stream."""
        self._send()
        self._settle(wait=True)

    def close(self) -> None:
        """Drop what is not finished."""
        if self._large is not None:
            self._large.close()
        if self._slot is not None:
            self._slot.drop()
        self._large = self._slot = None
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
