"""Garbage collection: the same repositories collected by us and by cfsctl."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hostimage_testing import random_repositories
from hostimage_testing.random_repositories import content
from hostimage_testing.tools import run
from hostimaged.composefs import __main__ as tool
from hostimaged.composefs.fsverity import Algorithm

pytestmark = pytest.mark.interop


def ours(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    capsys.readouterr()
    assert tool.main(["gc", str(path), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("seed", range(60))
def test_random_repositories(
    cfsctl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    algorithm = list(Algorithm)[seed % 2]
    made = random_repositories.make(tmp_path / "ours", seed, algorithm)
    theirs = shutil.copytree(made.path, tmp_path / "theirs", symlinks=True)
    roots = [*list(made.streams)[:: 5 + seed % 3], *list(made.images)[:: 3 + seed % 2], "missing"]
    options = [f"--root={root}" for root in roots[seed % 4 :]]

    before = content(made.path)
    predicted = ours(capsys, made.path, "--dry-run", *options)
    assert content(made.path) == before, "a dry run changes nothing"
    removed = ours(capsys, made.path, *options)
    assert predicted == "Dry run (no files deleted):\n" + removed
    assert removed == run(cfsctl, "--repo", theirs, "gc", *options).out
    assert content(made.path) == content(theirs)

    nothing = "Objects: 0 removed (0 bytes)\n"
    assert run(cfsctl, "--repo", made.path, "gc", *options).out == nothing
    assert ours(capsys, theirs, *options) == nothing


def test_dangling_references_do_not_stop_either_afterwards(
    cfsctl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = random_repositories.make(tmp_path / "repository", 3)
    (made.path / "streams/refs/oci").mkdir(parents=True, exist_ok=True)
    os.symlink("../../oci-manifest-gone", made.path / "streams/refs/oci/dangling")
    os.symlink(f"../../{'0' * 64}", made.path / "images/refs/dangling")
    assert run(cfsctl, "--repo", made.path, "gc", check=False).code != 0, "why we prune them"
    assert tool.main(["gc", str(made.path)]) == 0
    told = capsys.readouterr()
    assert "streams/refs/oci/dangling leads nowhere" in told.err
    assert not (made.path / "streams/refs/oci/dangling").is_symlink()
    assert not (made.path / "images/refs/dangling").is_symlink()
    assert run(cfsctl, "--repo", made.path, "gc").out == "Objects: 0 removed (0 bytes)\n"
