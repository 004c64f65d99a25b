"""Identity types: kinds never mix, and only well-formed values exist."""

from __future__ import annotations

import pytest

from hostimaged.errors import InvalidArgs
from hostimaged.ids import (
    BlobDigest,
    BootDigest,
    ConfigDigest,
    DeploymentId,
    DiffId,
    ManifestDigest,
    ObjectId,
)

DIGEST = "sha256:" + "ab" * 32


def test_kinds_never_compare_equal() -> None:
    kinds = (ManifestDigest, ConfigDigest, BlobDigest, DiffId)
    assert len({kind(DIGEST) for kind in kinds}) == len(kinds)
    assert ManifestDigest(DIGEST) == ManifestDigest(DIGEST)


def test_digests_print_with_their_algorithm() -> None:
    digest = DiffId.of_hash("ab" * 32)
    assert str(digest) == DIGEST
    assert digest.hex == "ab" * 32


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ab" * 32,
        "sha256:",
        "sha256:" + "AB" * 32,
        "sha256:" + "ab" * 31,
        DIGEST + "\n",
        "sha512:" + "ab" * 64,
    ],
)
def test_malformed_digests_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgs, match="manifest digest"):
        ManifestDigest(bad)


def test_object_id_pathname() -> None:
    assert ObjectId(bytes.fromhex("1e2eaa42")).pathname == "1e/2eaa42"


def test_deployments_are_named_by_their_boot_image() -> None:
    id_ = DeploymentId("1a" * 64)
    assert id_.object_id == ObjectId(bytes([0x1A] * 64))
    assert DeploymentId.of_object(id_.object_id) == id_
    assert str(id_) == "1a" * 64


@pytest.mark.parametrize("bad", ["", "1a" * 32, "1A" * 64, "1a" * 64 + "\n", "../" + "1a" * 62 + "b"])
def test_malformed_deployments_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgs, match="128 hex digits"):
        DeploymentId(bad)


def test_boot_digests_have_bare_digits_and_print_their_algorithm() -> None:
    digest = BootDigest("ab" * 32)
    assert (digest.hex, str(digest)) == ("ab" * 32, DIGEST)
    assert len({digest, ManifestDigest(DIGEST)}) == 2
    with pytest.raises(InvalidArgs, match="boot digest"):
        BootDigest(DIGEST)
