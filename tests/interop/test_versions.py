"""Versions and names are compared as the programs do whose rules these are."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest

from hostimaged.boot.versions import filevercmp, uapi_compare

pytestmark = pytest.mark.interop

ALPHABET = "0019aZ.-~^_+ b"


def pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(5)

    def word(most: int) -> str:
        return "".join(generator.choices(ALPHABET, k=generator.randint(0, most)))

    first = [word(7) for _ in range(count)]
    return [(a, a[: generator.randint(0, len(a))] + word(4)) for a in first]


def sign(number: int) -> int:
    return (number > 0) - (number < 0)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_as_systemd_does() -> None:
    for a, b in pairs(150):
        done = subprocess.run(
            ["systemd-analyze", "compare-versions", "--", a, b], capture_output=True, check=False
        )
        assert sign(uapi_compare(a, b)) == {0: 0, 11: 1, 12: -1}[done.returncode], (a, b)


def test_as_gnulib_does() -> None:
    """``sort -V`` is gnulib's function, made stable: what compares equal keeps its order."""
    names = [name for pair in pairs(400) for name in pair if name and not name.startswith(".")]
    done = subprocess.run(
        ["sort", "-V", "-s"],
        input="\n".join(names),
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    ours = list(names)
    for at in range(1, len(ours)):  # Insertion keeps equal names in order, whatever else goes wrong.
        name, place = ours[at], at
        while place and filevercmp(ours[place - 1], name) > 0:
            ours[place] = ours[place - 1]
            place -= 1
        ours[place] = name
    assert done.stdout.splitlines() == ours
