"""Locks between processes, with a real second process."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostimaged.errors import Cancelled, LockTimeout, StorageError
from hostimaged.system import locks

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, getattr(fcntl, sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path, kind: str) -> Iterator[int]:
    """Another process holds the lock; yields its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield process.pid
        finally:
            process.stdin.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_timeout_names_the_holder(tmp_path: Path, directory: int) -> None:
    with held(tmp_path, "LOCK_EX") as pid:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        with pytest.raises(LockTimeout) as caught:
            locks.lock(directory, exclusive=False, timeout=0, what="the repository")
    assert caught.value.message == f"the repository is locked by pid {pid} ({comm})"


def test_shared_locks_coexist_and_bar_exclusive(tmp_path: Path, directory: int) -> None:
    with held(tmp_path, "LOCK_SH") as one, held(tmp_path, "LOCK_SH") as two:
        locks.lock(directory, exclusive=False, timeout=0, what="it")
        locks.syscalls.unlock(directory)
        with pytest.raises(LockTimeout) as caught:
            locks.lock(directory, exclusive=True, timeout=0.01, what="it")
    assert str(one) in caught.value.message
    assert str(two) in caught.value.message


def test_lock_is_granted_when_released(tmp_path: Path, directory: int) -> None:
    waits = 0

    with held(tmp_path, "LOCK_EX") as pid:

        def release() -> None:
            nonlocal waits
            waits += 1
            os.kill(pid, 15)

        locks.lock(directory, exclusive=True, timeout=30, what="it", check=release)
    assert waits >= 1


def test_waiting_can_be_cancelled(tmp_path: Path, directory: int) -> None:
    def cancel() -> None:
        raise Cancelled

    start = time.monotonic()
    with held(tmp_path, "LOCK_EX"), pytest.raises(Cancelled):
        locks.lock(directory, exclusive=True, timeout=60, what="it", check=cancel)
    assert time.monotonic() - start < 30


def test_failing_flock_is_a_typed_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(StorageError, match="cannot lock the thing"):
            locks.lock(fd, exclusive=True, timeout=0, what="the thing")
    finally:
        os.close(fd)


def test_holders_from_a_recorded_table(tmp_path: Path, directory: int) -> None:
    status = os.fstat(directory)
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    table = "\n".join(
        [
            f"1: FLOCK  ADVISORY  READ 11 {where} 0 EOF",
            f"1: -> FLOCK  ADVISORY  WRITE 12 {where} 0 EOF",
            f"2: POSIX  ADVISORY  READ 13 {where} 0 EOF",
            f"3: FLOCK  ADVISORY  READ 14 {where}1 0 EOF",
            "4: FLOCK  ADVISORY  READ 15 what:ever:else 0 EOF",
            "5: FLOCK  MSNFS",
            f"6: FLOCK  ADVISORY  READ -1 {where} 0 EOF",
        ]
    )
    assert locks._holders(directory, table) == [11, -1]
    assert locks._holders(directory, table, "POSIX") == [13]


def test_description_is_bounded(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_holders", lambda fd, table, kind: [os.getpid(), 0, 2**22 + 1, 4, 5])
    text = locks.describe_holders(directory)
    comm = Path("/proc/self/comm").read_text().strip()
    assert text == (
        f"pid {os.getpid()} ({comm}), a process of another pid namespace, pid {2**22 + 1}, 2 more"
    )
    monkeypatch.setattr(locks, "_holders", lambda fd, table, kind: [])
    assert locks.describe_holders(directory) == "another process"


def test_mount_device_is_the_kernels(directory: int) -> None:
    fcntl.flock(directory, fcntl.LOCK_SH)
    device = locks._mount_device(directory)
    assert device is not None
    inode = os.fstat(directory).st_ino
    assert f"{device[0]:02x}:{device[1]:02x}:{inode} " in Path("/proc/locks").read_text()
    assert locks._mount_device(10**6) is None


def test_file_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.FileLock(path, timeout=0, what="the job lock") as lock:
        assert not os.get_inheritable(lock.fileno())
        with pytest.raises(LockTimeout, match=f"the job lock is locked by pid {os.getpid()}"):
            locks.FileLock(path, timeout=0, what="the job lock").acquire()
    with (
        locks.FileLock(path, exclusive=False, timeout=0, what="it"),
        locks.FileLock(path, exclusive=False, timeout=0, what="it"),
    ):
        pass
    assert path.stat().st_mode & 0o777 == 0o600


def test_file_lock_is_shared_with_children(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = locks.FileLock(path, timeout=0, what="it")
    lock.acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]) as child:
        assert child.stdin is not None
        lock.release()
        lock.release()
        with pytest.raises(LockTimeout):
            locks.FileLock(path, timeout=0, what="it").acquire()
        child.stdin.close()
        child.wait(30)
    with locks.FileLock(path, timeout=0, what="it"):
        pass


def test_file_lock_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        locks.FileLock(tmp_path / "missing/lock", timeout=0, what="it").acquire()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError):
        locks.FileLock(tmp_path / "link", timeout=0, what="it").acquire()
    assert not (tmp_path / "target").exists()
