"""Taking a tar apart: what becomes a content, what stays, in which pieces."""

from __future__ import annotations

import pytest

from hostimage_testing import tars
from hostimaged.errors import UnsupportedImage
from hostimaged.oci.layer_parts import LayerSplitter, Part

MEBIBYTE = 1 << 20


def split(data: bytes, step: int = 100_000) -> list[tuple[Part, bytes]]:
    pieces = iter([data[at : at + step] for at in range(0, len(data), step)])
    found: list[tuple[Part, bytes]] = []
    LayerSplitter(lambda: next(pieces, None), lambda part, buffer: found.append((part, bytes(buffer)))).run()
    return found


@pytest.mark.parametrize("step", [100, 512, 100_000])
def test_contents_of_over_64_bytes_are_taken_out(step: int) -> None:
    small, large = tars.file(b"small", b"s" * 64), tars.file(b"large", b"l" * 65)
    found = split(small + large + tars.END, step)
    assert [buffer for part, buffer in found if part is Part.CONTENT] == [b"l" * 65]
    assert {part for part, _ in found} == {Part.INLINE, Part.CONTENT}
    assert b"".join(buffer for _, buffer in found) == small + large + tars.END


@pytest.mark.parametrize(("size", "pieces"), [(MEBIBYTE, 0), (MEBIBYTE + 1, 2), (3 * MEBIBYTE, 3)])
def test_large_contents_come_in_pieces(size: int, pieces: int) -> None:
    data = tars.file(b"f", bytes(size)) * 2
    kinds = [part for part, _ in split(data, MEBIBYTE) if part is not Part.INLINE]
    if pieces == 0:
        assert kinds == [Part.CONTENT] * 2
    else:
        assert kinds.count(Part.LAST_PIECE) == 2
        assert kinds[-1] is Part.LAST_PIECE
        assert len(kinds) >= 2 * pieces


def test_what_is_no_layer_is_refused() -> None:
    with pytest.raises(UnsupportedImage, match="ends inside an entry"):
        split(tars.header(b"f", 100) + bytes(100))
