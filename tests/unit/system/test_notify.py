"""Notifications to the service manager."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.system.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def test_messages(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "3000000", "OTHER": "x"}
    notifier = Notifier(environment)
    # Children must not speak in our name.
    assert environment == {"OTHER": "x"}
    assert notifier.watchdog_interval == 3.0
    notifier.ready("starting")
    notifier.status("pull")
    notifier.reloading()
    notifier.stopping()
    notifier.watchdog()
    got = [manager.recv(4096).decode() for _ in range(5)]
    assert got[0] == "READY=1\nSTATUS=starting"
    assert got[1] == "STATUS=pull"
    assert got[2].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert got[2].rpartition("=")[2].isdigit()
    assert got[3:] == ["STOPPING=1", "WATCHDOG=1"]


def test_a_status_is_one_line(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.status("a\nMAINPID=1\0b")
    assert manager.recv(4096).decode() == "STATUS=a MAINPID=1 b"


def test_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0hostimage-test-notify-" + str(os.getpid()))
        Notifier({"NOTIFY_SOCKET": "@" + sock.getsockname()[1:].decode()}).ready("x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


@pytest.mark.parametrize("address", ["", "/nonexistent/socket"])
def test_nobody_listens(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).ready("x")


def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    for _ in range(5000):
        notifier.watchdog()


@pytest.mark.parametrize(("usec", "pid"), [("", ""), ("x", ""), ("5000000", "1")])
def test_no_watchdog(usec: str, pid: str) -> None:
    assert Notifier({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}).watchdog_interval == 0.0
