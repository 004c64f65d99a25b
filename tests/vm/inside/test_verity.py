"""fs-verity for real: the kernel's digests, secure repositories, the reference implementation on them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import build
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.errors import HostimageError, VerityMismatch
from hostimaged.system import syscalls

SIZES = (0, 1, 4095, 4096, 4097, 262144, 262145, 524289, 3_000_000)
CONTENT = bytes(i % 251 for i in range(SIZES[-1]))


def cfsctl(repository: Path, *args: str) -> str:
    done = subprocess.run(
        ["cfsctl", "--repo", str(repository), "--require-verity", *args],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=list(Algorithm), ids=lambda a: a.label)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    chosen: Algorithm = request.param
    return chosen


@pytest.fixture
def repository(tmp_path: Path, algorithm: Algorithm) -> Iterator[Repository]:
    made, new = Repository.init(tmp_path / "repository", algorithm=algorithm, verity=Verity.REQUIRE)
    assert new
    with made:
        yield made


@pytest.mark.parametrize("size", SIZES)
def test_kernel_measures_our_digest(tmp_path: Path, algorithm: Algorithm, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:size])
    fd = os.open(path, os.O_RDONLY)
    try:
        syscalls.enable_verity(fd, algorithm.kernel_id)
        measured = syscalls.measure_verity(fd, algorithm.kernel_id, algorithm.digest_size)
        assert measured == fsverity.digest(algorithm, CONTENT[:size])
        with pytest.raises(OSError) as again:
            syscalls.enable_verity(fd, algorithm.kernel_id)
        assert again.value.errno == errno.EEXIST
    finally:
        os.close(fd)
    said = subprocess.run(["fsverity", "measure", path], check=True, capture_output=True, text=True).stdout
    assert said.split()[0] == f"{algorithm.label}:{measured.hex()}"
    with pytest.raises(PermissionError):
        path.open("r+b")


def test_measuring_without_verity_and_with_the_other_hash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(syscalls.VerityMissing):
            syscalls.measure_verity(fd, 1, 32)
        syscalls.enable_verity(fd, 2)
        with pytest.raises(ValueError, match="another hash"):
            syscalls.measure_verity(fd, 1, 32)
    finally:
        os.close(fd)


def test_a_new_repository_is_secure_and_so_is_every_object(repository: Repository) -> None:
    assert repository.secure
    stored = repository.store_object(b"small")
    with repository.object_writer() as writer:
        for start in range(0, len(CONTENT), 100_000):
            writer.write(CONTENT[start : start + 100_000])
        large = writer.commit()
    for object_id in (stored.id, large.id):
        fd = repository.open_object(object_id)
        try:
            size = repository.algorithm.digest_size
            assert syscalls.measure_verity(fd, repository.algorithm.kernel_id, size) == object_id
        finally:
            os.close(fd)
    repository.write_image(bytes(build(_tree(large.id), Format.V1, repository.algorithm)), "test")
    repository.sync()
    assert cfsctl(repository.path, "fsck").rstrip().endswith("status: ok")


def test_an_object_without_verity_is_refused(repository: Repository) -> None:
    stored = repository.store_object(b"genuine")
    path = repository.path / "objects" / stored.id.pathname
    path.unlink()
    path.write_bytes(b"genuine")
    with pytest.raises(HostimageError) as refused:
        os.close(repository.open_object(stored.id))
    assert isinstance(refused.value, VerityMismatch)
    path.unlink()
    path.write_bytes(b"other bytes")
    fd = os.open(path, os.O_RDONLY)
    syscalls.enable_verity(fd, repository.algorithm.kernel_id)
    os.close(fd)
    with pytest.raises(VerityMismatch):
        os.close(repository.open_object(stored.id))


def test_the_kernel_mounts_it_with_verity_required(tmp_path: Path) -> None:
    """A composefs mount with ``verity=require`` reads genuine content, and refuses a replaced object."""
    made, _ = Repository.init(tmp_path / "repository", algorithm=Algorithm.SHA256, verity=Verity.REQUIRE)
    with made as repository:
        stored = repository.store_object(CONTENT)
        image = repository.write_image(bytes(build(_tree(stored.id), Format.V1, Algorithm.SHA256)), "os")
        repository.sync()
        metadata, merged = tmp_path / "metadata", tmp_path / "merged"
        metadata.mkdir()
        merged.mkdir()
        objects = repository.path / "objects"
        path = repository.path / "images" / image.hex()
        options = f"ro,metacopy=on,redirect_dir=on,verity=require,lowerdir={metadata}::{objects}"
        for replaced in (False, True):
            if replaced:
                (objects / stored.id.pathname).unlink()
                (objects / stored.id.pathname).write_bytes(CONTENT)
            subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", path, metadata], check=True)
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
            try:
                if replaced:
                    with pytest.raises(OSError):
                        (merged / "file").read_bytes()
                else:
                    assert (merged / "file").read_bytes() == CONTENT
            finally:
                subprocess.run(["umount", merged], check=True)
                subprocess.run(["umount", metadata], check=True)


def test_a_secure_repository_made_by_cfsctl(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    subprocess.run(["cfsctl", "init", path], check=True, stdout=subprocess.DEVNULL)
    with Repository.open(path) as repository:
        assert repository.secure
        assert repository.algorithm is Algorithm.SHA512
        repository.store_object(b"ours in theirs")
    assert cfsctl(path, "fsck").rstrip().endswith("status: ok")
    ours, _ = Repository.init(tmp_path / "ours", verity=Verity.REQUIRE)
    ours.close()
    for name in ("theirs", "ours"):
        json.loads((tmp_path / name / "meta.json").read_text())
    assert (tmp_path / "ours/meta.json").read_bytes() == (path / "meta.json").read_bytes()


def _tree(object_id: bytes) -> Directory:
    def stat(mode: int) -> Stat:
        return Stat(mode, 0, 0, 1_700_000_000, 0, {})

    file = Leaf(stat(0o644), External(fsverity.ObjectId(object_id), len(CONTENT)))
    return Directory(stat(0o755), {b"file": file})
