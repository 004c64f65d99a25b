"""Whatever comes from outside, the parsers of references, policies, manifests and pulls answer in kind."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from hostimaged.errors import InvalidReference, SignatureRejected, UnsupportedImage
from hostimaged.oci.images import decode_tag, encode_tag
from hostimaged.oci.models import parse_config, parse_index, parse_manifest
from hostimaged.oci.policy import requirement
from hostimaged.oci.pulls import PullsError, load
from hostimaged.oci.reference import ImageReference, Transport
from hostimaged.oci.skopeo_errors import fatal_message, mapped

TRANSPORTS = st.sampled_from([*(t.value for t in Transport), "registry", "ostree", ""])
NAME_PARTS = st.sampled_from(
    ["/", "//", ":", "@", "a", "B", "0", ".", "-", "_", "__", "[", "]", "+", "sha256:" + "a" * 64, "b" * 64,
     "localhost", "docker.io", "library", "..", " ", "\0", "é", "%", "5000"]
)  # fmt: skip
NAMES = st.lists(NAME_PARTS, max_size=8).map("".join)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "config", "layers", "digest", "size", "manifests", "platform", "rootfs",
     "diff_ids", "type", "Labels", "annotations", "default", "transports", "docker", "version", "pulls",
     "reference", "manifest_digest", "source_digest", "time", ""]
)  # fmt: skip
VALUES = st.sampled_from(
    [2, 1, 0, -1, 1 << 70, 0.5, True, None, "", "layers", "reject", "insecureAcceptAnything",
     "sha256:" + "a" * 64, "application/vnd.oci.image.config.v1+json"]
)  # fmt: skip
DOCUMENTS = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
RAW = DOCUMENTS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200)


@given(TRANSPORTS, NAMES)
def test_reference_is_refused_or_normal(transport: str, name: str) -> None:
    """An accepted reference is its own normal form, and prints on one line."""
    try:
        reference = ImageReference.parse(f"{transport}:{name}")
    except InvalidReference:
        return
    assert str(reference).isprintable()
    assert ImageReference.parse(str(reference)) == reference
    assert not reference.path or reference.path.startswith("/")
    assert ".." not in reference.path.split("/")


@given(st.text(max_size=50))
def test_any_text_as_reference(text: str) -> None:
    with contextlib.suppress(InvalidReference):
        ImageReference.parse(text)


@given(RAW)
@example(b"[" * 5000)
def test_documents_are_refused_or_valid(raw: bytes) -> None:
    for parse in (parse_manifest, parse_index, parse_config):
        with contextlib.suppress(UnsupportedImage):
            parse(raw)


@given(RAW)
def test_policy_never_accepts_by_accident(tmp_path: Path, raw: bytes) -> None:
    """Whatever else is in the file: only a list that asks for nothing accepts without a signature."""
    path = tmp_path / "policy.json"
    path.write_bytes(raw)
    try:
        found = requirement(path, ImageReference.parse("docker://x.example/y"))
    except SignatureRejected:
        return
    assert found.types
    if found.accepts_anything:
        assert _lists(json.loads(raw), [{"type": "insecureAcceptAnything"}])


def _lists(value: Any, wanted: list[Any]) -> bool:
    """Whether a list of nothing but ``wanted``'s element is somewhere in ``value``."""
    if isinstance(value, list):
        return bool(value) and all(item == wanted[0] for item in value)
    return isinstance(value, dict) and any(_lists(item, wanted) for item in value.values())


@given(RAW)
def test_list_of_pulls(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "pulls.json"
    path.write_bytes(raw)
    with contextlib.suppress(PullsError):
        for row in load(path):
            assert row.time >= 0


@given(st.text(min_size=1, alphabet=st.sampled_from("%/25Fa:@é"), max_size=12).filter(lambda s: s[0] != "@"))
def test_tags_come_back(name: str) -> None:
    encoded = encode_tag(name)
    assert "/" not in encoded
    assert decode_tag(encoded) == name


@given(st.text(max_size=400))
def test_messages_are_one_bounded_line(text: str) -> None:
    for reference in ("docker://x.example/y", "dir:/x"):
        message = mapped(text, ImageReference.parse(reference), [Path("/private")]).message
        assert "\n" not in message
        assert len(message) < 500
    fatal_message(text)
