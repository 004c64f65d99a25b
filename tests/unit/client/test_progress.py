"""The displays of a running job."""

from __future__ import annotations

import builtins
import io
import re
import sys
from typing import Any

import pytest

from hostimagectl import progress
from hostimagectl.job import Job

PATH = "/org/hostimage1/jobs/_1"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(**values: Any) -> Job:
    return Job(id=1, path=PATH, **({"state": "running", "phase": "pulling"} | values))


def visible(text: str) -> list[str]:
    """What a terminal shows in the end, line by line."""
    text = re.sub(r"\x1b\[(\?25[lh]|[0-9;]*m)", "", text)
    return [_line(row) for row in text.split("\n")]


def _line(row: str) -> str:
    shown, position = "", 0
    for part in re.split(r"(\r|\x1b\[K|\x1b\[2K)", row):
        if part == "\r":
            position = 0
        elif part == "\x1b[K":
            shown = shown[:position]
        elif part == "\x1b[2K":
            shown = ""
        else:
            shown = shown[:position].ljust(position) + part + shown[position + len(part) :]
            position += len(part)
    return shown


def test_figures() -> None:
    full = job(bytes_total=3 << 20, bytes_cached=1 << 20, bytes_done=1 << 20, rate=1 << 19, eta=2_000_000)
    assert progress.figures(full) == "1.0 MiB of 2.0 MiB, 1.0 MiB already there, 512.0 KiB/s, 0:02 left"
    assert progress.figures(job()) == ""
    assert progress.figures(job(bytes_total=5, bytes_cached=5, eta=10)) == "5 B already there"
    # More than announced, as when a layer is read again: never "3 of 2".
    assert progress.figures(job(bytes_total=2, bytes_done=3)) == "3 B of 3 B"


def test_title() -> None:
    assert progress.title(job(phase="importing")) == "importing"
    assert progress.title(job(state="queued", phase="")) == "queued"
    assert progress.title(job(state="cancelling")) == "cancelling"
    assert progress.title(job(state="", phase="")) == "waiting"
    assert progress.title(job(phase="\x1b[31m")) == "\\x1b[31m"


def test_lines_tell_each_phase_at_once_and_bytes_seldom(make_console: Any) -> None:
    console, clock = make_console(), Clock()
    lines = progress.Lines(console, clock)
    lines.update(job(state="queued", phase=""))
    lines.update(job(phase="resolving"))
    lines.update(job(bytes_total=100))
    for done in range(100):
        clock.now += 0.2
        lines.update(job(bytes_total=100, bytes_done=done, progress=done / 100))
    lines.update(job(phase="finalizing", bytes_total=100, bytes_done=100, progress=0.95))
    told = console.errors.splitlines()
    assert told[:3] == ["queued", "resolving", "pulling: 0 B of 100 B"]
    assert told[-1] == "finalizing: 100 B of 100 B, 95%"
    # 20 seconds of progress.
    assert len(told) == 4 + 20 // progress.LINE_INTERVAL


def test_lines_say_nothing_twice(make_console: Any) -> None:
    console, clock = make_console(), Clock()
    lines = progress.Lines(console, clock)
    for _ in range(5):
        lines.update(job(state="queued", phase=""))
        clock.now += 60
    assert console.errors == "queued\n"


def test_lines_tell_messages_and_notes(make_console: Any) -> None:
    console, clock = make_console(), Clock()
    lines = progress.Lines(console, clock)
    lines.update(job(message="layer 1\x1b[2J"))
    lines.note("cancelling")
    lines.close()
    assert console.errors == "pulling: layer 1\\x1b[2J\ncancelling\n"
    assert console.out == ""


def test_bar_draws_over_itself_and_leaves_nothing(make_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    console, clock = make_console(terminal=True), Clock()
    bar = progress.Bar(console, clock)
    bar.update(job(progress=0.5, bytes_total=200, bytes_done=100, rate=10, eta=10_000_000))
    shown = visible(console.errors)
    assert shown == ["pulling    [############............]  50%  100 B of 200 B, 10 B/s, 0:10 left"]
    clock.now += 1
    bar.update(job(phase="finalizing", progress=1.0))
    assert len(visible(console.errors)) == 1
    bar.note("cancelling job 1")
    bar.update(job(progress=1.0, message="half\nway"))
    bar.close()
    assert visible(console.errors) == ["cancelling job 1", "half\\nway", ""]


def test_bar_fits_a_narrow_terminal(make_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    console = make_console(terminal=True)
    progress.Bar(console).update(job(progress=0.5, bytes_total=200))
    assert max(map(len, visible(console.errors))) < 30


def test_bar_is_drawn_at_a_bounded_rate(make_console: Any) -> None:
    console, clock = make_console(terminal=True), Clock()
    bar = progress.Bar(console, clock)
    for done in range(1000):
        clock.now += 0.001
        bar.update(job(bytes_total=1000, bytes_done=done))
    assert console.errors.count("\r") <= 22


def test_fit_counts_columns() -> None:
    assert progress.fit("日本語", 5) == "日本"
    assert progress.fit("abc", 5) == "abc"


@pytest.mark.parametrize("name", ["Bar", "RichBar"])
def test_unknown_progress_is_no_error(make_console: Any, name: str) -> None:
    console = make_console(terminal=True)
    display = _rich_bar(console) if name == "RichBar" else progress.Bar(console)
    display.update(job(progress=None))
    display.update(job(progress=1.0))
    display.close()


def _rich_bar(console: Any) -> progress.Display:
    pytest.importorskip("rich")
    from hostimagectl.richbar import RichBar

    return RichBar(console)


def test_rich_bar_shows_all_and_takes_nothing_for_markup(
    make_console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    console = make_console(terminal=True)
    bar = _rich_bar(console)
    bar.update(job(phase="[bold]x", progress=0.42, bytes_total=200, bytes_done=84, rate=10, eta=5_000_000))
    shown = "\n".join(visible(console.errors))
    for part in ("[bold]x", "42%", "84 B of 200 B", "10 B/s", "0:05 left"):
        assert part in shown
    bar.note("[red]note\x1b[2J")
    bar.close()
    assert "[red]note\\x1b[2J" in console.errors
    # The cursor was hidden and is back.
    assert console.errors.rfind("\x1b[?25h") > console.errors.rfind("\x1b[?25l")


def test_rich_bar_survives_its_terminal(make_console: Any) -> None:
    console = make_console(terminal=True)
    bar = _rich_bar(console)

    def gone(text: str) -> int:
        raise OSError(5, "Input/output error")

    console.stderr.write = gone
    bar.update(job(progress=0.5))
    bar.note("x")
    bar.close()


def test_the_display_suits_the_streams(make_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress.create(make_console()), progress.Lines)
    assert isinstance(progress.create(make_console(quiet=True, terminal=True)), progress.Notes)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.create(make_console(terminal=True)), progress.Lines)


def test_a_terminal_without_rich_gets_a_bar(make_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delitem(sys.modules, "hostimagectl.richbar", raising=False)
    real = builtins.__import__

    def without_rich(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert isinstance(progress.create(make_console(terminal=True)), progress.Bar)


def test_notes_are_quiet_when_asked(make_console: Any) -> None:
    console = make_console(quiet=True)
    notes = progress.create(console)
    notes.update(job())
    notes.note("x")
    notes.close()
    assert console.errors == ""


def test_nothing_is_shown_where_standard_error_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hostimagectl.output import Console

    monkeypatch.setattr(sys, "stderr", None)
    display = progress.create(Console(stdout=io.StringIO()))
    display.update(job())
    display.note("x")
    display.close()
