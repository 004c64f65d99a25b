"""The emulator's own control socket (QMP): here only for a picture of the screen."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TextIO

_PATIENCE = 20.0


def screenshot(control: Path, picture: Path) -> None:
    """Have the emulator at ``control`` write its screen to ``picture``, as PNG; raises ``OSError``."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_PATIENCE)
        line.connect(str(control))
        with line.makefile("rw") as file:
            file.readline()
            for order in (
                {"execute": "qmp_capabilities"},
                {"execute": "screendump", "arguments": {"filename": str(picture), "format": "png"}},
            ):
                file.write(json.dumps(order) + "\n")
                file.flush()
                _answer(file)


def _answer(file: TextIO) -> None:
    """Wait for the answer; events that come before it are of no interest."""
    while line := file.readline():
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"].get("desc"))
        if "return" in answer:
            return
    raise OSError("the emulator hung up")
