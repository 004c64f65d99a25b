"""A disk whose unflushed writes are lost with the power, and a guest that has such a disk.

nbdkit keeps what is written to the disk to itself until it is told to flush; killed, it takes that with it.
What was flushed is in a plain file. An emulator alone, killed, would lose nothing: the host has its writes.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from hostimage_testing.emulator import Machine
from hostimage_testing.tools import require

_PATIENCE = 30.0


class Disk:
    """Serves the plain file ``raw``; its socket is below ``directory``. Off at first."""

    def __init__(self, directory: Path, raw: Path) -> None:
        self.raw = raw
        self._directory = directory
        self._socket = directory / "disk.socket"
        self._nbdkit = require("nbdkit")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def drive(self) -> str:
        """What the emulator is told of it."""
        server = f"file.server.type=unix,file.server.path={self._socket}"
        return f"file.driver=nbd,{server},format=raw,cache=none"

    @property
    def url(self) -> str:
        """What qemu-io is told of it."""
        return f"nbd+unix:///?socket={self._socket}"

    def start(self) -> None:
        """Serve, from what was flushed."""
        assert self._process is None, "it is served"
        self._socket.unlink(missing_ok=True)
        argv = ["setpriv", "--pdeathsig", "KILL", self._nbdkit, "--foreground", "--unix", self._socket]
        argv += ["--filter=cache", "file", self.raw, "cache=writeback"]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(self._directory)}
        )
        end = time.monotonic() + _PATIENCE
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                pytest.fail("nbdkit does not start")
            time.sleep(0.02)

    def cut(self) -> None:
        """Lose what was not flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Mains:
    """A guest and its disk on one plug: ``guest`` is off until ``start``.

    A context manager that pulls the plug at the end.
    """

    def __init__(self, directory: Path, raw: Path, images: Path, network: Sequence[str] = ()) -> None:
        self.disk = Disk(directory, raw)
        self.guest = Machine(directory, self.disk.drive, images, network)
        self.guest.disk_file = raw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.guest.__exit__(kind, error, trace)
        self.disk.cut()

    def start(self) -> float:
        """Give power, and boot; gives the seconds of the boot."""
        self.disk.start()
        return self.guest.start()

    def cut(self) -> None:
        """The disk first: nothing that the guest writes from then on counts."""
        self.disk.cut()
        self.guest.pull_the_plug()
