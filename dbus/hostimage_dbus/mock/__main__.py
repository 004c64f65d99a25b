"""``python -m hostimage_dbus.mock [--scenario NAME] [--own-bus]``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from hostimage_dbus.mock.own_bus import own_bus
from hostimage_dbus.mock.scenarios import SCENARIOS, find
from hostimage_dbus.mock.service import Mock
from hostimage_dbus.names import BUS_NAME
from hostimage_dbus.transport import BusClosed, BusError, Connection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimage_dbus.mock.scenarios import Scenario

_VARIABLE: Final = "DBUS_SYSTEM_BUS_ADDRESS"


def main(argv: Sequence[str] | None = None) -> int:
    """Play a scenario until SIGINT or SIGTERM; 0 after that, 1 for a bus that cannot be used, 2 for usage."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<20} {scenario.summary}")
        return 0
    if not arguments.own_bus and _VARIABLE not in os.environ:
        # On the system bus it would be taken for the real one.
        print(f"{_VARIABLE} is not set: name a private bus, or use --own-bus", file=sys.stderr)
        return 2
    try:
        with ExitStack() as stack:
            address = stack.enter_context(own_bus()) if arguments.own_bus else os.environ[_VARIABLE]
            asyncio.run(serve(address, find(arguments.scenario), arguments.duration))
    except BusError as error:
        print(f"mock: {error.message}", file=sys.stderr)
        return 1
    return 0


async def serve(address: str, scenario: Scenario, duration: float) -> None:
    """Play ``scenario`` on the bus at ``address`` until a signal; raises ``BusError`` if the bus is lost."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    connection = await Connection.connect(address)
    try:
        await connection.request_name(BUS_NAME)
        async with asyncio.TaskGroup() as tasks:
            Mock(connection, tasks, scenario, duration=duration).start()
            print(f"{_VARIABLE}={address}", flush=True)
            lost = asyncio.ensure_future(connection.closed())
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({lost, stopping}, return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            stopping.cancel()
            raise _End
    except* _End:
        pass
    finally:
        await connection.close()
    if not stop.is_set():
        raise BusClosed("the connection to the bus is lost")


class _End(Exception):
    """Ends the jobs that still run."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hostimage_dbus.mock",
        description="Play hostimaged on a private bus, for the development of frontends. The address of the "
        "bus is printed; frontends find it in the environment variable DBUS_SYSTEM_BUS_ADDRESS.",
    )
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", metavar="NAME", choices=names, default="idle", help="default: idle")
    parser.add_argument("--list", action="store_true", help="list the scenarios and end")
    parser.add_argument("--own-bus", action="store_true", help="start a dbus-daemon, and end it at the end")
    parser.add_argument(
        "--duration", metavar="SECONDS", type=_seconds, default=10.0, help="of a job; default: 10"
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("between 0 and 3600")
    return value


if __name__ == "__main__":
    sys.exit(main())
