"""Command line of ``hostimagectl``: the parser, the choice of a command, and how a run ends.

Nothing but the standard library and the error table is imported before a command is chosen.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import EXIT_FAILURE
from hostimagectl import __version__
from hostimagectl.failure import Failure, Interrupted
from hostimagectl.output import PROGRAM, Console, discard_streams, prepare_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Exit code when nobody reads the result any more, as a shell shows a program that SIGPIPE ended.
EXIT_BROKEN_PIPE: Final = 128 + signal.SIGPIPE
_HIGHEST_ID: Final = 2**64 - 1

_PULL_HELP: Final = """\
Have the daemon fetch IMAGE (transport:name) into the repository, and watch it. Nothing is deployed.
A relative path in oci:, oci-archive:, docker-archive: and dir: is taken from the current directory.

Ctrl-C asks the daemon to cancel and waits for the end; a second one leaves at once, and the job goes on.
"""
_PULL_EPILOG: Final = """\
JSON: {"job": JOB, "result": RESULT or null, "error": null or {"name", "message"}}. RESULT has the keys of
the D-Bus method Pull: manifest-digest, source-digest, config-digest, tag, version, image-ids, changed, and
counts. JOB is as in 'jobs'.

With --quiet the manifest digest alone is printed.
"""
_IMAGES_EPILOG: Final = """\
JSON: {"images": [{"tag", "manifest-digest", "config-digest", "reference", "source-digest", "pulled" (seconds
since the epoch), "version", "size" (bytes as transferred), "image-ids", "artifact", "deployed",
"problem"}]}, null where unknown.

With --quiet the manifest digests alone are printed, one a line.
"""
_STATUS_EPILOG: Final = """\
JSON: the native status document of the daemon, described by the schema it ships.

With --quiet the state of the daemon alone is printed: idle, pulling, …
"""
_JOBS_EPILOG: Final = """\
JSON: {"jobs": [JOB]}, JOB = {"id", "path", "kind", "target", "state", "phase", "progress" (0 to 1 or null),
"bytesDone", "bytesTotal", "bytesCached", "rate" (bytes per second), "eta" (microseconds), "message",
"cancellable", "created", "started", "finished" (microseconds since the epoch or 0)}.

With --quiet the ids alone are printed, one a line.
"""
_CANCEL_EPILOG: Final = """\
JSON: {"job": JOB or null with --no-wait, "error": null or {"name", "message"}}; JOB is as in 'jobs'.
"""
_EPILOG: Final = """\
With --json every command prints one JSON document on standard output; one that fails before there is a
result prints {"error": {"name", "message"}}. Progress, notes and messages go to standard error.

Exit code: 0 success, 1 failure, 2 wrong usage, 3 hostimaged or the bus cannot be reached, 128 and the
number of the signal if interrupted, others one per error.
"""


class _Paragraphs(argparse.HelpFormatter):
    """Fills each paragraph on its own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(super(_Paragraphs, self)._fill_text(part, width, indent) for part in paragraphs)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    root = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Control hostimaged, the daemon that manages this host's OS images.",
        epilog=_EPILOG,
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _output_options(root, default=False)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    pull = _command(commands, "pull", "pull an image into the repository", _PULL_EPILOG, _PULL_HELP)
    pull.add_argument("image", metavar="IMAGE", nargs="?", default="", help="default: the tracked image")
    pull.add_argument(
        "--expect-digest", metavar="DIGEST", help="fail unless the source's manifest has this sha256:… digest"
    )
    pull.add_argument(
        "--no-queue", action="store_true", help="fail instead of waiting while another job runs"
    )
    _command(commands, "images", "list the images in the repository", _IMAGES_EPILOG)
    _command(commands, "status", "show images, jobs, problems and last results", _STATUS_EPILOG)
    _command(commands, "jobs", "list jobs that wait or run", _JOBS_EPILOG)
    cancel = _command(commands, "cancel", "cancel a job and wait for its end", _CANCEL_EPILOG)
    cancel.add_argument("id", metavar="ID", type=_job_id, help="number of the job")
    cancel.add_argument("--no-wait", action="store_true", help="do not wait for the end of the job")
    return root


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
    command = importlib.import_module(f"hostimagectl.commands.{arguments.command}")
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


def _command(
    commands: Any, name: str, summary: str, epilog: str, description: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or summary.capitalize() + ".",
        epilog=epilog,
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )
    # Suppressed, or the command's default would undo the option given before the command.
    _output_options(command, default=argparse.SUPPRESS)
    return command


def _output_options(target: argparse.ArgumentParser, *, default: Any) -> None:
    target.add_argument("--json", action="store_true", default=default, help="print the result as JSON")
    target.add_argument(
        "-q", "--quiet", action="store_true", default=default, help="no progress or notes, a bare result"
    )


def _job_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:20]) <= _HIGHEST_ID or len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a job")
    return int(text)
