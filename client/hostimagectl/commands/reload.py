"""``hostimagectl reload``: have the daemon read its settings again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimagectl import service

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Reload the daemon."""
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        await daemon.reload()
    if console.as_json:
        console.json({"error": None})
    elif not console.quiet:
        console.line("the settings are read again")
    return EXIT_OK
