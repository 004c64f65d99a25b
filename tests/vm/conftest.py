"""The installed disk that guests boot; what is below ``inside`` runs in another guest only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import installed

collect_ignore = ["inside"]


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[installed.Installed]:
    """Made once, or once per content of all that goes into it (``HOSTIMAGE_TEST_CACHE``)."""
    directory = tmp_path_factory.mktemp("installed")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    yield installed.prepare(directory, Path(cache) / "vm" if cache else directory / "cache")
    shutil.rmtree(directory)
