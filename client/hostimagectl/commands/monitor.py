"""``hostimagectl monitor``: print changes as they come.

It never starts the daemon: one that does not run changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import BUS_NAME, ROOT_PATH
from hostimage_dbus.transport import BUS, BusClosed, BusError
from hostimagectl import service
from hostimagectl.events import Event, Narrator, event_of, now
from hostimagectl.failure import Failure

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from hostimagectl.output import Console
    from hostimagectl.service import Service

RULES: Final = (
    f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{BUS_NAME}'",
    f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'",
)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print changes until a signal ends it; gives the exit code. Raises ``Failure`` when the bus is lost."""
    del arguments
    async with service.connect() as daemon:
        return await Monitor(daemon).run(console)


class Monitor:
    """Collects the daemon's signals and prints each; used once."""

    def __init__(self, daemon: Service) -> None:
        self._daemon = daemon
        self._owner: str | None = None
        self._owner_told = False
        # An int is the signal that ends us.
        self._events: asyncio.Queue[Event | Failure | int] = asyncio.Queue()

    async def run(self, console: Console) -> int:
        """Print until interrupted; gives the exit code."""
        unsubscribe = self._daemon.bus.on_signal(self._received)
        try:
            await self._subscribe()
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch_bus())
                with self._signals():
                    end = await self._print(console)
                watching.cancel()
        finally:
            unsubscribe()
        if isinstance(end, Failure):
            raise end
        return 128 + end

    async def _subscribe(self) -> None:
        try:
            for rule in RULES:
                await self._daemon.bus.add_match(rule)
        except BusClosed as error:
            raise Failure.no_bus(error.message) from None
        except BusError as error:
            raise Failure.no_service(f"the bus refuses our subscription: {error.message}") from None
        owner = await self._daemon.owner()
        if not self._owner_told:
            self._own(owner)

    def _own(self, owner: str | None) -> None:
        self._owner = owner
        self._events.put_nowait(Event(now(), "service", {"running": owner is not None}))

    def _received(self, path: str, interface: str, member: str, body: list[Any], sender: str) -> None:
        if sender == BUS and interface == BUS and member == "NameOwnerChanged":
            match body:
                case [name, str(), str(new)] if name == BUS_NAME:
                    self._owner_told = True
                    self._own(new or None)
        elif sender == self._owner and (event := event_of(path, interface, member, body)) is not None:
            self._events.put_nowait(event)

    async def _watch_bus(self) -> None:
        self._events.put_nowait(Failure.no_bus(str(await self._daemon.bus.closed())))

    async def _print(self, console: Console) -> Failure | int:
        narrator = Narrator()
        while isinstance(event := await self._events.get(), Event):
            if console.as_json:
                console.line(json.dumps(event.as_dict(), ensure_ascii=True))
            else:
                for line in narrator.lines(event):
                    console.line(line)
            if self._events.empty():
                console.finish()
        return event

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Take the user's signals, save those that whoever started us has switched off."""
        loop = asyncio.get_running_loop()
        wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in wanted:
            loop.add_signal_handler(number, self._events.put_nowait, int(number))
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)
