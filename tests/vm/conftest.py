"""The installed disk that guests boot, and their registry; ``inside`` runs in another guest only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import guest_registry, installed
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_registry import GuestRegistry
from hostimage_testing.loader_disks import Workshop
from hostimage_testing.power import Mains

collect_ignore = ["inside"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Have guests tell of themselves while they still run, when the test of them failed."""
    try:
        return (yield)
    except BaseException as error:
        fixtures: dict[str, Any] = getattr(item, "funcargs", {})
        for each in fixtures.values():
            machine = each.guest if isinstance(each, Mains) else each
            if isinstance(machine, Machine):
                machine.collect(error)
        raise


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[installed.Installed]:
    """Made once, or once per content of all that goes into it (``HOSTIMAGE_TEST_CACHE``)."""
    directory = tmp_path_factory.mktemp("installed")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    yield installed.prepare(directory, Path(cache) / "vm" if cache else directory / "cache/vm")
    shutil.rmtree(directory)


@pytest.fixture
def registry(tmp_path: Path, disks: installed.Installed) -> Iterator[GuestRegistry]:
    """The registry that guests follow, empty at first."""
    with guest_registry.running(tmp_path / "registry", disks.certificate, disks.layouts) as running:
        yield running


@pytest.fixture(scope="session")
def workshop(disks: installed.Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Makes disks of other boot loaders, each when the first test asks for it, kept as ``disks`` are."""
    directory = tmp_path_factory.mktemp("loaders")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    yield Workshop(disks, directory, Path(cache) / "vm" if cache else directory / "cache")
    shutil.rmtree(directory)
