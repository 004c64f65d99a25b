"""A whole pull on a disk that fails: at every change of the file system in its turn, and at its reads.

The error has its class, nothing that has a name is incomplete, nothing temporary stays, and the next pull
completes what was begun.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.disk import EXPECTED, Disk
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import check_whole, pull
from hostimaged.composefs import splitstream
from hostimaged.composefs.repository import Repository, RepositoryMissing
from hostimaged.errors import HostimageError, StorageError
from hostimaged.oci import images
from hostimaged.oci.pull import PullResult
from hostimaged.system import syscalls
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
#: Every change in the long run; for a kind of error that is told like another, some of them otherwise.
STRIDES = {errno.ENOSPC: 1, errno.EIO: 3, errno.EROFS: 4, errno.EDQUOT: 5}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    base = tars.directory(b"usr") + tars.file(b"usr/a", b"a" * 100) + tars.END
    # Contents in one go and in pieces, and a stream that does not fit into memory.
    more = tars.file(b"usr/big", os.urandom(1_200_000)) + tars.file(b"usr/b", b"b" * 3000) + tars.END
    layout.image("v1", [layout.layer(base, "gzip"), layout.layer(more, "zstd")])
    return layout


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(splitstream, "_PENDING_LIMIT", 1000)
    monkeypatch.setattr(splitstream, "_COMPRESSED_LIMIT", 500)
    monkeypatch.setattr("hostimaged.composefs.repository.repository._STREAM_IN_MEMORY", 500)
    # The syncs are steps like others, but nothing is gained by doing them thousands of times.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(syscalls, "syncfs", lambda fd: None)
    made = Disk(monkeypatch)
    made.install()
    return made


def tagged(host: HostPaths) -> int:
    with Repository.open(host.repository, lock_timeout=0) as repository:
        check_whole(repository)
        return len(images.tags(repository))


@pytest.mark.parametrize("code", STRIDES, ids=lambda code: errno.errorcode[code])
def test_every_change(
    disk: Disk, tmp_path: Path, cfsctl: str, layout: Layout, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    reference = f"oci:{layout.path}:v1"
    trial = scratch_host(tmp_path / "trial")
    disk.plan(-1, code)
    expected = pull(trial, reference)
    steps = disk.count
    assert steps > 60
    failed = 0
    for at in range(0, steps, 1 if SOAK else STRIDES[code]):
        host = scratch_host(tmp_path / f"at-{at}")
        disk.plan(at, code)
        try:
            pull(host, reference)
        except HostimageError as error:
            assert type(error) is EXPECTED[code], (at, error)  # noqa: PT017
            assert f"{host.temporary}/" not in error.message, (at, error)  # noqa: PT017
            assert ".tmp" not in error.message, (at, error)  # noqa: PT017
            failed += 1
        else:
            # Two layers at once do not always make the same number of changes (a directory that both need).
            assert disk.count <= at, f"change {at} failed and nobody was told"
        disk.plan(-1, 0)
        check_after(host, cfsctl, reference, expected)
    with capsys.disabled():
        print(f" [{failed} failures of {steps} changes]", end="")


def check_after(host: HostPaths, cfsctl: str, reference: str, expected: PullResult) -> None:
    """Sound after the failure, and complete after the next pull."""
    try:
        assert tagged(host) <= 1
    except RepositoryMissing:
        # It is made with its first file; the directory alone is no repository.
        assert not list(host.physical_root.glob("composefs/*"))
    assert not host.temporary.exists() or list(host.temporary.iterdir()) == []
    result = pull(host, reference)
    assert result.image_ids == expected.image_ids
    assert tagged(host) == 1
    assert not list(host.repository.glob("objects/*/.tmp*"))
    assert not list(host.repository.rglob(".symlink-*"))
    Judge(cfsctl, host.repository).check(images=1)


def test_every_read_of_the_layout(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source on a disk that cannot be read is told as that, not as a bad image."""
    reads = Counting(os.read)
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", reads)
        pull(scratch_host(tmp_path / "trial"), f"oci:{layout.path}:v1")
    assert reads.count > 8
    for at in range(reads.count):
        host = scratch_host(tmp_path / f"at-{at}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "read", Counting(os.read, at))
            with pytest.raises(StorageError, match="Input/output error"):
                pull(host, f"oci:{layout.path}:v1")
        if host.repository.exists():
            assert tagged(host) == 0
        assert pull(host, f"oci:{layout.path}:v1").changed
        assert tagged(host) == 1


class Counting:
    """Calls ``real``, and fails the call number ``at``."""

    def __init__(self, real: Callable[..., Any], at: int = -1) -> None:
        self._real = real
        self._at = at
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            count, self.count = self.count, self.count + 1
        if count == self._at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(*args, **kwargs)
