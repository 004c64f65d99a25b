"""A dbus-daemon of type system for tests, reachable by every user of the machine and by nobody's accident."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostimage_testing.tools import require

# What a distribution's system.conf says.
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:abstract={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
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
  </policy>
  <policy user="root">
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Debug.Stats"/>
  </policy>
  {policy}
</busconfig>
"""


@contextmanager
def private_bus(directory: Path, *policy: str) -> Iterator[str]:
    """Run a bus with the ``policy`` fragments (XML) added; gives its address.

    The socket is an abstract one, so that other users reach it whatever the permissions of ``directory``.
    """
    config = directory / "private-bus.conf"
    config.write_text(
        _CONFIG.format(socket=f"hostimage-test-{secrets.token_hex(8)}", policy="\n".join(policy))
    )
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, (directory / "private-bus.log").open("wb") as log:
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
        assert address, (directory / "private-bus.log").read_text()
        yield address
    finally:
        process.kill()
        process.wait()
