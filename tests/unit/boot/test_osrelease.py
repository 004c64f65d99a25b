"""os-release of images."""

from __future__ import annotations

import pytest

from hostimaged.boot import osrelease
from hostimaged.boot.osrelease import MAX_SIZE, MAX_VALUE, OsRelease, parse
from hostimaged.errors import UnsupportedImage

FEDORA = b"""\
NAME="Fedora Linux"
VERSION="44.20260301 (CoreOS)"
# ID=other
ID=fedora
VERSION_ID='44'
PRETTY_NAME="Fedora CoreOS 44 \\"x\\""
"""


def test_a_usual_one() -> None:
    found = parse(FEDORA)
    assert found == OsRelease(
        id="fedora",
        name="Fedora Linux",
        pretty_name='Fedora CoreOS 44 "x"',
        version="44.20260301 (CoreOS)",
        version_id="44",
        has_id=True,
    )
    assert found.entry_version("abc") == "44"
    assert found.title("abc") == 'Fedora CoreOS 44 "x"'
    assert found.boot_label("abc") == 'Fedora CoreOS 44 "x" 44'


def test_fallbacks() -> None:
    empty = parse(b"")
    assert (empty.id, empty.entry_version("abc"), empty.title("abc")) == ("bootc", "abc", "abc")
    assert empty.boot_label("abc") == "abc"
    assert parse(b"ID=x").title("abc") == "x"
    assert parse(b"ID=x\nNAME=Y").title("abc") == "Y"
    assert parse(b"VERSION=5").entry_version("abc") == "5"
    assert parse(b"VERSION_ID=\nVERSION=5").entry_version("abc") == "5"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (b'"example"', "example"),
        (b"'a'\"b\"c", "abc"),
        (b'""', ""),
        (b'"not closed', ""),
        (b'"not closed\\"', ""),
        (b"'it", ""),
        (rb'"\$\`\\"', "$`\\"),
        (rb"\$x", "\\$x"),
        (rb"'\x'", "\\x"),
        (b"  spaced  ", "spaced"),
        (b'"two  \t spaces"', "two spaces"),
        (b'"tab\x00\x1b[31m\xe2\x80\xae"', "tab [31m"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"a=b", "a=b"),
    ],
)
def test_quoting(written: bytes, value: str) -> None:
    assert parse(b"NAME=" + written + b"\n").name == value


def test_later_lines_win_and_keys_are_exact() -> None:
    assert parse(b"NAME=a\nNAME=b\n NAME=c\nname=d\nno line\n=e").name == "b"


def test_bounds() -> None:
    assert len(parse(b"NAME=" + b"x" * (MAX_SIZE - 5)).name) == MAX_VALUE
    with pytest.raises(UnsupportedImage, match="os-release"):
        parse(b"x" * (MAX_SIZE + 1))
    assert osrelease.DEFAULT_ID == "bootc"
