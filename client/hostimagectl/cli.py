"""Command line of ``hostimagectl``: the choice of a command, and how a run ends.

Nothing but the standard library and the error table is imported before a command is chosen.
"""

from __future__ import annotations

import errno
import importlib
import signal
from typing import TYPE_CHECKING, Final

from hostimage_dbus.errors import EXIT_FAILURE
from hostimagectl import catalog
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.output import Console, discard_streams, prepare_streams
from hostimagectl.parser import parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

#: Exit code when nobody reads the result any more, as a shell shows a program that SIGPIPE ended.
EXIT_BROKEN_PIPE: Final = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the program's own) and give its exit code."""
    prepare_streams()
    console = Console()
    try:
        arguments = parser().parse_args(argv)
        console = Console(as_json=arguments.json, quiet=arguments.quiet)
        code = _run(arguments, console)
        console.finish()
    except BrokenPipeError:
        discard_streams()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        reason = error.strerror or errno.errorcode.get(error.errno or 0, "input/output error")
        console.error(f"cannot write the result: {reason}")
        discard_streams()
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 - a fault of ours is told in a line, never as a traceback
        console.error(f"internal error: {type(error).__name__}: {error}", "please report this")
        return EXIT_FAILURE
    return code


def _run(arguments: argparse.Namespace, console: Console) -> int:
    import asyncio
    import logging

    # What libraries log is for developers; without a handler it would go to standard error.
    logging.getLogger().addHandler(logging.NullHandler())
    command = importlib.import_module(f"hostimagectl.commands.{catalog.find(arguments.command).module}")
    try:
        code: int = asyncio.run(command.run(arguments, console))
    except Failure as failure:
        if console.as_json:
            console.json({"error": failure.as_dict()})
        console.error(failure.message, failure.hint)
        return failure.code
    except Interrupted as interrupted:
        return interrupted.code
    return code
