"""An event loop that notes whenever it could not run: in a daemon as it is shipped, or with nothing to do.

usage: heartbeat.py NOTES daemon ARGUMENT …    the daemon
       heartbeat.py NOTES control              a loop beside it: what the machine does to everybody
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

#: Seconds between two beats.
INTERVAL = 0.005


async def beat(notes: Path) -> None:
    """Until cancelled, write down for each beat when it was due (monotonic clock) and how late it came."""
    with notes.open("w", buffering=1) as out:
        while True:
            due = time.monotonic() + INTERVAL
            await asyncio.sleep(INTERVAL)
            out.write(f"{due:.6f} {time.monotonic() - due:.6f}\n")


def delays(notes: Path, begin: float, end: float) -> list[float]:
    """How late, in seconds, each beat came that was due between ``begin`` and ``end``; sorted."""
    found = []
    for line in notes.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            due, late = map(float, line.split())
            if begin <= due <= end:
                found.append(late)
    return sorted(found)


def _daemon(notes: Path, argv: list[str]) -> int:
    from hostimaged import __main__, serve

    original = serve._serve

    async def watched(*arguments: object) -> None:
        beating = asyncio.create_task(beat(notes))
        try:
            await original(*arguments)  # type: ignore[arg-type]
        finally:
            beating.cancel()

    serve._serve = watched  # type: ignore[assignment]
    return __main__.main(argv)


if __name__ == "__main__":
    if sys.argv[2] == "control":
        asyncio.run(beat(Path(sys.argv[1])))
    sys.exit(_daemon(Path(sys.argv[1]), sys.argv[3:]))
