"""Units of systemd that count here, followed over the bus (org.freedesktop.systemd1(5)).

``TimerWatch``: when ``hostimaged-update.timer`` is due. ``FinalizerWatch``: whether
``hostimaged-finalize.service`` will activate what is staged. A host without systemd on the bus has neither.
"""

from __future__ import annotations

import asyncio
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
#: The objects of hostimaged-update.timer and hostimaged-finalize.service (sd_bus_path_encode(3)).
TIMER_PATH: Final = f"{MANAGER_PATH}/unit/hostimaged_2dupdate_2etimer"
FINALIZER_PATH: Final = f"{MANAGER_PATH}/unit/hostimaged_2dfinalize_2eservice"
#: USEC_INFINITY: nothing is due.
_NEVER: Final = (1 << 64) - 1

_logger = get_logger("hostimaged.jobs")


class Subscription:
    """systemd tells of changes of units only where somebody wants to know, and wants to hear that once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._owner = ""
        self._lock = asyncio.Lock()

    async def ask(self, owner: str) -> None:
        """Have the systemd with the unique name ``owner`` tell. Raises ``BusError``."""
        async with self._lock:
            if self._owner == owner:
                return
            await self._connection.call(owner, MANAGER_PATH, MANAGER, "Subscribe", timeout=TIMEOUT)
            self._owner = owner


class TimerWatch:
    """Follows the timer over ``connection``; ``tell`` gets when it is due, microseconds since the epoch.

    0: never, or it is not waiting just now.
    """

    def __init__(
        self, connection: Connection, subscription: Subscription, tell: Callable[[int], None]
    ) -> None:
        self._tell = tell
        self._due = 0
        self._subscription = subscription
        self._properties = PropertyWatch(connection, NAME, TIMER_PATH, (UNIT, TIMER), self._take)

    async def run(self) -> None:
        """Follow it, until cancelled or the bus is gone."""
        await self._properties.run()

    async def _take(self, owner: str) -> None:
        due = 0
        if owner:
            try:
                await self._subscription.ask(owner)
                due = await self._look(owner)
            except BusClosed:
                raise
            except BusError as error:
                _logger.info("timer.unknown", error=error.name)
        if due != self._due:
            self._due = due
            self._tell(due)

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


class FinalizerWatch:
    """Follows the finalizer over ``connection``; ``tell`` gets whether it is known not to run.

    It is active from the boot on, and works when it is stopped: one that is not active has worked already.
    """

    def __init__(
        self, connection: Connection, subscription: Subscription, tell: Callable[[bool], None]
    ) -> None:
        self._tell = tell
        self._missing = False
        self._subscription = subscription
        self._properties = PropertyWatch(connection, NAME, FINALIZER_PATH, (UNIT,), self._take)

    async def run(self) -> None:
        """Follow it, until cancelled or the bus is gone."""
        await self._properties.run()

    async def _take(self, owner: str) -> None:
        missing = False
        if owner:
            try:
                await self._subscription.ask(owner)
                state = await self._properties.get(owner, UNIT, "ActiveState")
                missing = state is not None and state.value in ("inactive", "failed")
            except BusClosed:
                raise
            except BusError as error:
                _logger.info("finalizer.unknown", error=error.name)
        if missing != self._missing:
            self._missing = missing
            self._tell(missing)
