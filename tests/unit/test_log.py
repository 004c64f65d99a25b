"""Log lines as the journal reads them."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from hostimage_testing.processes import python_environment
from hostimaged import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_lines_for_people() -> None:
    out = io.StringIO()
    log.configure("info", stream=out)
    logger = structlog.get_logger("x")
    logger.info("job.start", id=3, target="a b")
    logger.debug("job.tick")
    logging.getLogger("other").warning("hello %s", "there")
    assert out.getvalue().splitlines() == ['info: job.start id=3 target="a b"', "warning: hello there"]


def test_lines_for_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.configure("debug", stream=stream)
        logger = structlog.get_logger("x")
        logger.debug("a.b")
        logger.error("c.d", why="line\nbreak <3>")
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.exception("e.f")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[:3] == ["<7>a.b", '<3>c.d why="line break <3>"', "<3>e.f"]
    assert all(line.startswith("<3>") for line in lines[3:])
    assert lines[3] == "<3>Traceback (most recent call last):"
    assert lines[-1] == "<3>second"


@pytest.mark.parametrize(
    ("level", "shown"), [("error", 1), ("warning", 2), ("notice", 2), ("info", 3), ("debug", 4)]
)
def test_levels(level: str, shown: int) -> None:
    out = io.StringIO()
    log.configure(level, stream=out)
    logger = structlog.get_logger("x")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("event.happen")
    assert len(out.getvalue().splitlines()) == shown


def test_what_only_terminals_need_is_not_imported() -> None:
    """structlog takes rich along where it is installed; whoever wants it later still gets it."""
    program = "import sys, hostimaged.log\nassert 'rich' not in sys.modules\nimport rich"
    subprocess.run([sys.executable, "-c", program], env=python_environment(), check=True)
