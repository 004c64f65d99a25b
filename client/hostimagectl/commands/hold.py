"""``hostimagectl hold`` and ``release``: hold background updates for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimagectl import service
from hostimagectl.output import timestamp

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Begin or end the manual hold."""
    release = arguments.command == "release"
    until, reason = (0, "") if release else (arguments.until, arguments.reason)
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        await daemon.decide("HoldUpdates", "ts", [until, reason])
    if console.as_json:
        console.json({"error": None})
    elif not console.quiet:
        console.line(
            "updates are held no longer" if release else f"updates are held until {timestamp(until)}"
        )
    return EXIT_OK
