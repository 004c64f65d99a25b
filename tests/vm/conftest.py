"""The installed disk that guests boot; what is below ``inside`` runs in another guest only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import installed
from hostimage_testing.loader_disks import Workshop

collect_ignore = ["inside"]


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[installed.Installed]:
    """Made once, or once per content of all that goes into it (``HOSTIMAGE_TEST_CACHE``)."""
    directory = tmp_path_factory.mktemp("installed")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    yield installed.prepare(directory, Path(cache) / "vm" if cache else directory / "cache")
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def workshop(disks: installed.Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Makes disks of other boot loaders, each when the first test asks for it, kept as ``disks`` are."""
    directory = tmp_path_factory.mktemp("loaders")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    yield Workshop(disks, directory, Path(cache) / "vm" if cache else directory / "cache")
    shutil.rmtree(directory)
