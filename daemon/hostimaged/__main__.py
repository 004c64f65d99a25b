"""The daemon: ``hostimaged [--root DIR]``; and what is done without it: ``hostimaged finalize`` and others.

Each imports only what it needs: a shutdown waits for the finalizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged import __version__
from hostimaged.system.paths import HostPaths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: What is done without the daemon (``hostimaged.host.commands``).
_COMMANDS: Final = ("finalize", "deploy", "boot-check", "collect")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; exit code 0 after SIGTERM or SIGINT, 1 for a failure told on standard error.

    The first argument may be the name of a command instead, which then has its own arguments and exit codes.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in _COMMANDS:
        from hostimaged.host import commands

        main_of: Callable[[Sequence[str]], int] = getattr(commands, f"{given[0].replace('-', '_')}_main")
        return main_of(given[1:])
    parser = argparse.ArgumentParser(
        prog="hostimaged",
        description="Own the composefs repository of this host and serve it over D-Bus.",
        epilog="Commands without the daemon, each with a --help: finalize, boot-check, deploy, collect.",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="serve a host made of plain files below DIR")
    parser.add_argument("--version", action="version", version=f"hostimaged {__version__}")
    arguments = parser.parse_args(given)
    paths = HostPaths.live() if arguments.root is None else HostPaths.scratch(arguments.root)
    from hostimaged.serve import serve

    return serve(paths)


if __name__ == "__main__":
    sys.exit(main())
