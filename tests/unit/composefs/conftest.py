"""A repository of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "composefs"


@pytest.fixture
def repository(path: Path) -> Iterator[Repository]:
    made, is_new = Repository.init(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    assert is_new
    with made:
        yield made
