"""Properties of services on the bus that may come and go: looked at when they may have changed.

Nobody is started for it. Not here: what the properties mean (``conditions``, ``units``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import PROPERTIES_INTERFACE
from hostimage_dbus.transport import BUS, BUS_PATH, BusClosed, BusError, Variant
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hostimage_dbus.transport import Connection

#: Seconds a service gets to answer.
TIMEOUT: Final = 10.0
#: Seconds between two looks, so that a service that changes its mind all the time costs little.
_PAUSE: Final = 0.2

_logger = get_logger("hostimaged.jobs")


class PropertyWatch:
    """Follows the object ``path`` of the service ``name``, of which properties of ``interfaces`` count.

    ``look`` is awaited at first and whenever there is news, with the unique name of the service, "" while
    nobody has its name: a call to the name itself might start a service that has just ended.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        path: str,
        interfaces: tuple[str, ...],
        look: Callable[[str], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._name = name
        self._path = path
        self._interfaces = interfaces
        self._look = look
        self._owner: str | None = None
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow it until cancelled, or the bus is gone."""
        unsubscribe = self._connection.on_signal(self._heard)
        try:
            await self._follow()
        except BusClosed:
            return
        except BusError as error:
            _logger.warning("properties.unknown", service=self._name, error=error.name)
        finally:
            unsubscribe()

    async def _follow(self) -> None:
        for interface in self._interfaces:
            await self._connection.add_match(
                f"type='signal',sender='{self._name}',path='{self._path}',"
                f"interface='{PROPERTIES_INTERFACE}',member='PropertiesChanged',arg0='{interface}'"
            )
        await self._connection.add_match(
            f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{self._name}'"
        )
        found = await self._find_owner()
        if self._owner is None:
            # What signals told since is newer.
            self._owner = found
        while True:
            self._news.clear()
            await self._look(self._owner)
            await asyncio.sleep(_PAUSE)
            await self._news.wait()

    async def get(self, owner: str, interface: str, member: str) -> Variant | None:
        """The value of a property; None for an answer that is none. Raises ``BusError``."""
        reply = await self._connection.call(
            owner, self._path, PROPERTIES_INTERFACE, "Get", "ss", [interface, member], timeout=TIMEOUT
        )
        match reply:
            case [Variant() as value]:
                return value
        return None

    async def _find_owner(self) -> str:
        try:
            reply = await self._connection.call(
                BUS, BUS_PATH, BUS, "GetNameOwner", "s", [self._name], timeout=TIMEOUT
            )
        except BusClosed:
            raise
        except BusError:
            return ""
        match reply:
            case [str(owner)]:
                return owner
        return ""

    def _heard(self, path: str, interface: str, member: str, body: list[Any], sender: str) -> None:
        if sender == BUS and (interface, member) == (BUS, "NameOwnerChanged"):
            name, _, owner = body
            if name == self._name:
                self._owner = owner
                self._news.set()
        elif sender == self._owner and (path, member) == (self._path, "PropertiesChanged"):
            # What it says is not believed but looked up: it may only say that something changed.
            self._news.set()
