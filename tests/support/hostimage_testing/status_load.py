"""Many clients that read the status at a steady rate: one process, one call made beforehand, no library.

usage: status_load.py ADDRESS CLIENTS RATE WARM SECONDS

Each client is a connection of its own. A call is sent when it is due, whether or not others were answered,
and its time counts from when it was due: a daemon or a bus that stands still makes all that wait late. For
``WARM`` seconds nothing is counted; then it prints ``begin``, and in the end a line of JSON: ``sent``,
``errors``, ``times`` (seconds, one for each answer) and ``late`` (the most seconds that a call was sent late:
what this process itself adds to the times).
"""

from __future__ import annotations

import json
import select
import struct
import sys
import time
from collections import deque

from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

_CALL = new_method_call(
    DBusAddress("/org/hostimage1", "org.hostimage1", "org.hostimage1.Manager"),
    "GetStatus",
    "sa{sv}",
    ("native", {}),
)
#: The fixed part of a header: order, type, flags, version, length of the body, serial, length of the fields.
_HEADER = struct.Struct("<cBBBIII")
_RETURN, _ERROR = 2, 3
_SERIAL_AT = 8
#: Seconds to wait for the last answers.
_PATIENCE = 20.0


class Caller:
    """One connection; answers come in the order of the calls, for the daemon answers a status at once."""

    def __init__(self, address: str) -> None:
        self.connection: DBusConnection = open_dbus_connection(address)
        self._message = bytearray(_CALL.serialise(serial=1))
        self._serial = 1000
        self._due: deque[float] = deque()
        self._read = bytearray()

    def ask(self, due: float) -> None:
        """Send the call that is due."""
        self._serial += 1
        struct.pack_into("<I", self._message, _SERIAL_AT, self._serial)
        self.connection.sock.sendall(self._message)
        self._due.append(due)

    def answers(self) -> list[tuple[bool, float]]:
        """Take in what has come: for each answer whether it is a status, and when its call was due."""
        self._read += self.connection.sock.recv(1 << 16)
        found = []
        while len(self._read) >= _HEADER.size:
            order, kind, _, _, body, _, fields = _HEADER.unpack_from(self._read)
            size = _HEADER.size + (fields + 7) // 8 * 8 + body
            if order != b"l" or len(self._read) < size:
                break
            del self._read[:size]
            if kind in (_RETURN, _ERROR):
                found.append((kind == _RETURN, self._due.popleft()))
        return found

    @property
    def waiting(self) -> bool:
        return bool(self._due)


class Load:
    """All clients, and what they have seen."""

    def __init__(self, address: str, clients: int) -> None:
        self._callers = [Caller(address) for _ in range(clients)]
        self._poll = select.epoll()
        self._by_descriptor = {caller.connection.sock.fileno(): caller for caller in self._callers}
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.EPOLLIN)
        self.sent = self.errors = 0
        self.late = 0.0
        self.times: list[float] = []

    def run(self, rate: int, seconds: float) -> None:
        """Call by turns, ``rate`` times a second; returns with the last answer."""
        started = time.perf_counter()
        for number in range(int(rate * seconds)):
            due = started + number / rate
            while (left := due - time.perf_counter()) > 0:
                self._take(left)
            self.late = max(self.late, -left)
            self._callers[number % len(self._callers)].ask(due)
            self.sent += 1
        end = time.perf_counter() + _PATIENCE
        while any(caller.waiting for caller in self._callers) and time.perf_counter() < end:
            self._take(0.1)

    def _take(self, limit: float) -> None:
        for descriptor, _ in self._poll.poll(limit):
            for good, due in self._by_descriptor[descriptor].answers():
                self.times.append(time.perf_counter() - due)
                self.errors += not good


def main() -> None:
    address, clients, rate, warm, seconds = sys.argv[1:]
    load = Load(address, int(clients))
    load.run(int(rate), float(warm))
    load.sent = load.errors = 0
    load.late = 0.0
    load.times.clear()
    print("begin", flush=True)
    load.run(int(rate), float(seconds))
    print(json.dumps({"sent": load.sent, "errors": load.errors, "late": load.late, "times": load.times}))


if __name__ == "__main__":
    main()
