"""Identity types: kinds never mix, and only well-formed values exist."""

from __future__ import annotations

import pytest

from hostimaged.errors import InvalidArgs
from hostimaged.ids import BlobDigest, ConfigDigest, DiffId, ManifestDigest, ObjectId

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
