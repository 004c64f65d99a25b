"""External programs that tests compare with: found, or skipped with a reason; in CI missing is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

IN_CI = os.environ.get("CI") == "true"
REPOSITORY_ROOT = Path(__file__).parents[3]
# Where `make test` lets cargo put cfsctl, and where a user's own cargo puts it.
_EXTRA_PATH = (
    REPOSITORY_ROOT / ".cache/tools/bin",
    Path.home() / ".cargo/bin",
    Path("/usr/sbin"),
    Path("/sbin"),
)


def find(program: str) -> str | None:
    """Path of ``program``, or None."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _EXTRA_PATH)])
    return shutil.which(program, path=path)


def require(program: str) -> str:
    """Path of ``program``; skips the test where it is missing, or fails it in CI."""
    found = find(program)
    if found is None:
        absent(f"{program} is not installed")
    return found


def absent(reason: str) -> None:
    """A peer is missing: an error in CI, a skip elsewhere."""
    if IN_CI:
        pytest.fail(f"{reason}, and CI must have it", pytrace=False)
    pytest.skip(reason)


@dataclass(frozen=True)
class Finished:
    """Output of a program that ended."""

    code: int
    out: str
    err: str


def run(*argv: str | Path, check: bool = True, timeout: float = 300, **kwargs: object) -> Finished:
    """Run a program to its end; with ``check`` a non-zero exit fails the test, showing its output."""
    done = subprocess.run(
        [str(a) for a in argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        **kwargs,  # type: ignore[call-overload]
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, argv))} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return Finished(done.returncode, done.stdout, done.stderr)
