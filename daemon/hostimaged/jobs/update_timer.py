"""When the next update comes by itself: what systemd says of ``hostimaged-update.timer``.

A host without systemd on the bus, or on which nobody enabled the timer, is told as one without.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from hostimage_dbus.transport import BusClosed, BusError
from hostimaged.jobs.properties import TIMEOUT, PropertyWatch
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimage_dbus.transport import Connection

NAME: Final = "org.freedesktop.systemd1"
MANAGER_PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
UNIT: Final = "org.freedesktop.systemd1.Unit"
TIMER: Final = "org.freedesktop.systemd1.Timer"
#: The object of hostimaged-update.timer (sd_bus_path_encode(3)).
PATH: Final = "/org/freedesktop/systemd1/unit/hostimaged_2dupdate_2etimer"
#: USEC_INFINITY: nothing is due.
_NEVER: Final = (1 << 64) - 1

_logger = get_logger("hostimaged.jobs")


class TimerWatch:
    """Follows the timer over ``connection``; ``tell`` gets when it is due, microseconds since the epoch.

    0: never, or it is not waiting just now.
    """

    def __init__(self, connection: Connection, tell: Callable[[int], None]) -> None:
        self._connection = connection
        self._tell = tell
        self._due = 0
        self._subscribed = ""
        self._properties = PropertyWatch(connection, NAME, PATH, (UNIT, TIMER), self._take)

    async def run(self) -> None:
        """Follow it, until cancelled or the bus is gone."""
        await self._properties.run()

    async def _take(self, owner: str) -> None:
        due = 0
        if owner:
            try:
                await self._subscribe(owner)
                due = await self._look(owner)
            except BusClosed:
                raise
            except BusError as error:
                _logger.info("timer.unknown", error=error.name)
        if due != self._due:
            self._due = due
            self._tell(due)

    async def _subscribe(self, owner: str) -> None:
        """systemd tells of changes of units only where somebody wants to know."""
        if self._subscribed == owner:
            return
        await self._connection.call(owner, MANAGER_PATH, MANAGER, "Subscribe", timeout=TIMEOUT)
        self._subscribed = owner

    async def _look(self, owner: str) -> int:
        state = await self._properties.get(owner, UNIT, "SubState")
        if state is None or state.value != "waiting":
            return 0
        calendar = await self._usec(owner, "NextElapseUSecRealtime")
        since_boot = await self._usec(owner, "NextElapseUSecMonotonic")
        if since_boot:
            since_boot += time.time_ns() // 1000 - time.monotonic_ns() // 1000
        return min((due for due in (calendar, since_boot) if due > 0), default=0)

    async def _usec(self, owner: str, member: str) -> int:
        value = await self._properties.get(owner, TIMER, member)
        if value is None or value.signature != "t" or value.value == _NEVER:
            return 0
        return int(value.value)
