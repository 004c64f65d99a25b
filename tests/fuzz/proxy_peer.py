"""A double of skopeo's image proxy that says whatever an input tells it to.

The input is a script of replies: a byte of flags, the length of the text (16 bits, little-endian), the text,
and if a pipe comes with it, the length of its content and the content. Each reply waits for a request, unless
it is flagged as unasked for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from unittest import mock

from hostimaged.oci import proxy, skopeo
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import ContainersConfig

PIPE, FD_1, FD_2, KEEP_OPEN, UNASKED, LOG = 1, 2, 4, 8, 16, 32
#: More waits for a request that never comes.
MAX_REPLIES = 24
#: What a pipe takes without a reader.
PIPE_SIZE = 1 << 16
#: The client's patience, which decides how long an input takes.
SILENCE = 0.2


class Script:
    """The replies in an input."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def text(self) -> bytes:
        length = int.from_bytes(self._data[self._at : self._at + 2], "little")
        self._at += 2 + length
        return self._data[self._at - length : self._at]

    def __iter__(self) -> Iterator[tuple[int, bytes, bytes]]:
        for _ in range(MAX_REPLIES):
            if self._at >= len(self._data):
                return
            flags = self._data[self._at]
            self._at += 1
            text = self.text()
            yield flags, text, self.text() if flags & PIPE else b""


class FakeProcess:
    """A ``Popen`` of which nobody learns that there is only a thread."""

    def __init__(self, connection: socket.socket, log: IO[bytes], data: bytes) -> None:
        self.returncode = 0
        self._connection = connection
        self._log = log
        self._data = data
        self._writers: list[int] = []
        self._thread = threading.Thread(target=self._run, name="scripted skopeo")
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):
                for flags, text, content in Script(self._data):
                    if flags & LOG:
                        self._log.write(text)
                        self._log.flush()
                        continue
                    if not flags & UNASKED and not self._requested():
                        break
                    self._reply(flags, text, content)
        finally:
            self._connection.close()
            self._close_pipes()

    def _requested(self) -> bool:
        """Wait for a request; False for the last one."""
        request = self._connection.recv(1 << 16)
        if b'"FinishPipe"' in request:
            self._close_pipes()
        return bool(request) and b'"Shutdown"' not in request

    def _close_pipes(self) -> None:
        while self._writers:
            os.close(self._writers.pop())

    def _reply(self, flags: int, text: bytes, content: bytes) -> None:
        fds = [os.open(os.devnull, os.O_RDONLY) for flag in (FD_1, FD_2) if flags & flag]
        try:
            if flags & PIPE:
                reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                fds.append(reader)
                self._writers.append(writer)
                if content:
                    os.write(writer, content[:PIPE_SIZE])
                if not flags & KEEP_OPEN:
                    os.close(self._writers.pop())
            # An empty packet cannot be told from the end of the connection.
            socket.send_fds(self._connection, [text or b" "], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return self.returncode

    def poll(self) -> int:
        return self.returncode


@contextlib.contextmanager
def scripted_skopeo(data: bytes, work_dir: Path) -> Iterator[skopeo.SkopeoSource]:
    """A source that speaks with the double."""
    processes: list[FakeProcess] = []

    def spawn(argv: Sequence[str], *, pass_fds: Sequence[int], stderr: IO[bytes], **_: Any) -> FakeProcess:
        connection = socket.socket(fileno=os.dup(pass_fds[0]))
        processes.append(FakeProcess(connection, stderr, data))
        return processes[0]

    def stop(process: FakeProcess, _: float) -> None:
        process.wait()

    containers = ContainersConfig(
        work_dir / "policy.json", work_dir / "none", work_dir, (), explicit=True, storage=work_dir / "none"
    )
    reference = ImageReference.parse("docker://registry.example/os:latest")
    with (
        mock.patch.multiple(skopeo, spawn=spawn, stop=stop, _PATIENCE=SILENCE),
        mock.patch.multiple(proxy, _SLICE=0.02, _QUIET=0.02),
    ):
        source = skopeo.SkopeoSource(reference, containers, work_dir, Silent(), silence=SILENCE)
        with source:
            yield source
