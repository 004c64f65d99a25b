"""``make vm`` on a terminal: it starts, says what to type, and ends when it is told to."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from hostimage_testing.installed import Installed
from hostimage_testing.tools import REPOSITORY_ROOT

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

FULL = os.environ.get("HOSTIMAGE_VM_FULL") == "1"
PROGRAM = REPOSITORY_ROOT / "tests/vm/play.py"
LEAVE = b"\x01x"
#: Seconds for what takes one minute where nothing else runs.
LIMIT = 600


class Terminal:
    """A program on a terminal of its own, which hangs up when the context ends."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self._shown = b""
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            try:
                os.execvpe(argv[0], argv, environment)
            finally:
                os._exit(127)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._master >= 0:
            self._hang_up()

    def _hang_up(self) -> int:
        """Whatever is left on the terminal ends with it (SIGHUP); gives the status of the program."""
        os.close(self._master)
        self._master = -1
        _, status = os.waitpid(self._pid, 0)
        return status

    def run(self, command: str) -> str:
        """Have the shell carry out ``command``; gives what is shown until it asks for the next one."""
        self.type(command.encode() + b"\r")
        self.wait_for(command, LIMIT)
        return self.wait_for("root@guest", LIMIT)

    def wait_for(self, text: str, limit: float) -> str:
        """Wait until ``text`` is shown after what was waited for before; gives what is shown before it."""
        end = time.monotonic() + limit
        while (at := self._shown.find(text.encode())) < 0:
            if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
                pytest.fail(f"{text!r} is not shown:\n{self._shown.decode(errors='replace')[-4000:]}")
            try:
                self._shown += os.read(self._master, 1 << 16)
            except OSError:  # as Linux tells the end of a terminal
                pytest.fail(f"it ended:\n{self._shown.decode(errors='replace')[-4000:]}")
        before, self._shown = self._shown[:at], self._shown[at + len(text.encode()) :]
        return before.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    def end(self, limit: float) -> int:
        """Wait for the end; gives the exit code."""
        deadline = time.monotonic() + limit
        while True:
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    os.read(self._master, 1 << 16)
                except OSError:
                    break
            assert time.monotonic() < deadline, "it does not end"
        return os.waitstatus_to_exitcode(self._hang_up())


def test_a_guest_to_play_with(disks: Installed, tmp_path: Path) -> None:
    # Its disk is there already: where ``disks`` keeps it.
    cache = disks.disk.parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY_ROOT / "tests/support"),
        "HOSTIMAGE_TEST_CACHE": str(cache),
        "TMPDIR": str(tmp_path),
    }
    with Terminal([sys.executable, str(PROGRAM)], environment) as terminal:
        for command in ("su bob -c 'hostimagectl status'", "hostimagectl upgrade", "systemctl reboot"):
            terminal.wait_for(command, 60)
        terminal.wait_for("BdsDxe: starting", 60)
        if FULL:
            terminal.wait_for("root@guest", LIMIT)
            end = time.monotonic() + LIMIT
            # Where others work on the machine too, it may have to look for longer than a status waits.
            while terminal.run("su bob -c 'hostimagectl status'").count("v1") == 0:
                assert time.monotonic() < end, "it does not find what it runs"
        terminal.type(LEAVE)
        assert terminal.end(30) == 0
    assert list(tmp_path.iterdir()) == [], "something stays behind"
