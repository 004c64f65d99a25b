"""meta.json: the bytes of composefs-rs, and every way the file can be wrong."""

from __future__ import annotations

import json

import pytest

from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, IncompatibleRepository, MetadataError
from hostimaged.composefs.repository.metadata import MAX_SIZE, Metadata

NEW_SHA512 = b"""{
  "version": 1,
  "algorithm": "fsverity-sha512-12",
  "features": {
    "compatible": [],
    "read-only-compatible": [
      "v1_erofs"
    ],
    "incompatible": []
  },
  "erofs_formats": {
    "default": 1
  }
}
"""
V1, V2 = FormatSet(Format.V1), FormatSet(Format.V2)


def document(**changes: object) -> bytes:
    base: dict[str, object] = {"version": 1, "algorithm": "fsverity-sha256-12"}
    return json.dumps({key: value for key, value in (base | changes).items() if value is not ...}).encode()


def test_bytes_of_a_new_repository() -> None:
    metadata = Metadata.new(Algorithm.SHA512, V1)
    assert metadata.render() == NEW_SHA512
    assert Metadata.parse(NEW_SHA512) == metadata


@pytest.mark.parametrize(
    ("formats", "text", "flag"),
    [
        (FormatSet(Format.V0), '{\n    "default": 0\n  }', False),
        (V2, '{\n    "default": 2\n  }', False),
        (
            FormatSet(Format.V1, (Format.V2, Format.V0, Format.V2)),
            '{\n    "default": 1,\n    "extra": [\n      0,\n      2\n    ]\n  }',
            True,
        ),
    ],
)
def test_formats_are_written(formats: FormatSet, text: str, *, flag: bool) -> None:
    rendered = Metadata.new(Algorithm.SHA256, formats).render().decode()
    assert rendered.endswith(f'"erofs_formats": {text}\n}}\n')
    assert ("v1_erofs" in rendered) is flag
    assert Metadata.parse(rendered.encode()).formats == formats


@pytest.mark.parametrize(
    ("data", "formats"),
    [
        (document(), V2),
        (document(features={}), V2),
        (document(features={"read-only-compatible": ["v1_erofs"]}), V1),
        (document(features={"read-only-compatible": ["v1_erofs"]}, erofs_formats={"default": 2}), V1),
        (
            document(
                features={"read-only-compatible": ["v1_erofs"]}, erofs_formats={"default": 2, "extra": [0]}
            ),
            FormatSet(Format.V2, (Format.V0,)),
        ),
        (document(erofs_formats={"default": 1}), V1),
        (document(erofs_formats={"default": 0, "other": None}), FormatSet(Format.V0)),
    ],
)
def test_effective_formats(data: bytes, formats: FormatSet) -> None:
    assert Metadata.parse(data).formats == formats


def test_order_of_formats() -> None:
    formats = FormatSet(Format.V1, (Format.V2, Format.V1, Format.V0))
    assert formats.in_order() == (Format.V1, Format.V0, Format.V2)
    assert str(formats) == "v1+v0+v2"


def test_unknown_keys_and_flags() -> None:
    features = {"compatible": ["new"], "read-only-compatible": ["v1_erofs", "newer"], "other": [1]}
    metadata = Metadata.parse(document(features=features, surprise=[1, {"a": None}]))
    metadata.check()
    assert metadata.compatible == ("new",)
    assert metadata.unknown_read_only_compatible == ("newer",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (document(version=2, features={"incompatible": ["x"]}), "format version is 2"),
        (document(features={"incompatible": ["x", "y"]}), "features x, y"),
    ],
)
def test_repositories_of_the_future(data: bytes, message: str) -> None:
    with pytest.raises(IncompatibleRepository, match=message):
        Metadata.parse(data).check()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        NEW_SHA512.decode().encode("utf-16"),
        NEW_SHA512 + b"x",
        b"[" * 60000,
        b'{"version":1,"version":1,"algorithm":"fsverity-sha256-12"}',
        b'{"version":' + b"1" * 5000 + b"}",
        document(version=...),
        document(version=None),
        document(version="1"),
        document(version=1.0),
        document(version=True),
        document(version=-1),
        document(version=1 << 32),
        document(algorithm=...),
        document(algorithm=1),
        document(algorithm="sha256"),
        document(algorithm="fsverity-md5-12"),
        document(algorithm="fsverity-sha256-16"),
        document(features=[]),
        document(features=None),
        document(features={"compatible": "v1_erofs"}),
        document(features={"incompatible": [1]}),
        document(erofs_formats=None),
        document(erofs_formats={}),
        document(erofs_formats={"default": 3}),
        document(erofs_formats={"default": "1"}),
        document(erofs_formats={"default": 1, "extra": [3]}),
        document(erofs_formats={"default": 1, "extra": 2}),
        document(padding="x" * MAX_SIZE),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(MetadataError) as caught:
        Metadata.parse(data)
    assert caught.value.message.startswith("meta.json of the repository is malformed: ")
