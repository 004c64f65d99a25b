"""The argparse parser, made from the table of commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from hostimagectl import __version__
from hostimagectl.catalog import COMMANDS, GROUPS, JOB_OPTIONS, WAITING
from hostimagectl.command import Argument, JobCommand
from hostimagectl.output import PROGRAM
from hostimagectl.texts import EPILOG, JOB_DESCRIPTION

if TYPE_CHECKING:
    from hostimagectl.command import Command

_WAIT: Final = (
    Argument(
        ("--wait",),
        {
            "action": "store_true",
            "default": True,
            "help": "show the progress of the job and wait for its end (default)",
        },
    ),
    Argument(
        ("--no-wait",),
        {"action": "store_false", "dest": "wait", "help": "do not wait for the end of the job"},
    ),
)
#: Columns of a command's name in the list of commands.
_NAME_COLUMNS: Final = 16


class _Paragraphs(argparse.HelpFormatter):
    """Fills each paragraph on its own, save one that is indented: a table."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith("  ") else super(_Paragraphs, self)._fill_text(part, width, indent)
            for part in text.rstrip().split("\n\n")
        )


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    root = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Control hostimaged, the daemon that manages this host's OS images.",
        epilog=f"{_list_of_commands()}\n\n{EPILOG}",
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _common_options(root, default=False)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True, help="see below")
    for command in COMMANDS:
        _add(commands, command)
    return root


def _add(commands: Any, command: Command) -> None:
    description = command.description or command.summary.capitalize() + "."
    if isinstance(command, JobCommand):
        description = f"{description.rstrip()}\n\n{JOB_DESCRIPTION}"
    # Without help: the list of commands is ours, by subject.
    target: argparse.ArgumentParser = commands.add_parser(
        command.name,
        description=description,
        epilog=command.epilog + _quiet(command),
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )
    arguments = list(command.arguments)
    if isinstance(command, JobCommand):
        arguments += [option.argument for option in (*command.options, *JOB_OPTIONS)]
    if command.name in WAITING:
        arguments += _WAIT
    for argument in arguments:
        target.add_argument(*argument.names, **argument.settings)
    # Suppressed, or the command's default would undo the option given before the command.
    _common_options(target, default=argparse.SUPPRESS)


def _quiet(command: Command) -> str:
    if not isinstance(command, JobCommand):
        return ""
    shown = f"{command.quiet} alone" if command.quiet else "nothing"
    return f"\nWith --quiet {shown} is printed; with --no-wait the number of the job."


def _common_options(target: argparse.ArgumentParser, *, default: Any) -> None:
    target.add_argument("--json", action="store_true", default=default, help="print the result as JSON")
    target.add_argument(
        "-q", "--quiet", action="store_true", default=default, help="no progress or notes, a bare result"
    )
    target.add_argument(
        "--no-ask-password",
        action="store_true",
        default=default,
        help="fail where polkit would ask for a password",
    )


def _list_of_commands() -> str:
    lines = ["  commands:"]
    for group in GROUPS:
        lines.append(f"   {group}")
        lines += [
            f"    {command.name:<{_NAME_COLUMNS}} {command.summary}"
            for command in COMMANDS
            if command.group == group
        ]
    return "\n".join(lines)
