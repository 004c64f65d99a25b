"""Operations interrupted at every step: what boots is whole, and nothing is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.operating import At, session
from hostimage_testing.standing import OPERATIONS, Standing, check_after, status_of
from hostimaged.errors import Cancelled

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Standing:
    """Hosts to be copied."""
    return Standing(tmp_path_factory.mktemp("standing"), cfsctl)


def _menu(host: RecordedHost) -> list[tuple[str, str, bool]]:
    return [(str(row.id), str(row.role), row.pinned) for row in status_of(host).visible]


@pytest.mark.parametrize("name", ["rollback", "default", "delete", "unstage", "pin"])
@pytest.mark.parametrize(("kind", "endings"), [(KINDS[1], (Crash,)), (KINDS[2], (Crash, Cancelled))], ids=str)
def test_interrupted_at_every_step(
    name: str,
    kind: Kind,
    endings: tuple[type[BaseException], ...],
    standing: Standing,
    tmp_path: Path,
    cfsctl: str,
) -> None:
    for ending in endings:
        number = 0
        while True:
            stood = standing.copy(kind, tmp_path / f"{ending.__name__}{number}")
            before = _menu(stood.host)
            try:
                with session(stood.host, At(number, ending)) as opened:
                    OPERATIONS[name](opened, stood)
            except ending:
                # Who is told to stop stops in time, or not at all.
                assert ending is Crash or _menu(stood.host) == before
                check_after(stood, cfsctl, name, lost=number % 2 == 0)
                number += 1
                continue
            break
        assert _menu(stood.host) != before
        assert number > (2 if ending is Crash else 0)
