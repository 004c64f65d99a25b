"""Boots the guest once and reports each test that ran inside (``tests/vm/inside``) as a subtest here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]


def test_inside_the_guest(tmp_path: Path) -> None:
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    cases = guest.run(Path(cache) / "guest" if cache else tmp_path)
    for case in cases:
        print(f"{case.name}: {'FAILED' if case.problem else 'skipped' if case.skipped else 'passed'}")
    assert not [f"{case.name}\n{case.problem}" for case in cases if case.problem]
    assert not [case.name for case in cases if case.skipped], "nothing is skipped in a guest made for it"
    assert len(cases) >= 10
