"""Kernels and UKIs on the boot file system."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.boot.bls import ARTIFACT_PREFIX as PREFIX
from hostimaged.errors import NoSpace
from hostimaged.host.artifacts import Artifact, KernelFiles, UkiFiles, boot_digest
from hostimaged.host.bootfs import TEMPORARY
from hostimaged.ids import DeploymentId

ID = DeploymentId("ab" * 64)


def _failing() -> Iterator[bytes]:
    yield b"x" * 100
    raise OSError(28, "No space left on device")


def test_a_kernel_is_written_whole(tmp_path: Path) -> None:
    files = KernelFiles(tmp_path / "EFI" / "Linux")
    assert files.found() == []
    files.write(ID, [b"ker", b"nel"], [b"initrd"])
    path = files.path(str(ID))
    assert path.name == f"{PREFIX}{ID}"
    assert (path / "vmlinuz").read_bytes() == b"kernel"
    assert (path / "initrd").read_bytes() == b"initrd"
    assert files.found() == [Artifact(str(ID), path)]
    digest = files.boot_digest(str(ID))
    assert digest is not None
    assert digest.hex == hashlib.sha256(b"kernelinitrd").hexdigest()
    assert digest == boot_digest([b"kernel"], [b"initrd"])
    assert os.listdir(files.directory) == [path.name]


def test_an_incomplete_directory_is_known_and_replaced(tmp_path: Path) -> None:
    files = KernelFiles(tmp_path)
    files.path(str(ID)).mkdir()
    (files.path(str(ID)) / "vmlinuz").write_bytes(b"half")
    assert [found.complete for found in files.found()] == [False]
    assert files.boot_digest(str(ID)) is None
    files.write(ID, [b"kernel"], [b"initrd"])
    assert [found.complete for found in files.found()] == [True]
    assert len(os.listdir(tmp_path)) == 1


def test_no_space_leaves_nothing(tmp_path: Path) -> None:
    kernels, ukis = KernelFiles(tmp_path / "k"), UkiFiles(tmp_path / "u")
    with pytest.raises(NoSpace, match="cannot write the boot files"):
        kernels.write(ID, [b"kernel"], _failing())
    with pytest.raises(NoSpace):
        ukis.write(ID, _failing())
    with pytest.raises(NoSpace):
        ukis.write(ID, [b"uki"], [("a.addon.efi", _failing())])
    assert os.listdir(tmp_path / "k") == os.listdir(tmp_path / "u") == []


def test_a_uki_has_its_addons(tmp_path: Path) -> None:
    files = UkiFiles(tmp_path)
    files.write(ID, [b"uki"], [("a.addon.efi", [b"addon"])])
    assert (tmp_path / f"{PREFIX}{ID}.efi.extra.d" / "a.addon.efi").read_bytes() == b"addon"
    files.write(ID, [b"again"])
    assert [found.path.read_bytes() for found in files.found()] == [b"again"]
    files.remove(str(ID))
    files.remove(str(ID))
    assert os.listdir(tmp_path) == []


def test_only_prefixed_names_are_artifacts(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / f"{PREFIX}file").write_bytes(b"")
    (tmp_path / f"{TEMPORARY}abc").mkdir()
    files = KernelFiles(tmp_path)
    assert files.found() == []
    files.remove_temporary()
    files.remove("other")
    assert sorted(os.listdir(tmp_path)) == [f"{PREFIX}file", "other"]
