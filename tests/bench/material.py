"""Images to pull: a real Debian in all forms, very many small files, a few very large ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hostimage_testing import tars
from hostimage_testing.debian import Debian, prepare
from hostimage_testing.layout import Layer, Layout, file_chunks

MEBIBYTE = 1 << 20
SMALL_FILES = (10_000, 100_000, 200_000)


def small_files(count: int) -> Iterator[bytes]:
    """A tar of ``count`` files of 100 bytes to 4 KiB, 100 in each directory."""
    noise = random.Random(1).randbytes(8 << 10)
    yield tars.directory(b"usr/")
    for number in range(count):
        if number % 100 == 0:
            yield tars.directory(b"usr/%05d/" % (number // 100))
        content = b"%d " % number + noise[number % 4096 : number % 4096 + 100 + number * 37 % 4000]
        yield tars.file(b"usr/%05d/%d" % (number // 100, number), content)
    yield tars.END


def large_files() -> Iterator[bytes]:
    """A tar of four files of 512 MiB, half of which can be compressed."""
    pieces = [random.Random(2).randbytes(MEBIBYTE // 2) + bytes(MEBIBYTE // 2)]
    yield tars.directory(b"usr/")
    for name in (b"usr/a", b"usr/b", b"usr/c", b"usr/d"):
        yield tars.header(name, 512 * MEBIBYTE)
        for number in range(512):
            yield name + b"%04d" % number + pieces[0][len(name) + 4 :]
    yield tars.END


class Material:
    """The layouts below ``directory``, made when they are asked for and kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._debian: Debian | None = None

    def debian(self) -> Path:
        """``one`` and ``eight`` layers, each ``-gzip`` and ``-zstd``."""
        return self._prepared().layout

    def _prepared(self) -> Debian:
        self._debian = self._debian or prepare(self._directory / "debian")
        return self._debian

    def plain(self) -> Path:
        """``one`` and ``eight`` layers, not compressed."""

        def make(layout: Layout) -> None:
            debian = self._prepared()
            layout.image("one", [layout.layer(file_chunks(debian.tar), "none")])
            layout.image("eight", [layout.layer(file_chunks(path), "none") for path in debian.layer_tars])

        return self._made("plain", make)

    def update(self) -> Path:
        """``before`` and ``after``: the fourth of eight layers, one of the full-sized, differs at its end."""

        def make(layout: Layout) -> None:
            tar_files = self._prepared().layer_tars
            layers = [layout.layer(file_chunks(path), "gzip") for path in tar_files]
            layout.image("before", layers)
            changed = (tars.file(b"usr/changed", b"x" * 100_000), *file_chunks(tar_files[3]))
            layers[3] = layout.layer(changed, "gzip")
            layout.image("after", layers)

        return self._made("update", make)

    def small(self, count: int) -> Path:
        """``image``: so many small files."""
        return self._made(f"small-{count}", lambda layout: _single(layout, small_files(count)))

    def large(self) -> Path:
        """``image``: four files of 512 MiB."""
        return self._made("large", lambda layout: _single(layout, large_files()))

    def _made(self, name: str, make: object) -> Path:
        path = self._directory / name
        if not (path / "complete").exists():
            assert callable(make)
            make(Layout(path))
            (path / "complete").touch()
        return path


def _single(layout: Layout, tar: Iterator[bytes]) -> None:
    layer: Layer = layout.layer(tar, "zstd", level=1)
    layout.image("image", [layer])
