"""Image references of origins."""

from __future__ import annotations

import pytest

from hostimaged.errors import InvalidReference
from hostimaged.host.imgref import OriginReference, Scheme
from hostimaged.oci.reference import ImageReference, Transport

DOCKER = Transport.DOCKER


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "ostree-unverified-image:docker://reg.example/os:stable",
            OriginReference(Scheme.UNVERIFIED, DOCKER, "reg.example/os:stable"),
        ),
        (
            "ostree-unverified-image:registry:reg.example/os",
            OriginReference(Scheme.UNVERIFIED, DOCKER, "reg.example/os"),
        ),
        (
            "ostree-unverified-registry:reg.example/os:1",
            OriginReference(Scheme.UNVERIFIED, DOCKER, "reg.example/os:1"),
        ),
        (
            "ostree-image-signed:docker://reg.example/os",
            OriginReference(Scheme.SIGNED, DOCKER, "reg.example/os"),
        ),
        (
            "ostree-remote-image:fedora:docker://reg.example/os",
            OriginReference(Scheme.REMOTE, DOCKER, "reg.example/os", "fedora"),
        ),
        (
            "ostree-remote-registry:fedora:reg.example/os",
            OriginReference(Scheme.REMOTE, DOCKER, "reg.example/os", "fedora"),
        ),
        (
            "ostree-unverified-image:oci:relative/path:tag",
            OriginReference(Scheme.UNVERIFIED, Transport.OCI, "relative/path:tag"),
        ),
        (
            "ostree-unverified-image:containers-storage:[overlay@/x+/y]localhost/os",
            OriginReference(Scheme.UNVERIFIED, Transport.CONTAINERS_STORAGE, "[overlay@/x+/y]localhost/os"),
        ),
    ],
)
def test_what_bootc_reads_is_read(text: str, expected: OriginReference) -> None:
    assert OriginReference.parse(text) == expected
    assert OriginReference.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "scheme"),
        ("docker://reg.example/os", "scheme is unknown"),
        ("ostree-unverified-image", "no signature scheme"),
        ("ostree-unverified-image:reg.example/os", "no transport"),
        ("ostree-unverified-image:docker:reg.example/os", "two slashes"),
        ("ostree-unverified-image:ftp://reg.example/os", "transport is unknown"),
        ("ostree-unverified-image:docker://", "no image"),
        ("ostree-remote-image:docker//x", "remote"),
        ("ostree-unverified-image:docker://a\nb", "control"),
        ("ostree-unverified-image:oci:/" + "a" * 5000, "longer"),
    ],
)
def test_anything_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidReference, match=reason):
        OriginReference.parse(text)


def test_what_we_write_is_what_bootc_writes() -> None:
    image = ImageReference.parse("docker://reg.example/os:stable")
    reference = OriginReference.of(image)
    assert str(reference) == "ostree-unverified-image:docker://reg.example/os:stable"
    assert reference.image == image
    assert (reference.transport_label, reference.signature) == ("registry", None)


@pytest.mark.parametrize(
    ("text", "signature"),
    [
        ("ostree-unverified-registry:a/b", None),
        ("ostree-image-signed:oci:/a", "containerPolicy"),
        ("ostree-remote-registry:r:a/b", {"ostreeRemote": "r"}),
    ],
)
def test_what_status_says_of_signatures(text: str, signature: object) -> None:
    assert OriginReference.parse(text).signature == signature


def test_a_name_we_would_not_pull_is_kept_as_it_is() -> None:
    text = "ostree-unverified-image:docker://reg.example/os:1@sha256:" + "a" * 64
    reference = OriginReference.parse(text)
    assert reference.image is None
    assert str(reference) == text
