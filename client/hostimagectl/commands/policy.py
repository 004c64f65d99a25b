"""``hostimagectl policy``: what the daemon does without being asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimage_dbus.errors import EXIT_OK
from hostimage_dbus.names import MANAGER_INTERFACE, ROOT_PATH
from hostimagectl import service
from hostimagectl.output import printable

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Set the policy, or show it if none is given."""
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        policy = arguments.policy
        if policy is not None:
            await daemon.decide("SetUpdatePolicy", "s", [policy])
        else:
            policy = await daemon.property_text(ROOT_PATH, MANAGER_INTERFACE, "UpdatePolicy")
    if console.as_json:
        console.json({"policy": policy})
    elif arguments.policy is None or not console.quiet:
        console.line(printable(policy))
    return EXIT_OK
