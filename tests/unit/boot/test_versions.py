"""Comparisons of versions and of file names."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hostimaged.boot.versions import filevercmp, grub_compare, rpmvercmp, split_name, uapi_compare


def sign(number: int) -> int:
    return (number > 0) - (number < 0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("1.0", "1.0", 0),
        ("1.0", "2.0", -1),
        ("9.9", "9.10", -1),
        ("2.0.1", "2.0", 1),
        ("2.0.1a", "2.0.1", 1),
        ("5.5p1", "5.5p10", -1),
        ("10xyz", "10.1xyz", -1),
        ("xyz.4", "8", -1),
        ("6.0.rc1", "6.0", 1),
        ("10b2", "10a1", 1),
        ("1.0a", "1.0aa", -1),
        ("10.0001", "10.1", 0),
        ("4.999.9", "5.0", -1),
        ("2_0", "2.0", 0),
        ("a+", "a+", 0),
        ("a+", "a_", 0),
        ("+a", "_a", 0),
        ("+", "_", 0),
        ("1.0~rc1", "1.0", -1),
        ("1.0~rc1", "1.0~rc2", -1),
        ("1.0~rc1~git123", "1.0~rc1", -1),
        ("1.0^", "1.0", 1),
        ("1.0^git1", "1.01", -1),
        ("1.0^20160101", "1.0.1", -1),
        ("1.0^20160101^git1", "1.0^20160102", -1),
        ("1.0~rc1^git1", "1.0~rc1", 1),
        ("1.0^git1~pre", "1.0^git1", -1),
        ("0" * 5000 + "7", "7", 0),
        ("8" + "0" * 5000, "9" + "0" * 4999, 1),
        ("", "1", -1),
        ("", "~", 1),
        ("é1", "1", 0),
    ],
)
def test_rpm(a: str, b: str, expected: int) -> None:
    """Cases of rpm's own tests, and hostile ones."""
    assert sign(rpmvercmp(a, b)) == expected
    assert sign(rpmvercmp(b, a)) == -expected


def test_plus_is_the_caret_of_grub() -> None:
    assert rpmvercmp("1.0+git", "1.0") > 0
    assert rpmvercmp("1.0+git", "1.0.1", after="+") < 0
    assert rpmvercmp("1.0+git", "1.0", after="+") > 0
    assert rpmvercmp("1.0^git", "1.0.git", after="+") == 0


#: The order of the Version Format Specification, UAPI.10, and of its examples.
UAPI_ORDER = [
    "~1",
    "",
    "ab",
    "abb",
    "abc",
    "0001-1",
    "0002",
    "12",
    "122.1~rc2",
    "122.1",
    "122.1-5",
    "123~rc1-1",
    "123",
    "123-a",
    "123-a.1",
    "123-1",
    "123-1.1",
    "123^post1",
    "123.a-1",
    "123.1-1",
    "123a-1",
    "124-1",
]


def test_uapi() -> None:
    for older, newer in pairwise(UAPI_ORDER):
        assert uapi_compare(older, newer) < 0, (older, newer)
        assert uapi_compare(newer, older) > 0, (older, newer)
    assert uapi_compare("1_0", "1.0") > 0
    assert uapi_compare("1!2", "1é2") == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("kernel-5.14.0-362.fc38", ("kernel", "5.14.0", "362.fc38")),
        ("a-b-c-d", ("a-b", "c", "d")),
        ("name-1", ("name", "1", "")),
        ("name", ("name", "", "")),
        ("-", ("", "", "")),
        ("", ("", "", "")),
    ],
)
def test_names_are_split_at_the_last_hyphens(name: str, parts: tuple[str, str, str]) -> None:
    assert split_name(name) == parts


def test_grub_compares_version_before_priority() -> None:
    """So a priority alone does not put an older version in front."""
    assert grub_compare("bootc_fedora-9.9-1", "bootc_fedora-9.10-0") < 0
    assert grub_compare("bootc_fedora-44-1", "bootc_fedora-44-0") > 0
    assert grub_compare("bootc_bootc-1-1", "bootc_fedora-1-0") < 0
    assert grub_compare("a-1_0-0", "a-1.0-0") == 0


def test_names_as_gnulib_compares_them() -> None:
    order = ["", "a~1.conf", "a.conf", "a-9.9-0.conf", "a-9.9-1.conf", "a-9.10-0.conf", "a-10-0.conf"]
    for older, newer in pairwise(order):
        assert filevercmp(older, newer) < 0, (older, newer)
        assert filevercmp(newer, older) > 0, (older, newer)
    assert filevercmp("a-01.conf", "a-1.conf") == 0
    assert filevercmp("a.b", "a.c") < 0
