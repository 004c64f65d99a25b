"""A person's session: runs programs as that user, on a terminal or not, and types answers.

Runs inside a container (``hostimage_testing.container``), where the tests' own libraries are not. It reads a
line of JSON for each order on its standard input and writes one for each result; it ends with its standard
input. Orders:

``{"do": "run", "argv": [...], "terminal": bool, "answers": [[text, typed], ...], "limit": seconds}``
    runs a program to its end. On a terminal, each ``typed`` is entered once its ``text``, a prompt for a
    password, has appeared, and a null hangs up: the terminal is closed. Result: ``code``, ``out``, ``err``.
``{"do": "spawn", "id": name, "argv": [...]}``, ``{"do": "tell", "id": name, "line": text}``,
``{"do": "hear", "id": name, "limit": seconds}``, ``{"do": "wait", "id": name, "limit": seconds}``,
``{"do": "end", "id": name}``
    run a program beside others: write to it, read a line of it (null: there was none), wait for its end,
    kill it.

A result with ``failure`` says why an order could not be carried out.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from typing import Any


def run(argv: list[str], limit: float) -> dict[str, Any]:
    done = subprocess.run(argv, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit)
    return {"code": done.returncode, "out": done.stdout.decode(), "err": done.stderr.decode()}


def run_on_terminal(argv: list[str], answers: list[list[str | None]], limit: float) -> dict[str, Any]:
    pid, master = pty.fork()
    if pid == 0:
        try:
            os.execvp(argv[0], argv)
        finally:
            os._exit(127)
    try:
        screen = _converse(master, answers, time.monotonic() + limit)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(master)
        _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "out": screen, "err": ""}


def _converse(master: int, answers: list[list[str | None]], end: float) -> str:
    """Type the answers; returns what was shown until the program ended or the terminal is to be closed."""
    shown = b""
    answered = 0
    waiting = list(answers)
    while True:
        if not select.select([master], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"the terminal shows {shown.decode(errors='replace')!r}")
        try:
            data = os.read(master, 65536)
        except OSError:  # as Linux tells the end of a terminal
            data = b""
        if not data:
            return shown.decode(errors="replace")
        shown += data
        while waiting and str(waiting[0][0]).encode() in shown[answered:]:
            text, typed = waiting.pop(0)
            if typed is None:
                return shown.decode(errors="replace")
            answered = shown.index(str(text).encode(), answered) + len(str(text).encode())
            _wait_until_silent(master, end)
            os.write(master, typed.encode())


def _wait_until_silent(master: int, end: float) -> None:
    """Wait until what is typed is not shown: a prompt for a password drops what was typed before that."""
    while termios.tcgetattr(master)[3] & termios.ECHO:
        if time.monotonic() > end:
            raise TimeoutError("the prompt shows what is typed")
        time.sleep(0.2)


class Beside:
    """A program that runs beside others."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._read = b""

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def hear(self, limit: float) -> str | None:
        assert self.process.stdout is not None
        end = time.monotonic() + limit
        while b"\n" not in self._read:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def wait(self, limit: float) -> int:
        self.process.communicate(timeout=limit)
        return self.process.returncode

    def end(self) -> int:
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()
        return self.process.returncode


class Person:
    """Carries out orders."""

    def __init__(self) -> None:
        self._beside: dict[str, Beside] = {}

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        match order:
            case {"do": "run", "terminal": True}:
                return run_on_terminal(order["argv"], order["answers"], order["limit"])
            case {"do": "run"}:
                return run(order["argv"], order["limit"])
            case {"do": "spawn"}:
                self._beside[order["id"]] = Beside(order["argv"])
            case {"do": "tell"}:
                self._beside[order["id"]].tell(order["line"])
            case {"do": "hear"}:
                return {"line": self._beside[order["id"]].hear(order["limit"])}
            case {"do": "wait"}:
                return {"code": self._beside.pop(order["id"]).wait(order["limit"])}
            case {"do": "end"}:
                return {"code": self._beside.pop(order["id"]).end()}
            case _:
                raise ValueError(f"unknown order {order}")
        return {}

    def leave(self) -> None:
        for program in self._beside.values():
            program.end()


def main() -> None:
    person = Person()
    print(json.dumps({"session": os.environ.get("XDG_SESSION_ID", "")}), flush=True)
    try:
        for line in sys.stdin:
            try:
                result = person.do(json.loads(line))
            except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                result = {"failure": f"{type(error).__name__}: {error}"}
            print(json.dumps(result), flush=True)
    finally:
        person.leave()


if __name__ == "__main__":
    main()
