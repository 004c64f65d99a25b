"""``hostimagectl log-level``: how much the daemon logs (org.freedesktop.LogControl1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimage_dbus.names import LOG_CONTROL_INTERFACE, LOG_CONTROL_PATH
from hostimagectl import service
from hostimagectl.output import printable

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Set the level, or show it if none is given."""
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        level = arguments.level
        if level is not None:
            await daemon.set_log_level(level)
        else:
            level = await daemon.property_text(LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE, "LogLevel")
    if console.as_json:
        console.json({"level": level})
    elif arguments.level is None or not console.quiet:
        console.line(printable(level))
    return EXIT_OK
