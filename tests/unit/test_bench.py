"""The benchmarks leave alone what is not theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hostimage_testing import tars
from hostimage_testing.layout import Layout
from hostimage_testing.tools import REPOSITORY_ROOT


def stages(root: Path, layout: Layout) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY_ROOT / "tests/bench/stages.py", root, f"oci:{layout.path}:v1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_stages_make_their_directory_and_remove_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(tars.directory(b"usr") + tars.file(b"usr/a", b"a" * 999) + tars.END)])
    done = stages(tmp_path / "new", layout)
    assert done.returncode == 0, done.stderr
    assert "EROFS image" in done.stdout
    assert not (tmp_path / "new").exists()
    there = tmp_path / "there"
    (there / "etc").mkdir(parents=True)
    (there / "etc/hostimaged.toml").write_text("mine")
    done = stages(there, layout)
    assert done.returncode != 0
    assert done.stderr == f"cannot make {there}: File exists\n"
    assert [str(path.relative_to(there)) for path in sorted(there.rglob("*"))] == [
        "etc",
        "etc/hostimaged.toml",
    ]
    assert (there / "etc/hostimaged.toml").read_text() == "mine"
