"""A process that stores objects for another one: the far end of ``store_pool``.

Contents lie in memory that both have mapped; requests and answers are packets of a socket, in order. What
they look like is defined here. The process ends when the socket does.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository.objects import ObjectStore
from hostimaged.composefs.repository.stored import How, Stored
from hostimaged.composefs.repository.verity import VerityPolicy, VerityUnavailable
from hostimaged.errors import (
    CorruptRepository,
    HostimageError,
    NoSpace,
    ReadOnly,
    StorageError,
    VerityMismatch,
)
from hostimaged.ids import ObjectId
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.composefs.repository.objects import ObjectWriter

#: A request: 0 or the number of a large content; whether this is its last piece; where in the memory the
#: bytes begin. Sizes follow: of contents that lie one after the other, or of the piece, and then the digests
#: of its blocks if they are known.
_REQUEST: Final = struct.Struct("<IBI")
_SIZE: Final = struct.Struct("<I")
#: Bytes of the longest request: that of a piece of 1 MiB with digests of 64 bytes.
MAX_REQUEST: Final = 32 << 10
#: Contents in one request. Their answer, a byte and a digest each, stays far below a socket's buffer.
MAX_CONTENTS: Final = 256
#: First byte of an answer: for each object a byte, how it was stored, and its digest; or class and message of
#: an error.
_DONE: Final = b"\0"
_FAILED: Final = b"\1"
#: What the byte before a digest stands for.
_HOW: Final = (How.PRESENT, How.COPIED, How.REFLINKED, How.LINKED)
#: Bytes of the longest answer.
MAX_ANSWER: Final = 1 + MAX_CONTENTS * 65

#: What storing raises, by name.
_ERRORS: Final[dict[str, type[HostimageError]]] = {
    kind.__name__: kind
    for kind in (CorruptRepository, NoSpace, ReadOnly, StorageError, VerityMismatch, VerityUnavailable)
}


def encode_contents(start: int, sizes: Sequence[int]) -> bytes:
    """Ask to store contents that lie in the memory from ``start`` on."""
    return _REQUEST.pack(0, 0, start) + struct.pack(f"<{len(sizes)}I", *sizes)


def encode_piece(number: int, start: int, size: int, digests: bytes, *, last: bool) -> bytes:
    """Ask to append a piece to the large content ``number``, which begins with its first piece.

    ``digests`` are those of its blocks, or nothing.
    """
    return _REQUEST.pack(number, last, start) + _SIZE.pack(size) + digests


def decode_answer(answer: bytes, algorithm: Algorithm) -> list[Stored]:
    """What was stored; raises the error that the helper met."""
    if answer[:1] == _FAILED:
        name, _, message = answer[1:].decode().partition("\n")
        raise _ERRORS.get(name, StorageError)(message)
    step = 1 + algorithm.digest_size
    return [
        Stored(ObjectId(answer[at + 1 : at + step]), _HOW[answer[at]]) for at in range(1, len(answer), step)
    ]


def encode_error(error: HostimageError) -> bytes:
    """Tell what went wrong."""
    return _FAILED + f"{type(error).__name__}\n{error.message}".encode()


class _Helper:
    """Answers requests."""

    def __init__(self, store: ObjectStore, memory: memoryview) -> None:
        self._store = store
        self._memory = memory
        self._large: dict[int, ObjectWriter] = {}
        # What went wrong is the answer from then on. A socket that is closed with requests in it would make
        # the other end lose answers.
        self._error = b""

    def answer(self, request: bytes) -> bytes:
        """Do what ``request`` says."""
        if not self._error:
            try:
                return self._do(request)
            except HostimageError as error:
                self._error = encode_error(error)
        return self._error

    def _do(self, request: bytes) -> bytes:
        number, last, at = _REQUEST.unpack_from(request)
        if number:
            (size,) = _SIZE.unpack_from(request, _REQUEST.size)
            digests = request[_REQUEST.size + _SIZE.size :]
            stored = self._append(number, self._memory[at : at + size], digests, last=last)
            return _DONE + (_encoded(stored) if stored else b"")
        sizes = struct.unpack_from(f"<{(len(request) - _REQUEST.size) // 4}I", request, _REQUEST.size)
        parts = [_DONE]
        for size in sizes:
            parts.append(_encoded(self._store.store(self._memory[at : at + size])))
            at += size
        return b"".join(parts)

    def _append(self, number: int, piece: memoryview, digests: bytes, *, last: bool) -> Stored | None:
        writer = self._large.get(number)
        if writer is None:
            writer = self._large[number] = self._store.writer()
        writer.write(piece, digests)
        if not last:
            return None
        with writer:
            del self._large[number]
            return writer.commit()


def _encoded(stored: Stored) -> bytes:
    return bytes([_HOW.index(stored.how)]) + stored.id


def main(argv: Sequence[str]) -> NoReturn:
    """Serve until the socket ends, then end the process.

    Arguments: descriptors of the repository, of the memory and of the socket; the hash; ``secure`` or not.
    """
    root, shared, sock, label, secure = argv
    syscalls.set_parent_death_signal(signal.SIGKILL)
    # An interrupt from a terminal is the other end's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    algorithm = Algorithm.from_label(label)
    policy = VerityPolicy(algorithm, secure=secure == "secure")
    size = os.fstat(int(shared)).st_size
    channel = socket.socket(fileno=int(sock))
    memory = memoryview(mmap.mmap(int(shared), size))
    helper = _Helper(ObjectStore(int(root), algorithm, policy), memory)
    with suppress(BrokenPipeError, ConnectionResetError):  # nobody wants the answer
        while request := channel.recv(MAX_REQUEST):
            channel.send(helper.answer(request))
    # Nothing is left to do, and the other end waits: taking the interpreter down takes 20 ms.
    os._exit(0)
