"""Image references: normal forms and refusals."""

from __future__ import annotations

import pytest

from hostimaged.errors import InvalidReference
from hostimaged.oci.reference import MAX_LENGTH, ImageReference, NamedImage, Transport, parse_named

DIGEST = "sha256:" + "a" * 64
ID = "b" * 64


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("docker://busybox", "docker://docker.io/library/busybox:latest"),
        ("docker://index.docker.io/busybox", "docker://docker.io/library/busybox:latest"),
        ("docker://fedora/x", "docker://docker.io/fedora/x:latest"),
        ("docker://localhost/x", "docker://localhost/x:latest"),
        ("docker://quay.io/a/b:v1", "docker://quay.io/a/b:v1"),
        ("docker://127.0.0.1:5000/x/y/z:t", "docker://127.0.0.1:5000/x/y/z:t"),
        (f"docker://quay.io/a/b@{DIGEST}", f"docker://quay.io/a/b@{DIGEST}"),
        ("registry://quay.io/a/b", "docker://quay.io/a/b:latest"),
        ("oci:/srv/images", "oci:/srv/images"),
        ("oci:/srv/images:", "oci:/srv/images"),
        ("oci://srv//images/./x/:a/b:v1", "oci:/srv/images/x:a/b:v1"),
        ("oci:/srv/with blank:v1", "oci:/srv/with blank:v1"),
        ("oci:/srv/images:@007", "oci:/srv/images:@7"),
        ("oci-archive:/a.tar:v1", "oci-archive:/a.tar:v1"),
        ("dir:/a/b/", "dir:/a/b"),
        ("docker-archive:/a.tar", "docker-archive:/a.tar"),
        ("docker-archive:/a.tar:busybox", "docker-archive:/a.tar:docker.io/library/busybox:latest"),
        ("docker-archive:/a.tar:@2", "docker-archive:/a.tar:@2"),
        ("docker-daemon:busybox:1", "docker-daemon:docker.io/library/busybox:1"),
        (f"docker-daemon:{DIGEST}", f"docker-daemon:{DIGEST}"),
        ("containers-storage:localhost/x", "containers-storage:localhost/x:latest"),
        (f"containers-storage:@{ID}", f"containers-storage:@{ID}"),
        (
            f"containers-storage:[overlay@/var/lib+/run]localhost/x@{ID}",
            f"containers-storage:[overlay@/var/lib+/run]localhost/x:latest@{ID}",
        ),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    reference = ImageReference.parse(text)
    assert str(reference) == normal
    assert ImageReference.parse(normal) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", "fedora", "quay.io/a/b:c", "docker:busybox", "docker:/x", "docker://", "docker:///x",
        "docker://a b",
        "docker://UPPER", "docker://x/UPPER", "docker://-x", "docker://x/", "docker://x//y", "docker://x:",
        "docker://x:a:b", "docker://x:-a", "docker://x:" + "a" * 129, "docker://x@sha256:ab", "docker://x@",
        f"docker://x@sha512:{'a' * 128}", f"docker://x:v1@{DIGEST}", f"docker://{ID}", "docker://user:pw@host/x",
        "docker://h:123456/x", "docker://host/" + "a" * 250, "docker://x?y", "docker://../x",
        "oci:", "oci:relative", "oci:./x", "oci:/a/../b", "oci:/x:b d", "oci:/x:-", "oci:/x:@-1", "oci:/x:@a",
        "dir:", "dir:/x:y", f"docker-archive:/x:a@{DIGEST}", "docker-archive:x", "containers-storage:",
        "containers-storage:[]x", "containers-storage:[a", "ostree:/x@y", "tarball:/x", "sif:/x", "DOCKER://x",
        " docker://x", "docker://x\n", "oci:/x\0y", "oci:/x\x1b[2J", "oci:/x\x85", "oci:/x\u2028",
        "oci:/x\udc80",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        ImageReference.parse(text)
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()


def test_length_is_bounded() -> None:
    assert ImageReference.parse("dir:/" + "a" * (MAX_LENGTH - 5)).transport is Transport.DIR
    with pytest.raises(InvalidReference) as caught:
        ImageReference.parse("dir:/" + "a" * (MAX_LENGTH - 4))
    assert len(caught.value.message) < 300


def test_parts() -> None:
    layout = ImageReference.parse("oci:/srv/images:a:b")
    assert (layout.path, layout.inner, layout.named) == ("/srv/images", "a:b", None)
    image = ImageReference.parse("docker://quay.io/a/b:c")
    assert (image.path, image.inner) == ("", "")
    assert image.named == NamedImage("quay.io/a/b", "c", "")
    assert ImageReference.parse(f"docker-daemon:{DIGEST}").named is None
    assert ImageReference.parse(f"docker://a.b/c@{DIGEST}").named == NamedImage("a.b/c", "", DIGEST)


def test_kinds_of_reference_differ() -> None:
    assert ImageReference.parse("oci:/x") != ImageReference.parse("dir:/x")
    assert parse_named("x") == parse_named("docker.io/library/x:latest")


@pytest.mark.parametrize("length", [500, 4000, 5000])
def test_the_message_for_a_long_reference_has_the_reason(length: int) -> None:
    with pytest.raises(InvalidReference) as caught:
        ImageReference.parse("docker://" + "\x1b" * length)
    assert len(caught.value.message) < 1000
    assert caught.value.message.endswith((" are not allowed", " characters"))
