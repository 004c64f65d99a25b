"""Comparing versions and file names the way boot loaders do.

Every function returns a negative number, zero or a positive one, as ``a`` sorts before, with or after ``b``.
Nothing here knows entries; ``hostimaged.boot.order`` applies these rules to them.
"""

from __future__ import annotations

import re
from typing import Final

_DIGITS: Final = frozenset("0123456789")
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_UAPI_CHARACTERS: Final = _DIGITS | _LETTERS | frozenset("~-^.")
_SEGMENT: Final = re.compile(r"[0-9]+|[A-Za-z]+")
_RPM_CHARACTERS: Final = _DIGITS | _LETTERS
#: What gnulib takes for the suffix of a file name (filevercmp, "file suffixes").
_FILE_SUFFIX: Final = re.compile(r"(?:\.[A-Za-z~][A-Za-z0-9~]*)*\Z")


def rpmvercmp(a: str, b: str, *, after: str = "^") -> int:
    """Versions as RPM compares them (rpm 4.15 and later; ``~`` before, ``^`` after the end).

    ``after`` is the character that sorts after the end and before anything else: GRUB's copy of the function
    has ``+`` in that place.
    """
    if a == b:
        return 0
    i = j = 0
    keep = _RPM_CHARACTERS | {"~", after}
    while i < len(a) or j < len(b):
        i, j = _skip(a, i, keep), _skip(b, j, keep)
        one, two = a[i : i + 1], b[j : j + 1]
        if "~" in (one, two):
            if one != two:
                return -1 if one == "~" else 1
            i, j = i + 1, j + 1
            continue
        if after in (one, two):
            if one != two:
                return _after_end(one, two, after)
            i, j = i + 1, j + 1
            continue
        if not one or not two:
            break
        result, i, j = _rpm_segment(a, i, b, j)
        if result:
            return result
    return (i < len(a)) - (j < len(b))


def _skip(text: str, at: int, keep: frozenset[str]) -> int:
    while at < len(text) and text[at] not in keep:
        at += 1
    return at


def _after_end(one: str, two: str, after: str) -> int:
    if not one:
        return -1
    if not two:
        return 1
    return -1 if one == after else 1


def _rpm_segment(a: str, i: int, b: str, j: int) -> tuple[int, int, int]:
    """Compare the segments of letters or of digits that begin at ``i`` and ``j``; their ends."""
    one, two = _segment(a, i), _segment(b, j)
    numeric = one[0] in _DIGITS
    if numeric != (two[0] in _DIGITS):
        return (1 if numeric else -1), i, j
    ends = i + len(one), j + len(two)
    if numeric:
        return _compare_numbers(one, two), *ends
    return (one > two) - (one < two), *ends


def _segment(text: str, at: int) -> str:
    found = _SEGMENT.match(text, at)
    assert found is not None
    return found[0]


def _compare_numbers(one: str, two: str) -> int:
    """Digits of any number, without converting them."""
    one, two = one.lstrip("0"), two.lstrip("0")
    return (len(one) - len(two)) or (one > two) - (one < two)


def uapi_compare(a: str, b: str) -> int:
    """Versions as systemd and systemd-boot compare them (UAPI.10, Version Format Specification)."""
    i = j = 0
    while True:
        i, j = _skip(a, i, _UAPI_CHARACTERS), _skip(b, j, _UAPI_CHARACTERS)
        one, two = a[i : i + 1], b[j : j + 1]
        if "~" in (one, two):
            if one != two:
                return -1 if one == "~" else 1
            i, j = i + 1, j + 1
            one, two = a[i : i + 1], b[j : j + 1]
        if not one or not two:
            return bool(one) - bool(two)
        for mark in "-^.":
            if mark in (one, two):
                if one != two:
                    return -1 if one == mark else 1
                i, j = i + 1, j + 1
                one, two = a[i : i + 1], b[j : j + 1]
        numeric = one in _DIGITS or two in _DIGITS
        kind = _DIGITS if numeric else _LETTERS
        end, other_end = _end_of(a, i, kind), _end_of(b, j, kind)
        part, other = a[i:end], b[j:other_end]
        if numeric and not (part and other):
            return bool(part) - bool(other)
        result = _compare_numbers(part, other) if numeric else (part > other) - (part < other)
        if result:
            return result
        i, j = end, other_end


def _end_of(text: str, at: int, kind: frozenset[str]) -> int:
    while at < len(text) and text[at] in kind:
        at += 1
    return at


def split_name(name: str) -> tuple[str, str, str]:
    """A file name without ``.conf`` in the parts by which GRUB sorts it: name, version, release.

    They are split at the last two hyphens; what is missing is "" (grub2 blscfg of Fedora and RHEL).
    """
    rest, hyphen, release = name.rpartition("-")
    if not hyphen:
        return name, "", ""
    first, hyphen, version = rest.rpartition("-")
    if not hyphen:
        return rest, release, ""
    return first, version, release


def grub_compare(a: str, b: str) -> int:
    """File names without ``.conf`` as GRUB of Fedora and RHEL compares them (blscfg); it sorts descending.

    A name that compares equal to an earlier one is left out of GRUB's menu.
    """
    for one, two in zip(split_name(a), split_name(b), strict=True):
        if result := rpmvercmp(one, two, after="+"):
            return result
    return 0


def filevercmp(a: str, b: str) -> int:
    """File names as gnulib's function of that name compares them; GRUB 2.14 sorts entries by it.

    Only for names that do not begin with a period, which has a meaning of its own there.
    """
    if not a or not b:
        return bool(a) - bool(b)
    short, other = _without_suffix(a), _without_suffix(b)
    result = _debian_compare(short, other)
    if result or (short == a and other == b):
        return result
    return _debian_compare(a, b)


def _without_suffix(name: str) -> str:
    found = _FILE_SUFFIX.search(name)
    assert found is not None
    return name[: found.start()]


def _debian_compare(a: str, b: str) -> int:
    i = j = 0
    while i < len(a) or j < len(b):
        while (i < len(a) and a[i] not in _DIGITS) or (j < len(b) and b[j] not in _DIGITS):
            if difference := _debian_rank(a, i) - _debian_rank(b, j):
                return difference
            i, j = i + 1, j + 1
        end, other_end = _end_of(a, i, _DIGITS), _end_of(b, j, _DIGITS)
        if difference := _compare_numbers(a[i:end], b[j:other_end]):
            return difference
        i, j = end, other_end
    return 0


def _debian_rank(text: str, at: int) -> int:
    if at >= len(text):
        return -1
    character = text[at]
    if character in _DIGITS:
        return 0
    if character in _LETTERS:
        return ord(character)
    return -2 if character == "~" else ord(character) + 256
