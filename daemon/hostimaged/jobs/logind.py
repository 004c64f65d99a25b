"""systemd-logind: who else is logged in, and locks against sleep and shutdown (org.freedesktop.login1(5)).

A host without logind is served all the same: then nobody can be counted, and nothing is locked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.descriptors import call_for_descriptor
from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import PROPERTIES_INTERFACE
from hostimage_dbus.transport import BusError, Variant
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimage_dbus.transport import Connection

NAME: Final = "org.freedesktop.login1"
PATH: Final = "/org/freedesktop/login1"
MANAGER: Final = "org.freedesktop.login1.Manager"
SESSION: Final = "org.freedesktop.login1.Session"
_SYSTEMD: Final = "org.freedesktop.systemd1"
_SYSTEMD_PATH: Final = "/org/freedesktop/systemd1"
_SYSTEMD_MANAGER: Final = "org.freedesktop.systemd1.Manager"
#: SD_LOGIND_SOFT_REBOOT, since systemd 254.
_SOFT_REBOOT: Final = 1 << 2
#: Errors of the bus, and of a logind that does not know of soft reboots.
_ABSENT: Final = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "UnknownMethod", "InvalidArgs")
)
#: Seconds logind gets. It answers at once, or is being started.
_TIMEOUT: Final = 10.0
#: Sessions of others that are looked at; that so many are nobody's is not to be believed.
_LOOKED_AT: Final = 32
#: Classes that logind does not count: nobody sits there. All others count, unknown ones too.
_NOBODYS: Final = frozenset(
    {"greeter", "lock-screen", "background", "background-light", "manager", "manager-early", "none"}
)

_logger = get_logger("hostimaged.jobs")


@dataclass(frozen=True, slots=True)
class Inhibition:
    """What is locked: ``what`` as logind names it, and why, for people.

    ``weak``: the user at the screen may override it without a password, where logind knows of that (257).
    """

    what: str
    why: str
    weak: bool = False


class Logind:
    """Asks logind over ``connection``; descriptors come over connections of their own to ``address``."""

    def __init__(self, connection: Connection, address: str | None = None) -> None:
        self._connection = connection
        self._address = address
        self._knows_weak = True

    async def other_sessions(self, uid: int) -> bool:
        """Whether users other than ``uid`` are logged in, as logind decides it before a reboot.

        True as well if it cannot be found out.
        """
        try:
            (sessions,) = await self._call(PATH, MANAGER, "ListSessions")
            others = [path for _, owner, _, _, path in sessions if owner != uid]
            if len(others) > _LOOKED_AT:
                return True
            for path in others:
                if await self._counts(path):
                    return True
        except BusError as error:
            _logger.info("logind.unknown", error=error.name)
            return True
        except (TypeError, ValueError):
            _logger.warning("logind.malformed")
            return True
        return False

    async def _counts(self, path: str) -> bool:
        try:
            (value,) = await self._call(path, PROPERTIES_INTERFACE, "Get", "ss", [SESSION, "Class"])
        except BusError as error:
            # A session may end between two looks.
            if error.name == ErrorName.UNKNOWN_OBJECT:
                return False
            raise
        return not isinstance(value, Variant) or value.value not in _NOBODYS

    async def reboot(self) -> None:
        """Restart the machine, in order; whoever asked for it was allowed to. Errors are logged."""
        _logger.info("host.reboot")
        try:
            await self._call(PATH, MANAGER, "Reboot", "b", [False])
        except BusError as error:
            _logger.warning("host.reboot-failed", error=error.name, detail=error.message)

    async def soft_reboot(self) -> None:
        """Restart all but the kernel, in order, from the root that is prepared. Errors are logged.

        Not by systemd's own method of that name, which stops no service first, and so finalizes nothing.
        """
        _logger.info("host.soft-reboot")
        try:
            try:
                await self._call(PATH, MANAGER, "RebootWithFlags", "t", [_SOFT_REBOOT])
            except BusError as error:
                if error.name not in _ABSENT:
                    raise
                # systemctl does the same where there is no logind.
                body = ["soft-reboot.target", "replace-irreversibly"]
                await self._connection.call(
                    _SYSTEMD, _SYSTEMD_PATH, _SYSTEMD_MANAGER, "StartUnit", "ss", body, timeout=_TIMEOUT
                )
        except BusError as error:
            _logger.warning("host.soft-reboot-failed", error=error.name, detail=error.message)

    async def _call(
        self, path: str, interface: str, member: str, signature: str = "", body: Sequence[object] = ()
    ) -> list[Any]:
        return await self._connection.call(NAME, path, interface, member, signature, body, timeout=_TIMEOUT)

    async def inhibit(self, inhibition: Inhibition) -> int | None:
        """Take the lock, which lasts until the descriptor that is returned is closed; None if it is not to be
        had. Never raises for what logind does."""
        modes = ["block-weak", "block"] if inhibition.weak and self._knows_weak else ["block"]
        for mode in modes:
            try:
                return await call_for_descriptor(
                    NAME,
                    PATH,
                    MANAGER,
                    "Inhibit",
                    "ssss",
                    [inhibition.what, "hostimaged", inhibition.why, mode],
                    address=self._address,
                    timeout=_TIMEOUT,
                )
            except BusError as error:
                if mode == "block-weak" and error.name == ErrorName.INVALID_ARGS:
                    self._knows_weak = False
                    continue
                _logger.info("inhibit.failed", what=inhibition.what, error=error.name, detail=error.message)
                return None
        return None


def release(descriptor: int) -> None:
    """Give a lock back."""
    os.close(descriptor)
