"""The system calls, tried on this kernel; what it lacks is answered by a stand-in for the ioctl."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_testing.processes import python_environment
from hostimaged.system import syscalls
from hostimaged.system.syscalls import Capability

SOURCES = os.pathsep.join(str(Path(__file__).parents[3] / name) for name in ("daemon", "dbus"))


def run_python(code: str) -> str:
    """Run ``code`` in a process of its own: what it sets cannot be undone."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Ioctl:
    """Stands in for ``fcntl.ioctl`` and records the calls."""

    def __init__(self, code: int = 0, answer: bytes = b"") -> None:
        self.code = code
        self.answer = answer
        self.calls: list[tuple[int, bytes]] = []

    def __call__(self, fd: int, request: int, argument: bytes | bytearray) -> int:
        self.calls.append((request, bytes(argument)))
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        if self.answer:
            assert isinstance(argument, bytearray)
            argument[:] = self.answer
        return 0


def test_enable_verity_passes_the_kernel_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    ioctl = Ioctl()
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    syscalls.enable_verity(3, 2)
    (request, argument), *_ = ioctl.calls
    assert request == 0x40806685
    assert len(argument) == 128
    assert struct.unpack_from("=IIII", argument) == (1, 2, 4096, 0)
    assert not any(argument[16:])


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOPKG])
def test_enable_verity_unsupported(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("fcntl.ioctl", Ioctl(code))
    with pytest.raises(syscalls.VerityUnsupported):
        syscalls.enable_verity(3, 1)


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ETXTBSY, errno.EIO])
def test_enable_verity_other_errors(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("fcntl.ioctl", Ioctl(code))
    with pytest.raises(OSError) as caught:
        syscalls.enable_verity(3, 1)
    assert caught.value.errno == code
    assert not isinstance(caught.value, syscalls.VerityUnsupported)


def test_measure_verity(monkeypatch: pytest.MonkeyPatch) -> None:
    ioctl = Ioctl(answer=struct.pack("=HH", 1, 32) + b"d" * 32)
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    assert syscalls.measure_verity(3, 1, 32) == b"d" * 32
    request, argument = ioctl.calls[0]
    assert request == 0xC0046686
    assert argument == struct.pack("=HH", 0, 32) + bytes(32)


@pytest.mark.parametrize(("algorithm", "size"), [(2, 32), (1, 20)])
def test_measure_verity_of_another_hash(monkeypatch: pytest.MonkeyPatch, algorithm: int, size: int) -> None:
    monkeypatch.setattr("fcntl.ioctl", Ioctl(answer=struct.pack("=HH", algorithm, size) + bytes(32)))
    with pytest.raises(ValueError, match="another hash"):
        syscalls.measure_verity(3, 1, 32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENODATA, syscalls.VerityMissing),
        (errno.ENOTTY, syscalls.VerityUnsupported),
        (errno.EOPNOTSUPP, syscalls.VerityUnsupported),
        (errno.EOVERFLOW, ValueError),
        (errno.EIO, OSError),
    ],
)
def test_measure_verity_errors(monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]) -> None:
    monkeypatch.setattr("fcntl.ioctl", Ioctl(code))
    with pytest.raises(expected) as caught:
        syscalls.measure_verity(3, 1, 32)
    assert type(caught.value) is expected


def test_open_beneath_keeps_links_inside(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("outside")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "outside").write_text("inside")
    (root / "sub/link").symlink_to("/outside")
    for path in ("sub/link", "/outside", "../outside", "sub/../../../outside"):
        fd = syscalls.open_beneath(root, path, os.O_RDONLY)
        try:
            assert os.read(fd, 10) == b"inside"
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)
    with pytest.raises(FileNotFoundError):
        syscalls.open_beneath(root, "missing", os.O_RDONLY)
    fd = syscalls.open_beneath(root, "sub/new", os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(fd)
    assert (root / "sub/new").stat().st_mode & 0o777 == 0o600


def test_open_beneath_refuses_magic_links() -> None:
    with pytest.raises(OSError) as caught:
        syscalls.open_beneath("/proc/self", "fd/1", os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP


def test_renames(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        syscalls.rename_noreplace(tmp_path / "a", tmp_path / "b")
    syscalls.rename_exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"
    syscalls.rename_noreplace(tmp_path / "a", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        syscalls.rename_exchange(tmp_path / "b", tmp_path / "missing")


def test_link_fd(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.write(fd, b"content")
        syscalls.link_fd(fd, directory, "name")
        with pytest.raises(FileExistsError):
            syscalls.link_fd(fd, directory, "name")
    finally:
        os.close(fd)
        os.close(directory)
    assert (tmp_path / "name").read_bytes() == b"content"


def test_syncfs(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    syscalls.syncfs(fd)
    os.close(fd)
    with pytest.raises(OSError) as caught:
        syscalls.syncfs(-1)
    assert caught.value.errno == errno.EBADF


def test_parent_death_signal_and_no_new_privs() -> None:
    code = (
        "import ctypes, pathlib; from hostimaged.system import syscalls\n"
        f"syscalls.set_parent_death_signal({signal.SIGTERM}); syscalls.set_no_new_privs()\n"
        "value = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(value))\n"
        "print(value.value, 'NoNewPrivs:\\t1' in pathlib.Path('/proc/self/status').read_text())"
    )
    assert run_python(code).split() == [str(int(signal.SIGTERM)), "True"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to drop")
def test_drop_capabilities_concerns_every_set() -> None:
    code = (
        "import subprocess; from hostimaged.system import syscalls\n"
        "from hostimaged.system.syscalls import Capability\n"
        "syscalls.drop_capabilities(frozenset({Capability.CHOWN, Capability.FOWNER}))\n"
        "print(sorted(syscalls.effective_capabilities()))\n"
        "print(open('/proc/self/status').read())\n"
        "print('CHILD', subprocess.run(['cat', '/proc/self/status'], capture_output=True).stdout.decode())"
    )
    first, *rest = run_python(code).splitlines()
    assert first == "[0, 3]"
    sets = [line.split()[1] for line in rest if line.startswith(("CapPrm", "CapEff", "CapBnd"))]
    assert sets == ["0000000000000009"] * 6
    assert [line.split()[1] for line in rest if line.startswith("CapAmb")] == ["0" * 16] * 2


def test_capability_numbers_match_the_kernel() -> None:
    assert max(Capability) <= int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert sorted(Capability) == list(range(41))


def test_freed_memory_is_kept() -> None:
    """Large buffers that come and go are new pages each time, or not."""
    program = (
        "import resource, sys\n"
        "from hostimaged.system.syscalls import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory(4 << 20, 32 << 20)\n"
        "def use():\n"
        "    for n in range(200): first, second = bytes(3_000_000 + n), bytearray(2_000_000)\n"
        "use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = [
        int(subprocess.check_output([sys.executable, "-c", program, how], env=python_environment()))
        for how in ("keep", "default")
    ]
    assert faults[0] < 1000
    assert faults[0] <= faults[1]
