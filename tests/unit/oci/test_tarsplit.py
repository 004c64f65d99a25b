"""Tar-split data and its checksums: what was put in comes out, and anything else is a typed error."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimage_testing import stores
from hostimaged.errors import UnsupportedImage
from hostimaged.oci.storage import tarsplit
from hostimaged.oci.storage.crc64 import crc64
from hostimaged.oci.storage.tarsplit import MAX_LINE, FileEntry, parse


def test_the_checksum_is_the_one_of_the_standard() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001
    assert stores.crc64_iso(b"123456789") == 0xB90956C775A41001


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=3000), st.integers(1, 40))
def test_checksums_of_all_lengths(data: bytes, times: int) -> None:
    assert crc64(data * times) == stores.crc64_iso(data * times)


def test_a_line_without_end() -> None:
    packed = gzip.compress(b'{"type":2,"payload":"' + b"A" * (MAX_LINE + 1))
    with pytest.raises(UnsupportedImage, match="a line of over"):
        list(parse([packed]))


def test_lines_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarsplit, "MAX_TEXT", 10_000)
    line = json.dumps(stores.segment(bytes(600))).encode() + b"\n"
    assert len(list(parse([gzip.compress(line * 10)]))) == 10
    with pytest.raises(UnsupportedImage, match="over 10000 bytes"):
        list(parse([gzip.compress(line * 20)]))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=80),
            st.tuples(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name), st.binary()),
        )
    ),
    st.integers(1, 200),
)
def test_parts_come_as_they_were_put_in(parts: list[Any], piece: int) -> None:
    entries = [stores.segment(part) if isinstance(part, bytes) else stores.content(*part) for part in parts]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    packed = gzip.compress(lines.encode())
    found = list(parse(packed[at : at + piece] for at in range(0, len(packed), piece)))
    wanted = [
        part if isinstance(part, bytes) else FileEntry(part[0], len(part[1]), stores.crc64_iso(part[1]))
        for part in parts
        if isinstance(part, bytes) or part[1]
    ]
    assert found == wanted


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400) | st.text(max_size=200).map(lambda text: gzip.compress(text.encode())))
def test_anything_is_parts_or_a_typed_error(data: bytes) -> None:
    with suppress(UnsupportedImage):
        for part in parse([data]):
            assert part
