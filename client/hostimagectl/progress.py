"""The display of a running job: a bar on a terminal, plain lines anywhere else, or nothing.

Everything here goes to standard error. A display gets every moment of a job by ``update`` and decides what is
worth showing; it never fails a command.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Final, Protocol

from hostimage_dbus.names import JobState
from hostimagectl.output import duration, is_terminal, printable, size, width

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimagectl.job import Job
    from hostimagectl.output import Console

#: Seconds between two lines about the same phase where there is no terminal: logs stay readable.
LINE_INTERVAL: Final = 5.0
#: Seconds after which a terminal is drawn again even if nothing was told, and at least between two drawings.
REDRAW_INTERVAL: Final = 1.0
_DRAW_GAP: Final = 0.05
_BAR_COLUMNS: Final = 24
_MESSAGE_LIMIT: Final = 200
_MICRO: Final = 1_000_000


class Display(Protocol):
    """Shows a job. ``interval`` is the time in seconds after which it wants an ``update`` without news."""

    interval: float | None

    def update(self, job: Job) -> None:
        """The job is like this now."""

    def note(self, text: str) -> None:
        """Something beside the job's own progress, said at once."""

    def close(self) -> None:
        """Leave the terminal as it was; called once, at the end."""


def create(console: Console) -> Display:
    """The display that suits the streams of ``console``."""
    if console.quiet or console.stderr is None:
        return Notes(console)
    if is_terminal(console.stderr) and os.environ.get("TERM", "dumb") != "dumb":
        try:
            from hostimagectl.richbar import RichBar
        except ImportError:
            return Bar(console)
        return RichBar(console)
    return Lines(console)


def title(job: Job) -> str:
    """What the job is doing, in a word or two."""
    if job.state == JobState.HELD and job.hold_reasons:
        return printable(f"held: {', '.join(job.hold_reasons)}", _MESSAGE_LIMIT)
    if job.state in (JobState.QUEUED, JobState.HELD, JobState.CANCELLING):
        return printable(job.state)
    return printable(job.phase or job.state or "waiting", _MESSAGE_LIMIT)


def figures(job: Job) -> str:
    """Bytes, rate and time left, as far as they are known."""
    parts = []
    missing = max(0, job.bytes_total - job.bytes_cached, job.bytes_done)
    if missing:
        parts.append(f"{size(job.bytes_done)} of {size(missing)}")
    if job.bytes_cached:
        parts.append(f"{size(job.bytes_cached)} already there")
    if job.rate and missing:
        parts.append(f"{size(job.rate)}/s")
    if job.eta >= _MICRO and job.state == JobState.RUNNING:
        parts.append(f"{duration(job.eta / _MICRO)} left")
    return ", ".join(parts)


def percent(job: Job) -> str:
    """The progress as ``42%``, empty while unknown."""
    return "" if job.progress is None else f"{int(job.progress * 100)}%"


class Notes:
    """Shows no progress; notes only if the user did not ask for quiet."""

    interval: float | None = None

    def __init__(self, console: Console) -> None:
        self._console = console

    def update(self, job: Job) -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        """Say it unless quiet."""
        self._console.note(printable(text))

    def close(self) -> None:
        """Nothing to leave."""


class Lines:
    """One line per change, for logs and pipes.

    A new state or phase is told at once; bytes and messages at most every ``LINE_INTERVAL`` seconds.
    """

    interval: float | None = None

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._title = ""
        self._message = ""
        self._told = ""
        self._due = 0.0

    def update(self, job: Job) -> None:
        """Say what is new and worth a line."""
        now = self._clock()
        heading = title(job)
        message = printable(job.message, _MESSAGE_LIMIT)
        if heading == self._title and now < self._due:
            return
        news = [figures(job), percent(job)]
        if message != self._message:
            news.append(message)
        text = ": ".join(part for part in (heading, ", ".join(part for part in news if part)) if part)
        if text == self._told:
            return
        self._console.err(text)
        self._title, self._message, self._told = heading, message, text
        self._due = now + LINE_INTERVAL

    def note(self, text: str) -> None:
        """Say it at once."""
        self._console.err(printable(text))

    def close(self) -> None:
        """Nothing to leave."""


class Bar:
    """A bar drawn over itself, for a terminal without rich."""

    interval: float | None = REDRAW_INTERVAL

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._title = ""
        self._message = ""
        self._drawn = False
        self._next = 0.0

    def update(self, job: Job) -> None:
        """Draw the bar; a message of the job scrolls away above it."""
        message = printable(job.message, _MESSAGE_LIMIT)
        if message and message != self._message:
            self._message = message
            self.note(message)
        now = self._clock()
        heading = title(job)
        if heading == self._title and now < self._next:
            return
        self._title = heading
        self._next = now + _DRAW_GAP
        # One column stays free: a terminal wraps when the last one is written.
        columns = shutil.get_terminal_size().columns - 1
        self._console.raw_err("\r" + fit(bar_line(job), columns) + "\x1b[K")
        self._drawn = True

    def note(self, text: str) -> None:
        """Say it above the bar."""
        self._erase()
        self._console.err(printable(text))

    def close(self) -> None:
        """Take the bar away."""
        self._erase()

    def _erase(self) -> None:
        if self._drawn:
            self._console.raw_err("\r\x1b[K")
            self._drawn = False
            self._next = 0.0


def bar_line(job: Job) -> str:
    """The bar as one line: what, bar, percent, figures."""
    full = int((job.progress or 0.0) * _BAR_COLUMNS)
    bar = "#" * full + "." * (_BAR_COLUMNS - full)
    return f"{title(job):<10} [{bar}] {percent(job):>4}  {figures(job)}".rstrip()


def fit(text: str, columns: int) -> str:
    """As much of ``text`` as fits into ``columns``."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for character in text:
        used += width(character)
        if used > columns:
            break
        kept.append(character)
    return "".join(kept)
