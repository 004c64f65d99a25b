"""Telling the service manager how the daemon is (sd_notify(3)).

Every function does nothing if the service manager did not ask to be told, and never raises: a lost
notification must not stop the work.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Sends notifications to the socket named in ``environment``.

    The variables are taken out of it, so that children do not speak in our name.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        name, usec, pid = (environment.pop(variable, "") for variable in _VARIABLES)
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watchdog = int(usec) / 1e6 if usec.isdigit() and pid in ("", str(os.getpid())) else 0.0

    @property
    def watchdog_interval(self) -> float:
        """Seconds after which a missing ``watchdog`` counts as a hang; 0: nobody watches."""
        return self._watchdog

    def ready(self, status: str) -> None:
        """The service can be used."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """The settings are read again; ``ready`` ends it."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={usec}")

    def stopping(self) -> None:
        """The service is about to end."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The service lives."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        # A line is an assignment: what comes from outside must not begin one.
        text = "\n".join(" ".join(assignment.splitlines()) for assignment in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # A service manager that does not read must not stop the daemon.
                sock.setblocking(False)
                sock.sendto(text.replace("\0", " ").encode(), self._address)
        except OSError:
            pass
