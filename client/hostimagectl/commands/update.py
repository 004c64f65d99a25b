"""``hostimagectl update``: what the update policy says is to be done without being asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_OK
from hostimage_dbus.names import MANAGER_INTERFACE, ROOT_PATH
from hostimagectl import service
from hostimagectl.catalog import UPDATE_OPTIONS
from hostimagectl.commands.job import options_of
from hostimagectl.failure import Failure
from hostimagectl.outcome import carry_out

if TYPE_CHECKING:
    import argparse

    from hostimagectl.output import Console

#: What each policy calls: the member, and the signature and body before its options.
_CALLS: Final = {"check": ("Check", "s", [""]), "download": ("Pull", "s", [""]), "stage": ("Upgrade", "", [])}


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Start the job that the policy wants and follow it; the result on standard output."""
    async with service.connect(ask=not arguments.no_ask_password) as daemon:
        policy = await daemon.property_text(ROOT_PATH, MANAGER_INTERFACE, "UpdatePolicy")
        if policy == "none":
            _nothing(console)
            return EXIT_OK
        if policy not in _CALLS:
            raise Failure.bad_reply("UpdatePolicy")
        member, signature, body = _CALLS[policy]
        options = options_of(UPDATE_OPTIONS, arguments)
        return await carry_out(
            daemon,
            console,
            lambda: daemon.start_job(member, signature, body, options),
            wait=arguments.wait,
            quiet_key="manifest-digest",
        )


def _nothing(console: Console) -> None:
    if console.as_json:
        console.json({"policy": "none"})
    else:
        console.note("nothing is to be done: the update policy is none")
