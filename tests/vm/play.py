"""A guest to play with, on this terminal: ``make vm``.

Nothing is kept of what is done in it, only the disk that each starts from: that takes some minutes to make.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hostimage_testing import emulator, guest_registry, installed
from hostimage_testing.bootable import FOR_PEOPLE
from hostimage_testing.debian_root import USER
from hostimage_testing.tools import REPOSITORY_ROOT

_WELCOME = f"""\
A Debian 13 guest starts from a composefs image, emulated: it takes one minute or two until you are root on
its serial console, without a password. Three commands to begin with:

    su {USER} -c 'hostimagectl status'    # what is deployed; that takes no privilege
    hostimagectl upgrade                 # pulls version v2 from a registry on this machine, and stages it
    systemctl reboot                     # activates it on the way down; then look at the status again

Ctrl-a x switches the guest off, and all is gone.
"""


def play(directory: Path) -> int:
    """Run the guest until it is switched off; what it needs is below ``directory``. Gives the exit code."""
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE") or str(REPOSITORY_ROOT / ".cache/guest")
    print("making the guest's disk, unless it is there already", flush=True)
    disks = installed.prepare(directory, Path(cache) / "vm")
    with guest_registry.running(directory / "registry", disks.certificate, disks.layouts) as registry:
        registry.offer("v2")
        print(_WELCOME, flush=True)
        argv = emulator.command(directory, disks.overlay(directory), disks.images, registry.network)
        argv += ["-smbios", f"type=1,product={FOR_PEOPLE}", "-serial", "mon:stdio", "-serial", "null"]
        return subprocess.run(argv, check=False).returncode


def main() -> int:
    """Say what is missing, where something is."""
    try:
        with tempfile.TemporaryDirectory(prefix="guest-") as directory:
            return play(Path(directory))
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        print(error.msg, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
