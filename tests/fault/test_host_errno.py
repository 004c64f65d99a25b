"""Operations on a host whose disk fails at a change of the file system: at each in its turn.

Every call that changes files fails once, for every operation and on every kind of host with HOSTIMAGE_SOAK=1,
some of them otherwise. The error has its class; what boots is whole; recovery leaves nothing over, and the
same can be done then. (For fetching see ``test_errno``, for other files in ``/etc`` ``test_etcmerge``.)
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hostimage_testing.disk import EXPECTED, Disk
from hostimage_testing.operating import session
from hostimage_testing.standing import OPERATIONS, Standing, Stood, check_after, failure_of, kinds_for
from hostimaged.errors import HostimageError

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
#: Changes between two that fail, on one kind of host; the kinds take turns.
STRIDES = {errno.ENOSPC: 25, errno.EIO: 35}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Standing:
    """Hosts to be copied."""
    return Standing(tmp_path_factory.mktemp("standing"), cfsctl)


@pytest.mark.timeout(1800 if SOAK else 300)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("code", STRIDES, ids=lambda code: errno.errorcode[code])
def test_every_change(
    name: str,
    code: int,
    standing: Standing,
    tmp_path: Path,
    cfsctl: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stride = 1 if SOAK else STRIDES[code]
    told = untold = 0
    for turn, kind in enumerate(kinds_for(name)):
        at = turn * 5 % stride
        while True:
            stood = standing.copy(kind, tmp_path / f"{kind}-{at}")
            count, failure = attempt(stood, name, at, code, monkeypatch)
            if count <= at:
                break
            assert failure is None or isinstance(failure, EXPECTED[code]), (kind, at, failure)
            told, untold = told + (failure is not None), untold + (failure is None)
            check_after(stood, cfsctl, name, lost=at % 2 == 0)
            at += stride
    assert told
    with capsys.disabled():
        print(f" [{told} failures told, {untold} made good]", end="")


def attempt(
    stood: Stood, name: str, at: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, HostimageError | None]:
    """Do an operation on a disk that fails at its change ``at``; how many it made, and what came of it."""
    with monkeypatch.context() as patch:
        disk = Disk(patch, trees=True)
        disk.install()
        disk.plan(at, code)
        try:
            with session(stood.host) as opened:
                failure = failure_of(name, opened, stood)
        except HostimageError as error:
            failure = error
    return disk.count, failure
