"""Fixtures of the tests on whole hosts in a scratch root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.hosts import KINDS, Era, Kind, Loader, RecordedHost
from hostimage_testing.lives import Life, MakeLife, Records

Recorded = Callable[..., Life]
MakeHost = Callable[..., RecordedHost]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``kind`` or ``era`` runs for all of them."""
    if "kind" in metafunc.fixturenames and "kind" not in _given(metafunc):
        metafunc.parametrize("kind", KINDS, ids=str)
    if "era" in metafunc.fixturenames and "era" not in _given(metafunc):
        metafunc.parametrize("era", list(Era), ids=str)


def _given(metafunc: pytest.Metafunc) -> str:
    marks = metafunc.definition.iter_markers("parametrize")
    return " ".join(str(mark.args[0]) for mark in marks)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Records:
    """All recorded lives of a session."""
    return Records(tmp_path_factory.mktemp("records"), cfsctl)


@pytest.fixture
def recorded(tmp_path: Path, records: Records) -> Recorded:
    """A host with a past: ``recorded(upgraded, kind, era=…, insecure=…, separate_boot=…)``."""

    def copied(make: MakeLife, kind: Kind | None = None, **options: Any) -> Life:
        return records.copy(make, tmp_path / "host", kind or Kind(Loader.SYSTEMD), **options)

    return copied


@pytest.fixture
def make(tmp_path: Path, cfsctl: str) -> MakeHost:
    """Makes an empty host of bootc: ``make(kind, era=…, insecure=…, separate_boot=…)``."""

    def made(kind: Kind | None = None, *, name: str = "host", **options: object) -> RecordedHost:
        kind = kind or Kind(Loader.SYSTEMD)
        return RecordedHost(tmp_path / name, cfsctl, kind=kind, **options)  # type: ignore[arg-type]

    return made
