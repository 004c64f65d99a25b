"""What goes to standard output and standard error: text, tables, JSON and errors.

Results go to standard output and everything else to standard error, so that a script reads the first and a
person both. Text that came over the bus passes ``printable`` before it reaches a stream; JSON is pure ASCII.
Not in here: the display of a running job (``hostimagectl.progress``).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from datetime import datetime
from typing import TYPE_CHECKING, Final, TextIO

from hostimage_dbus.errors import ErrorName

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROGRAM: Final = "hostimagectl"
ABSENT: Final = "-"
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

#: Longest text taken over the bus that is shown: an error or a job message is one line for a person.
TEXT_LIMIT: Final = 2000

#: What a person can do about an error, where the message alone does not say it.
HINTS: Final[dict[str, str]] = {
    ErrorName.ACCESS_DENIED: "changing the host is for root, or for who polkit allows it",
    ErrorName.AUTHORIZATION_REQUIRED: "run it from a session with a polkit agent, or as root",
    ErrorName.BUSY: f"see '{PROGRAM} jobs'; without --no-queue it waits for its turn",
    ErrorName.INVALID_REFERENCE: "an image is written transport:name, such as docker://registry.example/os:latest",
    ErrorName.REGISTRY_AUTH: "credentials are those of the host, in /etc/ostree/auth.json",
    ErrorName.SIGNATURE_REJECTED: "/etc/containers/policy.json decides which images are accepted",
    ErrorName.DIGEST_MISMATCH: "nothing was stored under its name; try again, or tell its publisher",
    ErrorName.HELD: f"see '{PROGRAM} status'; '{PROGRAM} release' ends a hold of '{PROGRAM} hold'",
    ErrorName.NOT_SUPPORTED: "this version of hostimaged cannot do that yet",
    ErrorName.LOCK_TIMEOUT: "another program uses the repository; try again when it has finished",
    ErrorName.INTERNAL: "see 'journalctl -u hostimaged'",
}


def printable(value: object, limit: int = TEXT_LIMIT) -> str:
    """``value`` as one line of at most ``limit`` characters that no terminal takes as a command.

    Control and format characters (bidirectional overrides among them), line separators, surrogates and
    unassigned code points are written as escapes.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def text_of(value: object) -> str:
    """``value`` if it is text, else ""; for what came over the bus and should be text."""
    return value if isinstance(value, str) else ""


def number_of(value: object) -> int:
    """``value`` if it is a number that counts something, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def size(count: int) -> str:
    """``count`` bytes for people, in IEC units: ``512 B``, ``1.5 KiB``, ``23.4 GiB``."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    index = -1
    # Not 1024: 1023.96 would be printed as 1024.0.
    while value >= 1023.95 and index < len(_UNITS) - 1:
        value /= 1024
        index += 1
    return f"{value:.1f} {_UNITS[index]}"


def duration(seconds: float) -> str:
    """A span of time for people: ``0:07``, ``12:30``, ``3:05:09``."""
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def timestamp(microseconds: int) -> str:
    """Microseconds since the epoch as local time in ISO form with its offset; ``-`` for 0 or nonsense."""
    if microseconds <= 0:
        return ABSENT
    try:
        moment = datetime.fromtimestamp(microseconds / 1_000_000).astimezone()
    except (OverflowError, OSError, ValueError):
        return ABSENT
    return moment.isoformat(sep=" ", timespec="seconds")


def width(text: str) -> int:
    """Columns that ``text`` takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at ``stream``."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


class Console:
    """The two streams of one run and how the user wants them.

    ``as_json`` puts one JSON document on standard output; ``quiet`` leaves out progress, notes and headings
    and cuts results down to what a shell script wants. Raises ``OSError`` when standard output is gone.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        # Either is None when the program was started with the descriptor closed.
        self.stdout: TextIO | None = stdout if stdout is not None else sys.stdout
        self.stderr: TextIO | None = stderr if stderr is not None else sys.stderr

    def line(self, text: str = "") -> None:
        """One line of the result, trusted or already ``printable``."""
        if self.stdout is not None:
            self.stdout.write(text + "\n")

    def json(self, document: object) -> None:
        """The result as JSON: indented, ASCII, keys in the order given."""
        self.line(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False))

    def note(self, text: str) -> None:
        """A line beside the result; nothing when quiet."""
        if not self.quiet:
            self.err(text)

    def err(self, text: str) -> None:
        """A line on standard error."""
        self.raw_err(text + "\n")

    def raw_err(self, text: str) -> None:
        """``text`` on standard error at once.

        When nobody reads it any more it is dropped: the work goes on, and its result still matters.
        """
        if self.stderr is None:
            return
        try:
            self.stderr.write(text)
            self.stderr.flush()
        except (OSError, ValueError):
            self.stderr = None

    def error(self, message: str, hint: str = "") -> None:
        """``hostimagectl: message`` and, if there is one, the hint below it."""
        self.err(f"{PROGRAM}: {printable(message)}")
        if hint:
            self.err(f"hint: {hint}")

    def fields(self, rows: Iterable[tuple[str, str]], indent: str = "") -> None:
        """``label: value`` lines, the values in one column."""
        pairs = [(printable(label), printable(value)) for label, value in rows]
        column = max((len(label) for label, _ in pairs), default=0) + 2
        for label, value in pairs:
            self.line(f"{indent}{label + ':':<{column}}{value}")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: drawn by rich on a terminal that has it, plain columns anywhere else."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if is_terminal(self.stdout) and self._rich_table(headings, cells):
            return
        widths = [max(width(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
        for row in [[heading.upper() for heading in headings], *cells]:
            padded = (cell + " " * (widths[i] - width(cell)) for i, cell in enumerate(row))
            self.line("  ".join(padded).rstrip())

    def _rich_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """Draw with rich; False if it is not installed."""
        try:
            from rich import box
            from rich.console import Console as RichConsole
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            return False
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in headings:
            # Folded, not cut off: a reference is of no use without its end.
            table.add_column(heading, overflow="fold")
        for row in rows:
            # Text, not str: a value from outside is never read as markup.
            table.add_row(*(Text(cell) for cell in row))
        console = RichConsole(file=self.stdout, highlight=False, width=shutil.get_terminal_size().columns)
        console.print(table)
        return True

    def finish(self) -> None:
        """Flush; raises ``OSError`` if the result could not be written."""
        if self.stdout is not None:
            self.stdout.flush()


def prepare_streams() -> None:
    """Make both streams accept any text: what the locale cannot show is escaped instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def discard_streams() -> None:
    """Point both streams at /dev/null after a broken pipe, so that the exit of Python stays silent."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (sys.stdout, sys.stderr):
            try:
                os.dup2(null, stream.fileno())
            except (AttributeError, OSError, ValueError):
                continue
    finally:
        os.close(null)
