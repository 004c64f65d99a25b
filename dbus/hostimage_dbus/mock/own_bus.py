"""A message bus of one's own: a dbus-daemon in a directory that only its user can enter."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimage_dbus.transport import BusClosed

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={directory}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


@contextmanager
def own_bus() -> Iterator[str]:
    """Run a dbus-daemon; gives its address. Raises ``BusClosed`` if it cannot be started."""
    with tempfile.TemporaryDirectory(prefix="hostimage-mock-") as name:
        directory = Path(name)
        (directory / "bus.conf").write_text(_CONFIG.format(directory=directory))
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe:
            try:
                process = subprocess.Popen(
                    [
                        "dbus-daemon",
                        f"--config-file={directory}/bus.conf",
                        "--nofork",
                        "--nopidfile",
                        f"--print-address={writing}",
                    ],
                    pass_fds=[writing],
                    stdin=subprocess.DEVNULL,
                )
            except OSError as error:
                raise BusClosed(f"dbus-daemon cannot be started: {error.strerror}") from None
            finally:
                os.close(writing)
            address = pipe.readline().decode().strip()
        try:
            if not address:
                raise BusClosed("dbus-daemon did not start")
            yield address
        finally:
            process.terminate()
            process.wait()
