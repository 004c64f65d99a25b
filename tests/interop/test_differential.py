"""Random trees and layers, to us and to cfsctl: a hundredth of what ``make soak`` does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT, run

PROGRAM = REPOSITORY_ROOT / "tests/fuzz/differential.py"
SUPPORT = REPOSITORY_ROOT / "tests/support"

pytestmark = pytest.mark.interop


@pytest.mark.usefixtures("cfsctl")
@pytest.mark.parametrize("kind", ["dumps", "directories", "layers"])
def test_no_difference(kind: str, tmp_path: Path) -> None:
    search = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": search}
    done = run(sys.executable, PROGRAM, kind, "--seconds", "6", env=environment, check=False)
    print(done.out)
    assert done.code == 0, done.out + done.err
    assert done.out.startswith(f"{kind}: from seed 0, ")
