"""Who calls. What cannot be found out counts as a refusal."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from hostimage_dbus.transport import BusClosed, BusError
from hostimaged.bus.polkit import Caller
from hostimaged.errors import AccessDenied, LimitsExceeded
from hostimaged.log import get_logger
from hostimaged.system.units import unit_of_process

if TYPE_CHECKING:
    from hostimage_dbus.transport import Connection

#: Seconds the bus gets to say who a caller is.
_LOOKUP_TIMEOUT: Final = 5.0
#: Calls of one connection that may wait for this. The bus allows a user 256 connections: together they are
#: far fewer than the object server has room for, so that they keep nobody out.
WAITING_PER_NAME: Final = 8
#: Unique names are never used twice, so what was learned of one stays true.
_REMEMBERED: Final = 1024

_logger = get_logger("hostimaged.bus")


class Callers:
    """Finds out callers over ``connection``; questions to the bus are tasks of ``tasks``."""

    def __init__(self, connection: Connection, tasks: asyncio.TaskGroup) -> None:
        self._connection = connection
        self._tasks = tasks
        self._known: OrderedDict[str, Caller] = OrderedDict()
        self._units: OrderedDict[str, str] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        self._asking: dict[str, asyncio.Task[Caller | None]] = {}

    async def identify(self, name: str) -> Caller:
        """The caller with the unique name ``name``.

        Raises ``AccessDenied`` if the bus does not know it, ``LimitsExceeded`` if too many calls ask at once.
        """
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        if name not in self._asking:
            # One question for all calls of a connection.
            self._asking[name] = self._tasks.create_task(self._ask(name))
            self._asking[name].add_done_callback(lambda _: self._asking.pop(name))
        if self._waiting[name] >= WAITING_PER_NAME:
            raise LimitsExceeded("too many calls at once on a new connection")
        self._waiting[name] += 1
        try:
            caller = await asyncio.shield(self._asking[name])
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
        if caller is None:
            raise AccessDenied("the bus does not say who calls")
        return caller

    async def learn_unit(self, caller: Caller) -> None:
        """Find out the systemd unit that the caller's process is in, for ``unit``."""
        if caller.name in self._units:
            self._units.move_to_end(caller.name)
            return
        try:
            pid = await self._connection.process_id(caller.name, _LOOKUP_TIMEOUT)
        except BusError:
            return
        self._units[caller.name] = await asyncio.to_thread(unit_of_process, pid, caller.uid)
        while len(self._units) > _REMEMBERED:
            self._units.popitem(last=False)

    def unit(self, caller: Caller) -> str:
        """The unit as it was learned, for people; "" if it could not be found out."""
        return self._units.get(caller.name, "")

    async def _ask(self, name: str) -> Caller | None:
        try:
            uid = await self._connection.unix_user(name, _LOOKUP_TIMEOUT)
        except BusClosed:
            return None
        except BusError as error:
            _logger.warning("caller.unknown", error=error.name)
            return None
        self._known[name] = caller = Caller(name, uid)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return caller
