"""Child processes: they die with us, know nothing of us, and end when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hostimage_testing.processes import python_environment
from hostimaged.errors import ProgramMissing
from hostimaged.system.process import cleaned_environment, find_program, spawn, stop, widen_pipe

PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from hostimaged.system.process import cleaned_environment, spawn
child = spawn(["sleep", "1000"], environment=cleaned_environment(Path("/")))
# Only once the child is the program itself has the kernel been told.
while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\\n":
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(1000)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_child_dies_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=python_environment()
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("no_proxy", "localhost")
    environment = cleaned_environment(tmp_path, {"EXTRA": "1"})
    assert environment == {
        "PATH": os.environ["PATH"],
        "no_proxy": "localhost",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "LC_ALL": "C.UTF-8",
        "EXTRA": "1",
    } | {name: os.environ[name] for name in ("http_proxy", "https_proxy") if name in os.environ} | {
        name: os.environ[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") if name in os.environ
    }
    monkeypatch.delenv("PATH")
    assert "/usr/bin" in cleaned_environment(tmp_path)["PATH"]


def test_only_named_descriptors_are_passed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    try:
        with (tmp_path / "out").open("wb") as out:
            child = spawn(
                ["ls", "/proc/self/fd"],
                environment=cleaned_environment(tmp_path),
                pass_fds=[writer],
                stdout=out,
            )
            assert child.wait(10) == 0
    finally:
        os.close(reader)
        os.close(writer)
    found = set((tmp_path / "out").read_text().split())
    assert str(writer) in found
    assert len(found) == 5, "standard streams, the named one, and the directory being listed"


def test_stop_is_gentle_first(tmp_path: Path) -> None:
    child = spawn(["sleep", "1000"], environment=cleaned_environment(tmp_path))
    stop(child, 10)
    assert child.returncode == -signal.SIGTERM
    stop(child, 10)


def test_stop_insists(tmp_path: Path) -> None:
    script = "trap '' TERM; echo ready; while true; do sleep 0.05; done"
    reader, writer = os.pipe()
    child = spawn(["sh", "-c", script], environment=cleaned_environment(tmp_path), stdout=writer)
    os.close(writer)
    with os.fdopen(reader) as out:
        assert out.readline() == "ready\n"
    stop(child, 0.1)
    assert child.returncode == -signal.SIGKILL


def test_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProgramMissing, match="no-such-program is needed"):
        find_program("no-such-program")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match="setpriv is needed"):
        spawn(["true"], environment={})


def test_child_ends_with_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel counts the death of the starting thread: why ``spawn`` says which thread may call it."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        child = spawn(["sleep", "1000"], environment=cleaned_environment(tmp_path))
        while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        started.append(child)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert started[0].wait(10) == -signal.SIGKILL


def test_widen_pipe() -> None:
    reader, writer = os.pipe()
    try:
        widen_pipe(reader, 1 << 20)
        os.set_blocking(writer, False)
        assert os.write(writer, bytes(1 << 20)) > 1 << 16
        widen_pipe(reader, 1 << 40)
    finally:
        os.close(reader)
        os.close(writer)
    widen_pipe(reader, 1 << 20)
