"""Conditions of the host that hold background jobs: a metered network, and power from a battery.

They are what NetworkManager and UPower say, if they run: nobody is started for it, and what is not known
holds nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import PROPERTIES_INTERFACE
from hostimage_dbus.transport import BUS, BUS_PATH, BusClosed, BusError, Variant
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimage_dbus.transport import Connection

_TIMEOUT: Final = 10.0
#: Seconds between two looks, so that a service that changes its mind all the time costs little.
_PAUSE: Final = 0.2

_logger = get_logger("hostimaged.jobs")


@dataclass(frozen=True, slots=True)
class Condition:
    """A property of a service, and the values of it that hold jobs for ``reason``."""

    reason: str
    name: str
    path: str
    interface: str
    member: str
    signature: str
    values: tuple[object, ...]


CONDITIONS: Final = (
    # NMMetered: 1 yes, 3 probably, by the kind of connection; 0 unknown, 2 no, 4 probably not.
    Condition(
        "metered",
        "org.freedesktop.NetworkManager",
        "/org/freedesktop/NetworkManager",
        "org.freedesktop.NetworkManager",
        "Metered",
        "u",
        (1, 3),
    ),
    Condition(
        "battery",
        "org.freedesktop.UPower",
        "/org/freedesktop/UPower",
        "org.freedesktop.UPower",
        "OnBattery",
        "b",
        (True,),
    ),
)


class Watch:
    """Follows one condition over ``connection``; ``tell`` is called when it begins or ends."""

    def __init__(
        self, connection: Connection, condition: Condition, tell: Callable[[str, bool], None]
    ) -> None:
        self._connection = connection
        self._condition = condition
        self._tell = tell
        self._owner: str | None = None
        self._holds = False
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow it, until cancelled or the bus is gone."""
        condition = self._condition
        unsubscribe = self._connection.on_signal(self._heard)
        try:
            await self._connection.add_match(
                f"type='signal',sender='{condition.name}',path='{condition.path}',"
                f"interface='{PROPERTIES_INTERFACE}',member='PropertiesChanged',arg0='{condition.interface}'"
            )
            await self._connection.add_match(
                f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',"
                f"arg0='{condition.name}'"
            )
            found = await self._find_owner()
            if self._owner is None:
                # What signals told since is newer.
                self._owner = found
            while True:
                self._news.clear()
                holds = await self._look(self._owner) if self._owner else False
                if holds != self._holds:
                    self._holds = holds
                    _logger.info("condition.changed", reason=condition.reason, holds=holds)
                    self._tell(condition.reason, holds)
                await asyncio.sleep(_PAUSE)
                await self._news.wait()
        except BusClosed:
            return
        except BusError as error:
            _logger.warning("condition.unknown", reason=condition.reason, error=error.name)
        finally:
            unsubscribe()

    async def _find_owner(self) -> str:
        try:
            reply = await self._connection.call(
                BUS, BUS_PATH, BUS, "GetNameOwner", "s", [self._condition.name], timeout=_TIMEOUT
            )
        except BusClosed:
            raise
        except BusError:
            return ""
        match reply:
            case [str(owner)]:
                return owner
        return ""

    async def _look(self, owner: str) -> bool:
        """Ask the owner itself: a call to its name might start a service that has just ended."""
        condition = self._condition
        try:
            reply = await self._connection.call(
                owner,
                condition.path,
                PROPERTIES_INTERFACE,
                "Get",
                "ss",
                [condition.interface, condition.member],
                timeout=_TIMEOUT,
            )
        except BusClosed:
            raise
        except BusError as error:
            _logger.info("condition.unknown", reason=condition.reason, error=error.name)
            return False
        match reply:
            case [Variant() as value] if value.signature == condition.signature:
                return value.value in condition.values
        _logger.info("condition.malformed", reason=condition.reason)
        return False

    def _heard(self, path: str, interface: str, member: str, body: list[Any], sender: str) -> None:
        if sender == BUS and (interface, member) == (BUS, "NameOwnerChanged"):
            name, _, owner = body
            if name == self._condition.name:
                self._owner = owner
                self._news.set()
        elif sender == self._owner and (path, member) == (self._condition.path, "PropertiesChanged"):
            # What it says is not believed but looked up: it may only say that something changed.
            del interface
            self._news.set()
