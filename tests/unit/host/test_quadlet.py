"""Quadlet files: the image that one names, as bootc reads it, and what is refused."""

from __future__ import annotations

import pytest

from hostimaged.host.quadlet import MAX_SIZE, QuadletError, image_of

APP = "quay.io/foo/foo:latest"


@pytest.mark.parametrize(
    ("name", "text", "image"),
    [
        ("app.image", f"[Image]\nImage={APP}\n", APP),
        ("app.image", f"[Image]\nImage={APP}", APP),
        ("app.image", f"\n# why\n; and\n[Image]\n  Image = {APP}  \n", APP),
        ("app.image", f"[Image]\nImage=old\nImage={APP}\n", APP),
        ("app.image", f"[Image]\nImage={APP}\n[Container]\nImage=other\nAuthFile=/x\n", APP),
        ("app.image", f"[Image]\nImage={APP} # where it is\n", APP),
        ("app.image", f"[Image]\r\nImage={APP}\r\n", APP),
        ("a.b.image", f"[Image]\nImage={APP}\n", APP),
        ("app.image", "[Image]\nImage=quay.io/foo/%%foo:%%latest\n", "quay.io/foo/%foo:%latest"),
        ("app.image", "[Image]\nImage=%%%%\n", "%%"),
        ("app.container", f"[Container]\nImage={APP}\nAuthFile=/x\n", APP),
        ("app.container", f"[Unit]\nDescription=%i\n[Container]\nImage={APP}\nExec=sh -c %n\n", APP),
        ("app.container", f"[Container]\nExec=a \\\n b \\\n# not this\n c=d\nImage={APP}\n", APP),
        ("app.container", "[Container]\nImage=quay.io/x/y \\\n\n", "quay.io/x/y"),
    ],
)
def test_the_image_that_a_unit_names(name: str, text: str, image: str) -> None:
    assert image_of(name, text.encode()) == image


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("app.pod", f"[Image]\nImage={APP}\n", "neither .image nor .container"),
        ("image", f"[Image]\nImage={APP}\n", "neither .image nor .container"),
        (".image", f"[Image]\nImage={APP}\n", "neither .image nor .container"),
        ("app.Image", f"[Image]\nImage={APP}\n", "neither .image nor .container"),
        ("app.image", "[Image]\n", "no Image= in .Image."),
        ("app.image", "", "no Image= in .Image."),
        ("app.image", "[Image]\nImage=\n", "no Image= in .Image."),
        ("app.image", f"[Container]\nImage={APP}\n", "no Image= in .Image."),
        ("app.image", f"Image={APP}\n", "no Image= in .Image."),
        ("app.container", f"[Image]\nImage={APP}\n", "no Image= in .Container."),
        ("app.image", f"[Image]\nImage={APP}\nAuthFile=/etc/a.json\n", "AuthFile= is not supported"),
        ("app.image", f"[Image\nImage={APP}\n", "no section: .Image"),
        ("app.image", f"[Image]\nImage {APP}\n", "neither a section nor an assignment"),
        ("app.image", f"[Image]\n={APP}\n", "neither a section nor an assignment"),
        ("app.image", "[Image]\nImage=x \\", "its last line is continued"),
        ("app.image", "[Image]\nImage=quay.io/%i\n", r"specifiers \(%\) are not supported"),
        ("app.image", "[Image]\nImage=quay.io/x%\n", r"specifiers \(%\) are not supported"),
        ("app.image", "[Image]\nImage=quay.io/%%%x\n", r"specifiers \(%\) are not supported"),
        ("app@.container", "[Container]\nImage=quay.io/%i:1\n", r"specifiers \(%\) are not supported"),
        ("app.container", "[Container]\nImage=app.image\n", "another unit"),
        ("app.container", "[Container]\nImage=app.build\n", "another unit"),
    ],
)
def test_what_is_refused(name: str, text: str, problem: str) -> None:
    with pytest.raises(QuadletError, match=problem):
        image_of(name, text.encode())


def test_bytes_that_are_no_unit() -> None:
    with pytest.raises(QuadletError, match="UTF-8"):
        image_of("app.image", b"[Image]\nImage=\xff\n")
    with pytest.raises(QuadletError, match="larger than"):
        image_of("app.image", b"#" * (MAX_SIZE + 1))


def test_a_hostile_unit_takes_no_time() -> None:
    """A quarter of a megabyte of continued lines, of sections, of percent signs."""
    for piece in (b"a\\\n", b"[a]\n", b"a=%%\n", b"\n", b"\\\n"):
        data = piece * (MAX_SIZE // len(piece))
        with pytest.raises(QuadletError):
            image_of("app.image", data)
