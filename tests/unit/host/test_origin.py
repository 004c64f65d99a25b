"""Origins, to the byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimaged.errors import DamagedState, InvalidArgs
from hostimaged.host.imgref import OriginReference
from hostimaged.host.origin import MAX_SIZE, BootType, Origin, read_origin
from hostimaged.ids import BootDigest, DeploymentId, ManifestDigest

DIGEST = BootDigest("5f" * 32)
MANIFEST = ManifestDigest("sha256:" + "9a" * 32)
REFERENCE = "ostree-unverified-image:docker://reg.example/os:stable"
WRITTEN = (
    f"[origin]\ncontainer-image-reference = {REFERENCE}\n"
    f"\n[boot]\nboot_type = bls\ndigest = {DIGEST.hex}\n"
    f"\n[image]\nmanifest_digest = {MANIFEST}"
)
ID = DeploymentId("ab" * 64)


def parse(text: str) -> Origin:
    return Origin.parse(text.encode(), "x.origin")


def test_r1_a_new_origin_names_its_manifest_to_the_byte() -> None:
    origin = Origin.new(OriginReference.parse(REFERENCE), BootType.BLS, DIGEST, MANIFEST)
    assert origin.serialise().decode() == WRITTEN


@pytest.mark.parametrize("text", [WRITTEN, WRITTEN + "\n", WRITTEN.replace("\n", "\r\n"), "\n\n" + WRITTEN])
def test_all_forms_of_the_end_are_read(text: str) -> None:
    origin = parse(text)
    assert str(origin.reference) == REFERENCE
    assert (origin.boot_type, origin.boot_digest, origin.manifest_digest) == (BootType.BLS, DIGEST, MANIFEST)
    assert origin.problems == ()
    assert origin.serialise().decode() == WRITTEN


def test_what_is_unknown_is_kept_in_its_place() -> None:
    text = "[other]\na = b = c\n\n[boot]\nboot_type = uki\nx = 1\n\n[hostimaged]\nk = v"
    origin = parse(text)
    assert origin.serialise().decode() == text
    assert origin.own == {"k": "v"}
    changed = origin.with_manifest_digest(MANIFEST).with_own({"l": "w"})
    expected = text + f"\nl = w\n\n[image]\nmanifest_digest = {MANIFEST}"
    assert changed.serialise().decode() == expected


def test_comments_end_a_line_wherever_they_begin_as_for_bootc() -> None:
    origin = parse("; a\n# b\n[boot]\nboot_type = bls # really\nother = a;b")
    assert origin.boot_type is BootType.BLS
    assert origin.sections == {"boot": {"boot_type": "bls", "other": "a"}}


@pytest.mark.parametrize("value", ["a;b", "a#b", "a\nb", "\ud800"])
def test_what_bootc_would_read_otherwise_is_not_written(value: str) -> None:
    with pytest.raises(InvalidArgs, match="written into an origin"):
        parse(WRITTEN).with_own({"key": value})


def test_the_last_of_a_key_and_all_of_a_section_count() -> None:
    origin = parse("[boot]\nboot_type = uki\n[a]\n[boot]\nboot_type = bls\ndigest = x")
    assert origin.boot_type is BootType.BLS
    assert origin.problems == ("boot.digest of its origin is not valid",)


@pytest.mark.parametrize("key", ["container-image-reference", "boot_type", "digest", "manifest_digest"])
def test_a_value_that_makes_no_sense_costs_that_value(key: str) -> None:
    lines = [f"{key} = nonsense" if line.startswith(key) else line for line in WRITTEN.split("\n")]
    origin = parse("\n".join(lines))
    values = (origin.reference, origin.boot_type, origin.boot_digest, origin.manifest_digest)
    assert values.count(None) == 1
    assert len(origin.problems) == 1
    assert key in origin.problems[0]
    assert origin.serialise().decode() == "\n".join(lines)


def test_copies_change_what_they_say() -> None:
    old = parse(
        "[origin]\ncontainer-image-reference = ostree-unverified-registry:a/b\n\n[boot]\nboot_type = uki"
    )
    other = BootDigest("11" * 32)
    assert old.with_boot_digest(other).boot_digest == other
    assert old.with_reference(OriginReference.parse(REFERENCE)).serialise().decode() == (
        f"[origin]\ncontainer-image-reference = {REFERENCE}\n\n[boot]\nboot_type = uki"
    )


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"[boot", b"[boot]\nnothing", b"= value", b"a" * (MAX_SIZE + 1)],
    ids=["utf-8", "section", "key", "no-key", "large"],
)
def test_what_is_no_origin_is_damage_that_names_the_file(data: bytes) -> None:
    with pytest.raises(DamagedState, match=r"x\.origin: "):
        Origin.parse(data, "x.origin")


def test_reading_from_a_directory(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    file = tmp_path / f"{ID}.origin"
    try:
        assert read_origin(fd, ID) is None
        file.write_text(WRITTEN)
        assert read_origin(fd, ID) == parse(WRITTEN)
        file.unlink()
        file.symlink_to("elsewhere")
        with pytest.raises(DamagedState, match="not a regular file"):
            read_origin(fd, ID)
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(DamagedState, match="not a regular file"):
            read_origin(fd, ID)
        file.unlink()
        file.write_bytes(b" " * (MAX_SIZE + 1))
        with pytest.raises(DamagedState, match="larger"):
            read_origin(fd, ID)
    finally:
        os.close(fd)
