"""The cursor over buffers: nothing lost, nothing twice, copies only where buffers meet."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from hostimaged.errors import UnsupportedImage
from hostimaged.oci.window import Window

DATA = bytes(range(200))


class Kept(list[bytes]):
    """Collects what was kept, as copies: the buffers may be views."""

    def append(self, buffer: object) -> None:
        super().append(bytes(memoryview(buffer)))  # type: ignore[arg-type]


def over(pieces: Iterable[bytes]) -> tuple[Window, Kept]:
    kept = Kept()
    source = iter(pieces)
    return Window(lambda: next(source, None), kept.append), kept


def cut(step: int) -> list[bytes]:
    return [DATA[at : at + step] for at in range(0, len(DATA), step)]


@pytest.mark.parametrize("step", [1, 3, 7, 50, 64, 199, 200, 1000])
def test_inline_bytes_are_kept_and_content_is_not(step: int) -> None:
    window, kept = over(cut(step))
    content = b""
    assert bytes(window.inline(10)) == DATA[:10]
    content += bytes(window.content(50))
    assert b"".join(kept) == DATA[:10]
    assert bytes(window.inline(5)) == DATA[60:65]
    assert bytes(window.inline(15)) == DATA[65:80]
    content += b"".join(bytes(part) for part in window.content_parts(70))
    assert b"".join(kept) == DATA[:10] + DATA[60:80]
    assert window.inline_rest() == 50
    assert content == DATA[10:60] + DATA[80:150]
    assert b"".join(kept) == DATA[:10] + DATA[60:80] + DATA[150:]
    assert len(window.inline(10)) == 0


def test_neighbouring_inline_bytes_are_kept_in_one_call() -> None:
    window, kept = over([DATA])
    for _ in range(4):
        window.inline(10)
    assert kept == []
    window.content(1)
    assert kept == [DATA[:40]]


def test_content_in_one_buffer_is_not_copied() -> None:
    window, _ = over([DATA])
    view = window.content(100)
    assert isinstance(view, memoryview)
    assert view.obj is DATA


def test_empty_buffers_do_not_matter() -> None:
    window, kept = over([b"", DATA[:3], b"", b"", DATA[3:], b""])
    assert bytes(window.inline(6)) == DATA[:6]
    assert window.inline_rest() == 194
    assert b"".join(kept) == DATA


def test_the_end() -> None:
    window, _ = over([])
    assert len(window.inline(512)) == 0
    for take in (window.content, lambda count: list(window.content_parts(count))):
        with pytest.raises(UnsupportedImage, match="ends inside"):
            take(1)


@pytest.mark.parametrize("step", [7, 200])
def test_an_end_too_early(step: int) -> None:
    for method in ("inline", "content", "content_parts"):
        window, _ = over(cut(step))
        window.inline(100)
        with pytest.raises(UnsupportedImage, match="ends inside"):
            bytes(b"".join(getattr(window, method)(101))) if method == "content_parts" else getattr(
                window, method
            )(101)
