"""A double of systemd-logind: sessions, locks as descriptors whose end is noticed, and reboots.

It runs in a thread of its own with another implementation of D-Bus, so that it needs nothing of the test's
loop, and sends descriptors as the real one does.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jeepney import (
    DBusAddress,
    HeaderFields,
    MessageType,
    new_error,
    new_method_call,
    new_method_return,
    new_signal,
)
from jeepney.io.blocking import DBusConnection, open_dbus_connection

NAME = "org.freedesktop.login1"
SYSTEMD = "org.freedesktop.systemd1"
#: For the configuration of a bus: everybody may be logind, or systemd, and talk to it.
POLICY = "".join(
    f"""
  <policy context="default">
    <allow own="{name}"/>
    <allow send_destination="{name}"/>
  </policy>
"""
    for name in (NAME, SYSTEMD)
)
_BUS = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
_ERROR = "org.freedesktop.DBus.Error."


@dataclass
class Lock:
    """A lock that was taken; ``released``: when it was given back, on the monotonic clock."""

    what: str
    who: str
    why: str
    mode: str
    pipe: int
    released: float | None = None


@dataclass
class LogindDouble:
    """``sessions``: uid and class of each. ``answer``: "yes", "no", "silence", "wrong", "two", "flood".

    ``soft_reboot``: the name of the error that a soft reboot is answered with, "" for success.
    """

    sessions: list[tuple[int, str]] = field(default_factory=list)
    answer: str = "yes"
    knows_weak: bool = True
    soft_reboot: str = ""
    calls: list[tuple[str, Sequence[Any]]] = field(default_factory=list)
    locks: list[Lock] = field(default_factory=list)
    callers: set[str] = field(default_factory=set)

    @property
    def held(self) -> list[str]:
        """What is locked now."""
        return [lock.what for lock in self.locks if lock.released is None]

    def look(self) -> None:
        """Notice locks that were given back."""
        for lock in self.locks:
            if lock.released is None and select.select([lock.pipe], [], [], 0)[0]:
                lock.released = time.monotonic()

    def handle(self, connection: DBusConnection, message: Any) -> None:
        if message.header.message_type is not MessageType.method_call:
            return
        fields = message.header.fields
        member = fields[HeaderFields.member]
        self.callers.add(fields[HeaderFields.sender])
        self.calls.append((member, message.body))
        if self.answer == "silence":
            return
        if self.answer == "no":
            connection.send(new_error(message, f"{_ERROR}AccessDenied", "s", ("no",)))
        elif member == "ListSessions":
            rows = [(str(n), uid, "name", "", f"/s/{n}") for n, (uid, _) in enumerate(self.sessions)]
            connection.send(new_method_return(message, "a(susso)", (rows,)))
        elif member == "Get":
            self._get(connection, message)
        elif member == "Inhibit":
            self._inhibit(connection, message)
        elif member == "RebootWithFlags" and self.soft_reboot:
            connection.send(new_error(message, self.soft_reboot, "s", ("no",)))
        elif member in ("Reboot", "RebootWithFlags"):
            connection.send(new_method_return(message))
        elif member == "StartUnit":
            connection.send(new_method_return(message, "o", ("/job/1",)))

    def _get(self, connection: DBusConnection, message: Any) -> None:
        number = int(message.header.fields[HeaderFields.path].rpartition("/")[2])
        kind = self.sessions[number][1]
        if kind == "gone":
            connection.send(new_error(message, f"{_ERROR}UnknownObject", "s", ("gone",)))
        else:
            connection.send(new_method_return(message, "v", (("s", kind),)))

    def _inhibit(self, connection: DBusConnection, message: Any) -> None:
        what, who, why, mode = message.body
        if mode == "block-weak" and not self.knows_weak:
            connection.send(new_error(message, f"{_ERROR}InvalidArgs", "s", ("Invalid mode specification",)))
            return
        reading, writing = os.pipe()
        # Before the answer: who gets it looks here.
        self.locks.append(Lock(what, who, why, mode, reading))
        try:
            if self.answer == "flood":
                _flood(connection, message.header.fields[HeaderFields.sender], writing)
            if self.answer == "wrong":
                connection.send(new_method_return(message, "u", (7,)))
            elif self.answer == "two":
                connection.send(new_method_return(message, "hh", (writing, writing)))
            else:
                connection.send(new_method_return(message, "h", (writing,)))
        finally:
            os.close(writing)


def _flood(connection: DBusConnection, name: str, descriptor: int) -> None:
    """Send descriptors to whoever asks; what the bus does not let through comes back as an error."""
    somebody = DBusAddress("/x", name, "org.example.Test")
    for number in range(200):
        files = (descriptor,) * (1 + number % 8)
        signal = new_signal(somebody, "Flood", "h" * len(files), files)
        signal.header.fields[HeaderFields.destination] = name
        connection.send(signal)
        connection.send(new_method_call(somebody, "Take", "h" * len(files), files))


@contextmanager
def logind(address: str, *names: str) -> Iterator[LogindDouble]:
    """Be logind on the bus at ``address``, or what is called by ``names``."""
    double = LogindDouble()
    stop = threading.Event()
    with open_dbus_connection(address, enable_fds=True) as connection:
        for name in names or (NAME,):
            connection.send_and_get_reply(new_method_call(_BUS, "RequestName", "su", (name, 4)), timeout=20)

        def serve() -> None:
            while not stop.is_set():
                try:
                    double.handle(connection, connection.receive(timeout=0.01))
                except TimeoutError:
                    pass
                except (ConnectionError, OSError):
                    return
                double.look()

        thread = threading.Thread(target=serve, name="logind")
        thread.start()
        try:
            yield double
        finally:
            stop.set()
            thread.join()
            for lock in double.locks:
                os.close(lock.pipe)
