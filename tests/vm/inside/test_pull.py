"""A whole pull into a secure repository, judged by the kernel and by composefs-rs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import check_whole, pull
from hostimage_testing.tools import Finished, run
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.repository.verity import VerityUnavailable
from hostimaged.oci.pull import PullResult
from hostimaged.system import syscalls
from hostimaged.system.paths import HostPaths

LARGE = hashlib.sha256(b"large").digest() * 100_000
FIRST = tars.directory(b"usr") + tars.file(b"usr/large", LARGE) + tars.file(b"usr/small", b"small") + tars.END
SECOND = tars.directory(b"usr") + tars.file(b"usr/second", b"second " * 1000, mode=0o4755) + tars.END


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "host", settings="")


@pytest.fixture
def image(tmp_path: Path) -> str:
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(FIRST, "gzip"), layout.layer(SECOND, "zstd")])
    return f"oci:{layout.path}:v1"


def cfsctl(host: HostPaths, *args: str, check: bool = True) -> Finished:
    return run("cfsctl", "--repo", host.repository, "--require-verity", *args, check=check)


def fsck(host: HostPaths) -> Finished:
    """Our own check, as an administrator runs it."""
    return run(sys.executable, "-m", "hostimaged.composefs", "fsck", host.repository, check=False)


def objects(host: HostPaths) -> Iterator[Path]:
    return (path for path in (host.repository / "objects").rglob("*") if path.is_file())


def check_sound(host: HostPaths, result: PullResult) -> None:
    """Both checks find nothing wrong, the ids are cfsctl's, and the kernel measures each object's name."""
    assert cfsctl(host, "fsck").out.rstrip().endswith("status: ok")
    report = cfsctl(host, "oci", "fsck").out
    assert "oci images: 1/1 ok" in report, report
    computed = cfsctl(host, "oci", "compute-id", result.tag).out.strip()
    assert computed == result.image_ids[Format.V1].hex()
    ours = fsck(host)
    assert (ours.code, ours.err) == (0, "")
    assert ours.out.rstrip().endswith("status: ok")
    with Repository.open(host.repository) as repository:
        assert repository.secure
        check_whole(repository)
        algorithm = repository.algorithm
    for path in objects(host):
        fd = os.open(path, os.O_RDONLY)
        try:
            measured = syscalls.measure_verity(fd, algorithm.kernel_id, algorithm.digest_size)
        finally:
            os.close(fd)
        assert measured is not None
        assert measured.hex() == path.parent.name + path.name


def test_a_pull_into_a_new_repository(host: HostPaths, image: str) -> None:
    result = pull(host, image, verity=Verity.REQUIRE)
    assert result.changed
    check_sound(host, result)
    again = pull(host, image, verity=Verity.REQUIRE)
    assert not again.changed
    assert again.layers_present == again.layers_total == 2


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
def test_a_pull_into_a_repository_of_cfsctl(host: HostPaths, image: str, algorithm: Algorithm) -> None:
    run("cfsctl", "init", "--algorithm", algorithm.identifier, host.repository)
    result = pull(host, image, verity=Verity.REQUIRE)
    check_sound(host, result)


def test_what_was_pulled_can_be_mounted(host: HostPaths, image: str, tmp_path: Path) -> None:
    """With ``verity=require``: the kernel compares each file with what the image says of it."""
    result = pull(host, image, verity=Verity.REQUIRE)
    metadata, merged = tmp_path / "metadata", tmp_path / "merged"
    metadata.mkdir()
    merged.mkdir()
    options = "ro,metacopy=on,redirect_dir=on,verity=require,"
    options += f"lowerdir={metadata}::{host.repository / 'objects'}"
    found = host.repository / "images" / result.image_ids[Format.V1].hex()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", found, metadata], check=True)
    try:
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        try:
            assert (merged / "usr/large").read_bytes() == LARGE
            assert (merged / "usr/small").read_bytes() == b"small"
            assert (merged / "usr/second").stat().st_mode & 0o7777 == 0o4755
        finally:
            subprocess.run(["umount", merged], check=True)
    finally:
        subprocess.run(["umount", metadata], check=True)


@pytest.mark.parametrize("how", ["without verity", "of other bytes"])
def test_an_object_that_was_replaced_is_found(host: HostPaths, image: str, how: str) -> None:
    pull(host, image, verity=Verity.REQUIRE)
    victim = max(objects(host), key=lambda path: path.stat().st_size)
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(data if how == "without verity" else data[:-1] + b"!")
    if how == "of other bytes":
        fd = os.open(victim, os.O_RDONLY)
        syscalls.enable_verity(fd, Algorithm.SHA512.kernel_id)
        os.close(fd)
    ours, theirs = fsck(host), cfsctl(host, "fsck", check=False)
    assert ours.code != 0
    assert victim.name in ours.out
    assert ours.out == theirs.out
    document = run(
        sys.executable, "-m", "hostimaged.composefs", "fsck", "--json", host.repository, check=False
    )
    assert len(json.loads(document.out)["errors"]) >= 1


@pytest.fixture
def in_memory() -> Iterator[HostPaths]:
    """A host on a file system that has no fs-verity."""
    with tempfile.TemporaryDirectory(dir="/run") as root:
        yield scratch_host(Path(root), settings="")


def test_a_file_system_without_verity_is_refused(in_memory: HostPaths, image: str) -> None:
    """Where verity is required and cannot be had, nothing is pulled and no repository is left."""
    with pytest.raises(VerityUnavailable):
        pull(in_memory, image, verity=Verity.REQUIRE)
    assert not in_memory.repository.exists()
