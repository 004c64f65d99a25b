"""Workers and finalisers as processes that begin where their work does, to be killed anywhere in it.

They are forked from one process that has imported everything, so that hundreds of them take seconds; what
they run is what the daemon and the unit start. Some are started as those do it, by name: ``fresh``.

As a program (``python -m hostimage_testing.forks FD``) this is the process that they are forked from.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostimage_testing.processes import members, python_environment

#: Seconds that any of them may take, on a busy machine.
PATIENCE = 60.0
MODULES = {"worker": "hostimaged.jobs.worker", "finalize": "hostimaged"}
#: Fields of what comes to the process they are forked from are few and short.
_MESSAGE = 64 << 10


# The process that they are forked from


def serve(requests: socket.socket) -> None:
    """Fork and wait as told, until nobody tells any more."""
    # What the work imports when it comes to it.
    import hostimaged.__main__
    import hostimaged.host.commands
    import hostimaged.host.pins
    import hostimaged.host.reorder
    import hostimaged.host.stage
    import hostimaged.host.status
    import hostimaged.jobs.host_work
    import hostimaged.jobs.worker
    import hostimaged.oci.layout
    import hostimaged.oci.pull  # noqa: F401

    fresh: dict[int, subprocess.Popen[bytes]] = {}
    while True:
        message, fds, _, _ = socket.recv_fds(requests, _MESSAGE, 1)
        if not message:
            return
        request = json.loads(message)
        if "wait" in request:
            answer = _wait(request["wait"], fresh)
        elif request["fresh"]:
            process = _start(request["program"], request["arguments"], fds)
            fresh[process.pid] = process
            answer = process.pid
        else:
            answer = _fork(request["program"], request["arguments"], fds, requests)
        for fd in fds:
            os.close(fd)
        requests.send(json.dumps(answer).encode())


def _wait(pid: int, fresh: dict[int, subprocess.Popen[bytes]]) -> int:
    if pid in fresh:
        return fresh.pop(pid).wait()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _arguments(program: str, arguments: list[str], fds: list[int], parent: int) -> list[str]:
    if program == "finalize":
        return ["finalize", *arguments]
    return [*arguments, "--fd", str(fds[0]), "--parent", str(parent)]


def _start(program: str, arguments: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", MODULES[program]]
    return subprocess.Popen(
        [*command, *_arguments(program, arguments, fds, os.getpid())], pass_fds=fds, start_new_session=True
    )


def _fork(program: str, arguments: list[str], fds: list[int], requests: socket.socket) -> int:
    from hostimaged import __main__ as daemon
    from hostimaged.jobs import worker

    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        requests.close()
        main = {"worker": worker.main, "finalize": daemon.main}[program]
        code = main(_arguments(program, arguments, fds, parent))
    finally:
        sys.stderr.flush()
        os._exit(code)


# The side of the tests


@dataclass
class End:
    """How a job ended. ``code`` is that of the process, negative for a signal; ``seconds`` what it took.

    Of a worker: its result, or the name of its error and what it said.
    """

    code: int
    seconds: float
    result: dict[str, Any] | None = None
    error: str = ""
    message: str = ""


@dataclass
class _Told:
    """What a worker sent."""

    pending: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)


class Forks:
    """Starts jobs; made by ``forking``."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests

    def _ask(self, request: dict[str, Any], fds: list[int]) -> int:
        socket.send_fds(self._requests, [json.dumps(request).encode()], fds)
        answer: int = json.loads(self._requests.recv(_MESSAGE))
        return answer

    def finalize(self, root: Path, moment: float | None = None, *, fresh: bool = False) -> End:
        """``hostimaged finalize``, killed ``moment`` seconds after its start."""
        request = {"program": "finalize", "arguments": ["--root", str(root)], "fresh": fresh}
        begun = time.monotonic()
        pid = self._ask(request, [])
        _kill_at(pid, None if moment is None else begun + moment)
        return self._end(pid, begun, _Told())

    def work(self, order: str, profile: str, moment: float | None = None, *, fresh: bool = False) -> End:
        """A worker with ``order``, an ``Order`` as text, killed ``moment`` seconds after its work began."""
        ours, theirs = socket.socketpair()
        with closing(ours):
            with closing(theirs):
                request = {"program": "worker", "arguments": ["--profile", profile], "fresh": fresh}
                pid = self._ask(request, [theirs.fileno()])
            ours.sendall(order.encode() + b"\n")
            told = _Told()
            begun = _follow(ours, told, moment)
            with suppress(ProcessLookupError):
                if moment is not None:
                    os.kill(pid, signal.SIGKILL)
            _kill_at(pid, None)
            _read(ours, told)
            return self._end(pid, begun, told)

    def _end(self, pid: int, begun: float, told: _Told) -> End:
        seconds = time.monotonic() - begun
        end = End(self._ask({"wait": pid}, []), seconds)
        deadline = time.monotonic() + PATIENCE
        while members({pid}):
            # Its helpers die with it, in a moment.
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for event in told.events:
            if event["event"] == "result":
                end.result = event["result"]
            elif event["event"] == "error":
                end.error, end.message = event["name"].rpartition(".")[2], event["message"]
        return end


def _kill_at(pid: int, deadline: float | None) -> None:
    """Wait for the end of a process; at ``deadline`` it is killed."""
    fd = os.pidfd_open(pid)
    try:
        left = PATIENCE if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([fd], [], [], left)[0]:
            assert deadline is not None, "it does not end"
            os.kill(pid, signal.SIGKILL)
            select.select([fd], [], [])
    finally:
        os.close(fd)


def _follow(sock: socket.socket, told: _Told, moment: float | None) -> float:
    """Take what a worker tells until its last event, or ``moment`` seconds after its first; when that was."""
    begun = 0.0
    deadline = time.monotonic() + PATIENCE
    while select.select([sock], [], [], max(deadline - time.monotonic(), 0))[0]:
        if not _read_once(sock, told):
            break
        if not begun:
            begun = time.monotonic()
            deadline = begun + (PATIENCE if moment is None else moment)
        if told.events[-1]["event"] in ("result", "error"):
            # It still has to end, and may be killed over that.
            break
    return begun or time.monotonic()


def _read(sock: socket.socket, told: _Told) -> None:
    while _read_once(sock, told):
        pass


def _read_once(sock: socket.socket, told: _Told) -> bool:
    """Take what came; False at the end. A worker that wants the repository alone has it."""
    try:
        data = sock.recv(1 << 20)
    except ConnectionResetError:
        return False
    *lines, told.pending = (told.pending + data).split(b"\n")
    for line in lines:
        event = json.loads(line)
        told.events.append(event)
        if event["event"] == "alone" and event["wanted"]:
            with suppress(OSError):
                sock.sendall(b"alone\n")
    return bool(data)


@contextmanager
def forking() -> Iterator[Forks]:
    """Has the process that jobs are forked from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = python_environment() | {"PYDANTIC_DISABLE_PLUGINS": "1"}
    with closing(ours):
        with closing(theirs):
            process = subprocess.Popen(
                [sys.executable, "-m", "hostimage_testing.forks", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        with process:
            try:
                yield Forks(ours)
            finally:
                ours.close()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
