"""Texts of containers-image and registries, as real ones wrote them, and the errors they become."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostimaged.errors import (
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    NetworkError,
    NoSpace,
    RegistryAuth,
    SignatureRejected,
    StorageError,
    Unavailable,
    UnsupportedImage,
)
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.skopeo_errors import fatal_message, mapped

REMOTE = ImageReference.parse("docker://registry.example/os:v1")
LOCAL = ImageReference.parse("oci-archive:/srv/os.tar")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ImageNotFound, "reading manifest v1 in registry.example/os: manifest unknown: manifest unknown"),
        (ImageNotFound, "reading manifest v1 in x/os: name unknown: repository name not known to registry"),
        (RegistryAuth, "reading manifest v1 in x/os: unauthorized: authentication required"),
        (RegistryAuth, "unable to retrieve auth token: invalid username/password: unauthorized: incorrect"),
        (RegistryAuth, "reading manifest v1 in x/y: denied: requested access to the resource is denied"),
        (RegistryAuth, "pinging container registry x: StatusCode: 403, <html>"),
        (Unavailable, 'pinging registry x: Get "https://x/v2/": dial tcp: connect: connection refused'),
        (Unavailable, "read tcp 192.0.2.1:48322->192.0.2.2:443: read: connection reset by peer"),
        (Unavailable, 'Get "https://x/v2/": dial tcp: lookup x: Temporary failure in name resolution'),
        (Unavailable, 'Get "https://x/v2/": dial tcp 192.0.2.2:443: i/o timeout'),
        (Unavailable, 'Get "https://x/v2/": net/http: TLS handshake timeout'),
        (Unavailable, 'Get "https://x/v2/": EOF'),
        (
            Unavailable,
            "reading manifest v1 in x/os: received unexpected HTTP status: 503 Service",
        ),
        (Unavailable, "Error fetching blob: invalid status code from registry 502 (Bad Gateway)"),
        (Unavailable, "pinging container registry x: StatusCode: 504, <html>"),
        (Unavailable, "reading manifest v1 in x/os: toomanyrequests: You have reached your pull rate limit."),
        (NetworkError, "Error fetching blob: invalid status code from registry 501 (Not Implemented)"),
        (NetworkError, 'Get "/v2/x/blobs/sha256:0": stopped after 10 redirects'),
        (NetworkError, 'Get "https://x/v2/": dial tcp: lookup x on 192.0.2.1:53: no such host'),
        (NetworkError, 'Get "https://x/v2/": x509: certificate signed by unknown authority'),
        (NetworkError, 'Get "https://x/v2/": http: server gave HTTP response to HTTPS client'),
        (Unavailable, "too many requests to registry"),
        (Unavailable, "unexpected EOF"),
        (Unavailable, "skopeo ended unexpectedly"),
        (SignatureRejected, "Source image rejected: A signature was required, but no signature exists"),
        (SignatureRejected, "Source image rejected: Running image docker://x:y is rejected by policy."),
        (DigestMismatch, "corrupted blob, expecting sha256:abc"),
        (DigestMismatch, "Expected 10 bytes in blob, got 9"),
        (NoSpace, "writing blob: write /var/tmp/x: no space left on device"),
        (UnsupportedImage, "unsupported legacy manifest MIME type: application/vnd.docker.x.v1"),
        (UnsupportedImage, "invalid character '<' looking for beginning of value"),
        (UnsupportedImage, "unexpected end of JSON input"),
        (UnsupportedImage, "exceeded maximum allowed size of 4194304 bytes"),
    ],
)
def test_remote(kind: type[HostimageError], text: str) -> None:
    error = mapped(text, REMOTE)
    assert type(error) is kind
    assert str(REMOTE) in error.message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ImageNotFound, "open /srv/os.tar: no such file or directory"),
        (ImageNotFound, 'Tag "docker.io/library/x:y" not found'),
        (ImageNotFound, 'no descriptor found for reference "v1"'),
        (ImageNotFound, "more than one image in oci, choose an image"),
        (StorageError, "open /srv/os.tar: permission denied"),
        (StorageError, "archive/tar: invalid tar header"),
        (StorageError, "unexpected EOF"),
    ],
)
def test_local(kind: type[HostimageError], text: str) -> None:
    assert type(mapped(text, LOCAL)) is kind


def test_internals_are_not_passed_on() -> None:
    text = (
        'writing to /private/job/copy/x: Get "https://user:secret@cdn.example/blob?X-Signature=abc&t=1": \n'
        '\x1b[31mdial tcp\tfailed for https://cdn.example/b?token=t0k"'
    )
    message = mapped(text, REMOTE, [Path("/private/job")]).message
    assert message == (f'{REMOTE}: writing to …/copy/x: \\x1b[31mdial tcp failed for https://cdn.example/b"')


def test_message_is_short() -> None:
    assert len(mapped("x" * 10_000, REMOTE).message) < 400


def test_fatal_message() -> None:
    log = (
        'time="2026-01-01T00:00:00Z" level=warning msg="something else"\n'
        'time="2026-01-01T00:00:01Z" level=fatal msg="opening docker://x: Get \\"https://x\\": no"\n'
    )
    assert fatal_message(log) == 'opening docker://x: Get "https://x": no'
    assert fatal_message("level=fatal msg=boom") == "boom"
    assert fatal_message("one\ntwo\n\n") == "two"
    assert fatal_message("") == ""
