"""Who calls, and what a caller may do.

For now everything that changes anything is for root, and for the daemon's own user, so that an unprivileged
demo on a private bus works. What cannot be found out counts as a refusal.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import structlog

from hostimage_dbus.transport import BusClosed, BusError
from hostimaged.errors import AccessDenied, LimitsExceeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hostimage_dbus.transport import Connection, MethodCall

#: Calls of one user whose authorisation or acceptance may be under way.
CALLS_PER_UID: Final = 64
#: Seconds the bus gets to say who a caller is.
_LOOKUP_TIMEOUT: Final = 5.0
#: Unique names are never used twice, so what was learned of one stays true.
_REMEMBERED: Final = 1024

_logger = structlog.get_logger("hostimaged.bus")


class Callers:
    """Finds out and judges callers over ``connection``."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._uids: OrderedDict[str, int] = OrderedDict()
        self._in_flight: Counter[int] = Counter()
        self._trusted = frozenset({0, os.geteuid()})

    @asynccontextmanager
    async def privileged(self, call: MethodCall) -> AsyncIterator[int]:
        """The uid of a caller who may change things, while its call is answered.

        Raises ``AccessDenied``, or ``LimitsExceeded`` if too many calls of the user are under way.
        """
        uid = await self._uid(call.sender)
        if uid not in self._trusted:
            _logger.info("call.denied", member=call.member, uid=uid)
            raise AccessDenied(f"{call.member} is for root only")
        if self._in_flight[uid] >= CALLS_PER_UID:
            raise LimitsExceeded("too many calls of this user are under way")
        self._in_flight[uid] += 1
        try:
            yield uid
        finally:
            self._in_flight[uid] -= 1
            if not self._in_flight[uid]:
                del self._in_flight[uid]

    async def _uid(self, sender: str) -> int:
        if sender in self._uids:
            self._uids.move_to_end(sender)
            return self._uids[sender]
        try:
            uid = await self._connection.unix_user(sender, _LOOKUP_TIMEOUT)
        except BusClosed:
            raise
        except BusError as error:
            _logger.warning("caller.unknown", error=error.name)
            raise AccessDenied("the bus does not say who calls") from None
        self._uids[sender] = uid
        while len(self._uids) > _REMEMBERED:
            self._uids.popitem(last=False)
        return uid
