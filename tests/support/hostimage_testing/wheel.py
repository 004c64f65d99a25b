"""The wheel of this tree, and where it puts what is not Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hostimage_testing.tools import REPOSITORY_ROOT, absent

#: Places below the prefix, where the bus, polkit, systemd and the shells look.
SHARED_DATA = frozenset(
    {
        "share/dbus-1/system.d/org.hostimage1.conf",
        "share/dbus-1/system-services/org.hostimage1.service",
        "share/polkit-1/actions/org.hostimage1.policy",
        "share/doc/hostimaged/50-org.hostimage1.rules.example",
        "share/dbus-1/interfaces/org.hostimage1.Manager.xml",
        "share/dbus-1/interfaces/org.hostimage1.Deployment.xml",
        "share/dbus-1/interfaces/org.hostimage1.Job.xml",
        "lib/systemd/system/hostimaged.service",
        "lib/systemd/system/hostimaged-boot-check.service",
        "lib/systemd/system/hostimaged-finalize.service",
        "lib/systemd/system/hostimaged-update.service",
        "lib/systemd/system/hostimaged-update.timer",
        "lib/tmpfiles.d/hostimaged.conf",
        "lib/hostimaged/setup-root",
        "lib/dracut/modules.d/52hostimaged/hostimaged-root-setup.service",
        "lib/dracut/modules.d/52hostimaged/module-setup.sh",
        "share/initramfs-tools/hooks/hostimaged",
        "share/initramfs-tools/scripts/local-bottom/hostimaged",
        "share/man/man1/hostimagectl.1",
        "share/man/man5/org.hostimage1.5",
        "share/man/man5/hostimaged.toml.5",
        "share/man/man8/hostimaged.8",
        "share/bash-completion/completions/hostimagectl",
        "share/zsh/site-functions/_hostimagectl",
        "share/fish/vendor_completions.d/hostimagectl.fish",
    }
)
#: Those of them that are run.
SCRIPTS = frozenset(
    {
        "lib/hostimaged/setup-root",
        "lib/dracut/modules.d/52hostimaged/module-setup.sh",
        "share/initramfs-tools/hooks/hostimaged",
        "share/initramfs-tools/scripts/local-bottom/hostimaged",
    }
)


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this tree into ``directory``."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    done = subprocess.run(build, cwd=REPOSITORY_ROOT, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        absent(f"hatchling cannot build the wheel: {done.stderr[-500:]}")
    (built,) = directory.glob("*.whl")
    return built
