"""A dbus-daemon of type system for tests, reachable by every user of the machine and by nobody's accident."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostimage_testing.tools import require

# What a distribution's system.conf lets everybody do.
DEFAULT_POLICY = """<policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Peer"/>
  </policy>"""
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  {listen}
  <auth>EXTERNAL</auth>
  {policy}
</busconfig>
"""
_STATISTICS = """<policy user="root">
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Debug.Stats"/>
  </policy>"""


@contextmanager
def private_bus(directory: Path, *policy: str) -> Iterator[str]:
    """Run a bus with the ``policy`` fragments (XML) added; gives its address.

    The socket is an abstract one, so that other users reach it whatever the permissions of ``directory``.
    """
    listen = f"unix:abstract=hostimage-test-{secrets.token_hex(8)}"
    policies = (DEFAULT_POLICY, _STATISTICS, *policy)
    with dbus_daemon(directory / "private-bus", [listen], policies) as (_, address):
        yield address


@contextmanager
def dbus_daemon(
    path: Path, listen: Iterable[str], policies: Iterable[str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a bus of type system at the addresses ``listen``; gives its process and its first address.

    ``policies`` are elements of its configuration. That and its log are files beside each other, which
    begin with ``path``.
    """
    config, log_file = path.with_suffix(".conf"), path.with_suffix(".log")
    places = "\n  ".join(f"<listen>{address}</listen>" for address in listen)
    config.write_text(_CONFIG.format(listen=places, policy="\n  ".join(policies)))
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                require("dbus-daemon"),
                f"--config-file={config}",
                "--nofork",
                "--nopidfile",
                f"--print-address={writing}",
            ],
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
        os.close(writing)
        address = pipe.readline().decode().strip()
    try:
        assert address, log_file.read_text()
        yield process, address
    finally:
        # A stopped one does not die before it goes on.
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
