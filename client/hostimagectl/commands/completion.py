"""``hostimagectl completion``: print the completion script of a shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimagectl.completion import script
from hostimagectl.parser import parser

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the script."""
    console.line(script(parser(), arguments.shell).rstrip("\n"))
    return EXIT_OK
