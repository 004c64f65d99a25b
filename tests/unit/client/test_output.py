"""Text for people and scripts."""

from __future__ import annotations

import builtins
import io
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimage_dbus.errors import EXIT_CODES, EXIT_FAILURE, EXIT_NO_SERVICE, ErrorName
from hostimagectl.failure import Failure
from hostimagectl.output import (
    HINTS,
    Console,
    duration,
    number_of,
    printable,
    size,
    text_of,
    timestamp,
    width,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**2, "1.0 MiB"),
        (23 * 1024**3 + 400 * 1024**2, "23.4 GiB"),
        (2**64 - 1, "16.0 EiB"),
        (2**80, "1048576.0 EiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.9, "0:07"), (750, "12:30"), (11109, "3:05:09"), (-3, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_timestamp_is_local_iso_with_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert timestamp(1_700_000_000_000_000) == "2023-11-15 03:43:20+05:30"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("value", [0, -1, 2**64 - 1])
def test_timestamp_of_nonsense(value: int) -> None:
    assert timestamp(value) == "-"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain tëxt 日本", "plain tëxt 日本"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x9b31m", "\\x9b31m"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(max_size=300))
def test_printable_is_always_one_harmless_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()


def test_printable_is_bounded() -> None:
    assert len(printable("x" * 10_000_000, 50)) == 50


def test_width() -> None:
    assert [width(text) for text in ("abc", "日本", "e\u0301")] == [3, 4, 1]


def test_what_should_be_text_or_a_number() -> None:
    assert [text_of(value) for value in ("a", 1, None, ["a"])] == ["a", "", "", ""]
    assert [number_of(value) for value in (7, "7", None, True, -1, 1.5)] == [7, 0, 0, 0, 0, 0]


def console(**options: Any) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(stdout=out, stderr=err, **options), out, err


def test_json_is_ascii() -> None:
    shown, out, _ = console()
    shown.json({"a": "\x1b日", "b": None})
    assert out.getvalue().isascii()
    assert "\x1b" not in out.getvalue()
    assert json.loads(out.getvalue()) == {"a": "\x1b日", "b": None}


def test_error_has_the_program_and_the_hint() -> None:
    shown, out, err = console(quiet=True)
    shown.error("no \x07 space", "free some")
    assert err.getvalue() == "hostimagectl: no \\x07 space\nhint: free some\n"
    assert out.getvalue() == ""


def test_quiet_drops_notes() -> None:
    shown, _, err = console(quiet=True)
    shown.note("something")
    assert err.getvalue() == ""


def test_table_has_columns_and_no_trailing_blanks() -> None:
    shown, out, _ = console()
    shown.table(("name", "size"), [("日本", "1 B"), ("a\x1bb", "")])
    assert out.getvalue() == "NAME    SIZE\n日本    1 B\na\\x1bb\n"


def test_fields_are_aligned() -> None:
    shown, out, _ = console()
    shown.fields([("A", "1"), ("Longer", "2")], indent="  ")
    assert out.getvalue() == "  A:      1\n  Longer: 2\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table_on_a_terminal_escapes_markup_and_keeps_digests_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "60")
    out = _Terminal()
    digest = "sha256:" + "0123456789abcdef" * 4
    Console(stdout=out, stderr=io.StringIO()).table(("name", "digest"), [("[red]x[/red]", digest)])
    text = "".join(out.getvalue().split())
    assert "[red]x[/red]" in text
    assert digest[:20] in text
    assert "…" not in text


def test_table_works_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_rich(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    out = _Terminal()
    Console(stdout=out, stderr=io.StringIO()).table(("name",), [("x",)])
    assert out.getvalue() == "NAME\nx\n"


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    shown = Console()
    shown.line("x")
    shown.err("y")
    shown.finish()


def test_a_reader_of_notes_that_left_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    shown = Console(stdout=io.StringIO(), stderr=Gone())
    shown.err("one")
    shown.err("two")


@pytest.mark.parametrize("name", list(ErrorName))
def test_every_error_has_its_exit_code(name: ErrorName) -> None:
    failure = Failure.of_error(name, "because")
    assert failure.code == EXIT_CODES[name]
    assert failure.message == "because"
    assert failure.as_dict() == {"name": name, "message": "because"}


@pytest.mark.parametrize("name", ["ServiceUnknown", "NameHasNoOwner", "NoReply", "Spawn.ChildExited"])
def test_nobody_serving_the_api_has_one_exit_code(name: str) -> None:
    failure = Failure.of_error("org.freedesktop.DBus.Error." + name, "x")
    assert failure.code == EXIT_NO_SERVICE
    assert "does not answer" in failure.message


def test_foreign_errors_are_plain_failures() -> None:
    assert Failure.of_error("com.example.Odd", "").code == EXIT_FAILURE
    assert Failure.of_error("com.example.Odd", "").message == "com.example.Odd"
    assert "version" in Failure.of_error("org.freedesktop.DBus.Error.UnknownMethod", "no such method").hint


def test_hints_are_for_errors_that_exist() -> None:
    assert set(HINTS) <= set(ErrorName)
    assert all(hint and not hint.endswith(".") for hint in HINTS.values())
