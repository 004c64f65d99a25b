"""A Debian 13 root with the project and two people in it: what containers and guests are made of."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hostimage_testing.tools import absent, require
from hostimage_testing.wheel import build_wheel

#: Who knows a password that polkit accepts, and who knows none.
ADMINISTRATOR, USER = "alice", "bob"
PASSWORD = "correct horse"
#: Puts a program into an environment of its own.
ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")


def bootstrap(base: Path, packages: Sequence[str], variant: str = "minbase") -> None:
    """Make a root of ``packages`` as a tar archive at ``base``; skips the test where that cannot be done.

    ``variant``: mmdebstrap's; with ``extract`` the packages are only unpacked.
    """
    program = require("mmdebstrap")
    if os.geteuid() != 0:
        absent("making a Debian root needs root")
    base.parent.mkdir(parents=True, exist_ok=True)
    partial = base.with_suffix(".partial.tar")
    slim = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "info", "locale", "man")]
    argv = [program, f"--variant={variant}", "--mode=root", f"--include={','.join(packages)}", *slim]
    # Without our terminal: a package that asks something there would wait for ever in the background.
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "TERM", *argv, "--quiet", "trixie", partial],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if done.returncode != 0:
        absent(f"mmdebstrap failed: {done.stderr[-500:]}")
    partial.rename(base)


def unpack(base: Path, root: Path) -> None:
    """Unpack what ``bootstrap`` made into the new directory ``root``."""
    root.mkdir()
    subprocess.run(["tar", "-C", root, "--numeric-owner", "-xpf", base], check=True)


def in_root(root: Path, *argv: str, feed: str = "") -> None:
    """Run a program in ``root``; ``RuntimeError`` shows what it said if it failed."""
    done = subprocess.run(
        ["chroot", root, *ENVIRONMENT, *argv], check=False, capture_output=True, text=True, input=feed
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed in the root: {done.stdout}\n{done.stderr}")


def install_wheel(root: Path, directory: Path) -> None:
    """Install the wheel of this tree, built in ``directory``, as a package would.

    Below /usr, where bus, polkit and systemd look, without fetching anything.
    """
    wheel = Path(shutil.copy(build_wheel(directory), root))
    pip = ["pip", "install", "--quiet", "--break-system-packages", "--prefix", "/usr", "--no-deps"]
    pip += ["--no-index", "--root-user-action=ignore", "--disable-pip-version-check"]
    in_root(root, "env", "DEB_PYTHON_INSTALL_LAYOUT=deb", *pip, f"/{wheel.name}")
    wheel.unlink()


def add_people(root: Path) -> None:
    """Add the administrator and the user."""
    in_root(root, "useradd", "--create-home", "--groups", "sudo", ADMINISTRATOR)
    in_root(root, "useradd", "--create-home", USER)
    in_root(root, "chpasswd", feed=f"{ADMINISTRATOR}:{PASSWORD}\n")
