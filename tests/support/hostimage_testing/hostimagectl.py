"""hostimagectl as a process of its own, and a terminal to run it in."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from dataclasses import dataclass
from typing import Any, Self

from hostimage_testing.bus import PATIENCE, Bus
from hostimage_testing.tools import REPOSITORY_ROOT


@dataclass
class Hostimagectl:
    """A running hostimagectl."""

    process: asyncio.subprocess.Process
    out: str = ""
    err: str = ""

    @classmethod
    async def start(cls, bus: Bus, *arguments: str, **options: Any) -> Hostimagectl:
        """Start it on ``bus``; ``options`` are those of ``create_subprocess_exec``."""
        environment = os.environ | {
            "DBUS_SYSTEM_BUS_ADDRESS": bus.address,
            "TERM": "xterm",
            "COLUMNS": "120",
            "PYTHONPATH": os.pathsep.join(str(REPOSITORY_ROOT / part) for part in ("client", "dbus")),
        }
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hostimagectl",
            *arguments,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            **(pipes | options),
        )
        return cls(process)

    @property
    def code(self) -> int | None:
        """Exit code, once it ended."""
        return self.process.returncode

    async def end(self) -> int:
        """Wait for its end and give its exit code; ``out`` and ``err`` are then what it wrote."""
        async with asyncio.timeout(PATIENCE):
            out, err = await self.process.communicate()
        self.out, self.err = (out or b"").decode(), (err or b"").decode()
        assert "Traceback" not in self.err
        assert self.process.returncode is not None
        return self.process.returncode

    async def says(self, text: str) -> None:
        """Wait for a line with ``text`` on standard error; ``err`` has only what comes after it."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while text not in (line := (await self.process.stderr.readline()).decode()):
                assert line, f"it ended without saying {text!r}"


async def run(bus: Bus, *arguments: str) -> Hostimagectl:
    """Run it to its end."""
    client = await Hostimagectl.start(bus, *arguments)
    await client.end()
    return client


class Screen:
    """A terminal that the client writes to; ``text`` is all it ever got."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.text = ""
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self.master, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self.slave)

    def _read(self) -> None:
        self.text += os.read(self.master, 65536).decode()
        self._news.set()

    async def shows(self, *parts: str) -> None:
        """Wait until every one of ``parts`` was written."""
        async with asyncio.timeout(PATIENCE):
            while not all(part in self.text for part in parts):
                self._news.clear()
                await self._news.wait()
