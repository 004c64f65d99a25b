"""Fixtures of the tests against real peers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing.debian import Debian, prepare


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Debian:
    """A Debian 13 root with a kernel as OCI images."""
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    return prepare(Path(cache) / "debian" if cache else tmp_path_factory.mktemp("debian"))
