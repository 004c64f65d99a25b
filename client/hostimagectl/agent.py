"""polkit's text agent, for a person at a terminal where no other agent is registered.

``pkttyagent --fallback`` asks for the password on the terminal, and leaves it to the agent of a desktop where
there is one. It is started only when the daemon says that somebody has to be asked.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import termios
from contextlib import suppress
from typing import Any, Final

from hostimagectl.output import is_terminal

PROGRAM: Final = "pkttyagent"
#: Seconds for the agent to register with polkit; then the call is made all the same.
READY_TIMEOUT: Final = 10.0
#: Seconds for the agent to end when told to.
STOP_TIMEOUT: Final = 2.0


class Agent:
    """An agent for this process; ``start`` is called at most once, ``stop`` always."""

    def __init__(self) -> None:
        self._program = shutil.which(PROGRAM)
        self._wrapper = shutil.which("setpriv")
        self._process: asyncio.subprocess.Process | None = None
        self._terminal: list[Any] | None = None

    def useful(self) -> bool:
        """Whether somebody may be there to ask: polkit asks root nothing, and a script cannot answer."""
        return os.geteuid() != 0 and is_terminal(sys.stdin) and self._program is not None

    async def start(self) -> None:
        """Start the agent and wait until it is registered; one that cannot be started is no error."""
        with suppress(OSError, ValueError, termios.error):
            self._terminal = termios.tcgetattr(sys.stdin.fileno())
        reading, writing = os.pipe()
        try:
            with suppress(OSError):
                self._process = await asyncio.create_subprocess_exec(
                    *self._command(writing), pass_fds=(writing,), stdin=asyncio.subprocess.DEVNULL, stdout=2
                )
            os.close(writing)
            writing = -1
            if self._process is not None:
                await _end_of_file(reading)
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)

    async def stop(self) -> None:
        """End the agent."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self._restore_terminal()

    def _command(self, notify: int) -> list[str]:
        command = [
            self._program or PROGRAM,
            "--process",
            str(os.getpid()),
            "--notify-fd",
            str(notify),
            "--fallback",
        ]
        # Where we are killed, nobody is to be asked any more.
        return [self._wrapper, "--pdeathsig", "TERM", *command] if self._wrapper else command

    def _restore_terminal(self) -> None:
        """Show again what is typed: an agent that ends while it asks leaves that switched off."""
        with suppress(OSError, ValueError, termios.error):
            terminal = sys.stdin.fileno()
            # In the background this would stop us.
            if self._terminal is not None and os.tcgetpgrp(terminal) == os.getpgrp():
                termios.tcsetattr(terminal, termios.TCSADRAIN, self._terminal)


async def _end_of_file(descriptor: int) -> None:
    """Wait until the other end is closed, but no longer than ``READY_TIMEOUT``."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT):
            await ready.wait()
    except TimeoutError:
        pass
    finally:
        loop.remove_reader(descriptor)
