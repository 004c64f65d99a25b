"""Every input that fuzzing found worth keeping, once through its parser, within bounds of time and memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hostimage_testing.tools import run

FUZZ = Path(__file__).parents[1] / "fuzz"
CORPUS = FUZZ / "corpus"
TARGETS = sorted(path.name for path in CORPUS.iterdir())
#: Of all inputs of one target, in a clone.
SIZE_LIMIT = 128 << 10


@pytest.mark.parametrize("target", TARGETS)
def test_replay(target: str, tmp_path: Path) -> None:
    """``run.py`` bounds each input; what it prints shows that there were some."""
    done = run(sys.executable, FUZZ / "run.py", "replay", target, env=os.environ | {"TMPDIR": str(tmp_path)})
    inputs = len(list((CORPUS / target).iterdir()))
    assert done.out.startswith(f"{target}: {inputs} inputs, ")
    assert inputs


def test_each_target_has_a_corpus() -> None:
    assert run(sys.executable, FUZZ / "run.py", "list").out.split() == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_corpus_is_small(target: str) -> None:
    assert sum(path.stat().st_size for path in (CORPUS / target).iterdir()) <= SIZE_LIMIT
