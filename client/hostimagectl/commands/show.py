"""``hostimagectl show``: a deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimage_dbus.names import DEPLOYMENT_INTERFACE
from hostimagectl import service
from hostimagectl.output import text_of
from hostimagectl.results import fields

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Show the deployment."""
    async with service.connect() as daemon:
        path = await daemon.deployment(arguments.deployment)
        show(await daemon.properties(path, DEPLOYMENT_INTERFACE), console)
    return EXIT_OK


def show(properties: Mapping[str, object], console: Console) -> None:
    """Print the properties of a deployment."""
    if console.as_json:
        console.json({"deployment": dict(properties)})
    elif console.quiet:
        console.line(text_of(properties.get("Id")))
    else:
        console.fields(fields(properties))
