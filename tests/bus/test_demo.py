"""The demo is a test of the whole, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT, require

DEMO = REPOSITORY_ROOT / "tests/demo/run.py"


def run_demo(temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    parts = os.pathsep.join(str(REPOSITORY_ROOT / part) for part in ("daemon", "client", "dbus"))
    return subprocess.run(
        [sys.executable, DEMO],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": parts} | environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_works_and_leaves_nothing(tmp_path: Path) -> None:
    require("dbus-daemon")
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "came up 3 times: Sample OS 1, then Sample OS 2, then Sample OS 1." in done.stdout
    assert "=== Summary" in done.stdout
    scratch = re.search(r"Created and removed: (/\S+/hostimaged-demo-\w+) ", done.stdout)
    assert scratch
    assert not Path(scratch[1]).exists()
    assert list(tmp_path.iterdir()) == []


def test_the_demo_names_what_is_missing(tmp_path: Path) -> None:
    done = run_demo(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == "The demo needs the program dbus-daemon; 'make demo' installs what it can.\n"
    assert list(tmp_path.iterdir()) == []
