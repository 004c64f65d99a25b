"""The progress bar drawn by rich; importing this fails where rich is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from hostimagectl.output import printable
from hostimagectl.progress import REDRAW_INTERVAL, figures, percent, title

if TYPE_CHECKING:
    from hostimagectl.job import Job
    from hostimagectl.output import Console

_MESSAGE_LIMIT: Final = 200


class _Terminal:
    """Standard error as rich wants it, without the error that ends the program when the terminal is gone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.encoding = getattr(console.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._console.raw_err(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return True


class RichBar:
    """A bar with phase, percent, bytes, rate and time left; messages scroll away above it."""

    interval: float | None = REDRAW_INTERVAL

    def __init__(self, console: Console) -> None:
        self._message = ""
        self._progress = Progress(
            # markup off: a phase comes over the bus.
            TextColumn("{task.fields[title]:<10}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[percent]:>4}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            console=RichConsole(file=cast("TextIO", _Terminal(console)), highlight=False),
            # Drawn by update: a thread would draw over our notes, and outlive an error.
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, title="", percent="", figures="")

    def update(self, job: Job) -> None:
        """Draw the bar; a message of the job is printed above it once."""
        message = printable(job.message, _MESSAGE_LIMIT)
        if message and message != self._message:
            self._message = message
            self.note(message)
        # Not before there is something to draw; starting again does nothing.
        self._progress.start()
        self._progress.update(
            self._task,
            total=None if job.progress is None else 1.0,
            completed=job.progress or 0.0,
            title=title(job),
            percent=percent(job),
            figures=figures(job),
            refresh=True,
        )

    def note(self, text: str) -> None:
        """Say it above the bar."""
        self._progress.console.print(Text(printable(text)))

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()
