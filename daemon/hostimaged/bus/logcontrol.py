"""The object through which systemctl reads and sets the level of logging (org.freedesktop.LogControl1(5))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimage_dbus.names import LOG_CONTROL_INTERFACE, LOG_CONTROL_PATH
from hostimage_dbus.server import Export, ObjectServer
from hostimaged import log
from hostimaged.errors import InvalidArgs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.gate import Gate

#: Names of syslog(3) as systemd writes them, and the level of ours that logs as much.
LEVELS: Final[Mapping[str, str]] = {
    "emerg": "critical",
    "alert": "critical",
    "crit": "critical",
    "err": "error",
    "warning": "warning",
    "notice": "notice",
    "info": "info",
    "debug": "debug",
}


class LogControl:
    """Exports the object; ``level`` is the level of the settings."""

    def __init__(self, server: ObjectServer, gate: Gate, level: str) -> None:
        self._server = server
        self._gate = gate
        self._level = _name(level)
        self._target = "journal" if log.to_journal() else "console"

    def export(self) -> None:
        """Put the object on the bus."""
        interface = self._server.interfaces[LOG_CONTROL_INTERFACE]
        values = {
            "LogLevel": self._level,
            "LogTarget": self._target,
            "SyslogIdentifier": "hostimaged",
        }
        setters = {"LogLevel": self._set_level, "LogTarget": self._set_target}
        self._server.export(LOG_CONTROL_PATH, Export(interface, values, {}, setters))

    def set(self, level: str) -> None:
        """Log at ``level``, one of the settings."""
        self._apply(_name(level))

    def _apply(self, name: str) -> None:
        log.set_level(LEVELS[name])
        self._server.change(LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE, {"LogLevel": name})

    async def _set_level(self, call: MethodCall, name: str) -> None:
        await self._gate.only_root(call)
        if name not in LEVELS:
            raise InvalidArgs(f"a log level is one of {', '.join(LEVELS)}")
        self._apply(name)

    async def _set_target(self, call: MethodCall, name: str) -> None:
        await self._gate.only_root(call)
        if name not in ("auto", self._target):
            raise InvalidArgs(f"messages go to the {self._target}, as the daemon was started")


def _name(level: str) -> str:
    return {"error": "err"}.get(level, level)
