"""Kernel arguments of images."""

from __future__ import annotations

import pytest

from hostimaged.boot import kargs
from hostimaged.boot.cmdline import Cmdline
from hostimaged.errors import UnsupportedImage


class Files:
    """An image that has nothing but drop-ins."""

    def __init__(self, **contents: str | bytes) -> None:
        self.contents = {
            name.replace("_", "."): text.encode() if isinstance(text, str) else text
            for name, text in contents.items()
        }

    def names(self, path: str) -> list[bytes]:
        assert path == kargs.DIRECTORY
        return sorted(name.encode() for name in self.contents)

    def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
        data = self.contents[path.removeprefix(f"{kargs.DIRECTORY}/")]
        assert len(data) <= limit, "files.py refuses"
        return data

    def open(self, path: str) -> int | None:
        raise NotImplementedError


def read(architecture: str = "amd64", **contents: str | bytes) -> tuple[str, ...]:
    return kargs.read_kargs(Files(**contents), architecture)


def test_files_in_the_order_of_their_names() -> None:
    found = read(
        b_toml='kargs = ["c=\\"x y\\" d", "a"]',
        a_toml='kargs = ["a", "b=1  b=2"]\nmatch-architectures = ["x86_64", "aarch64"]',
        c_conf="kargs = 5",
        d_toml='kargs = ["no"]\nmatch-architectures = ["s390x"]',
        e_toml="match-architectures = []",
    )
    assert found == ("a", "b=1", "b=2", 'c="x y"', "d")


def test_none() -> None:
    assert read() == ()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("amd64", "x86_64"),
        ("x86_64", "x86_64"),
        ("arm64", "aarch64"),
        ("ppc64le", "powerpc64"),
        ("s390x", "s390x"),
    ],
)
def test_architectures(architecture: str, name: str) -> None:
    text = f'kargs = ["x"]\nmatch-architectures = ["{name}"]'
    assert read(architecture, a_toml=text) == ("x",)
    assert read("riscv64", a_toml=text) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kargs",
        "kargs = 'a'",
        "kargs = [1]",
        "kargs = ['a']\nother = 1",
        "kargs = ['a']\nmatch-architectures = 'x86_64'",
        "kargs = ['composefs=x']",
        "kargs = ['a=\"open']",
        'kargs = ["a=\\"x\\ny\\""]',
        'kargs = ["a\\u0000"]',
        b"kargs = ['\xff']",
        "kargs = " + "[" * 8000,
    ],
)
def test_what_is_refused(text: str | bytes) -> None:
    with pytest.raises(UnsupportedImage, match=r"/usr/lib/bootc/kargs\.d/a\.toml"):
        read(a_toml=text)


def test_bounds() -> None:
    many = {f"f{n}_toml": "kargs = []" for n in range(kargs.MAX_FILES + 1)}
    with pytest.raises(UnsupportedImage, match="files"):
        read(**many)
    long = {f"f{n}_toml": f"kargs = ['{n}{'x' * 9000}']" for n in range(2)}
    with pytest.raises(UnsupportedImage, match="characters"):
        read(**long)
    with pytest.raises(UnsupportedImage, match="longer"):
        kargs.parse_file(b"#" * (kargs.MAX_SIZE + 1), "f", "x86_64")


def test_an_update_keeps_what_people_changed() -> None:
    booted = Cmdline.parse("root=UUID=1 mine=1 old shared=1 console=tty0")
    old, new = ("old", "shared=1", "gone=1"), ("shared=1", "mine=1", "new=1", "root=UUID=1")
    assert kargs.diff_kargs(old, new) == (("mine=1", "new=1", "root=UUID=1"), ("old", "gone=1"))
    assert str(kargs.apply(booted, old, new)) == "root=UUID=1 mine=1 shared=1 console=tty0 new=1"
    assert kargs.apply(booted, old, old) == booted


def test_equal_arguments_in_another_spelling_are_no_difference() -> None:
    assert kargs.diff_kargs(("a-b=1",), ("a_b=1",)) == ((), ())
