"""Conditions of the host that hold background jobs: a metered network, and power from a battery.

They are what NetworkManager and UPower say, if they run: nobody is started for it, and what is not known
holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimage_dbus.transport import BusClosed, BusError
from hostimaged.jobs.properties import PropertyWatch
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimage_dbus.transport import Connection

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
        self._condition = condition
        self._tell = tell
        self._holds = False
        self._properties = PropertyWatch(
            connection, condition.name, condition.path, (condition.interface,), self._take
        )

    async def run(self) -> None:
        """Follow it, until cancelled or the bus is gone."""
        await self._properties.run()

    async def _take(self, owner: str) -> None:
        condition = self._condition
        holds = await self._look(owner) if owner else False
        if holds != self._holds:
            self._holds = holds
            _logger.info("condition.changed", reason=condition.reason, holds=holds)
            self._tell(condition.reason, holds)

    async def _look(self, owner: str) -> bool:
        condition = self._condition
        try:
            value = await self._properties.get(owner, condition.interface, condition.member)
        except BusClosed:
            raise
        except BusError as error:
            _logger.info("condition.unknown", reason=condition.reason, error=error.name)
            return False
        if value is not None and value.signature == condition.signature:
            return value.value in condition.values
        _logger.info("condition.malformed", reason=condition.reason)
        return False
