"""Child processes that die with their parent and know nothing of its environment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from hostimaged.errors import ProgramMissing, from_os_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What a child may learn from our environment: where programs are, and how to reach the network.
_PASSED: Final = (
    "PATH",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_FALLBACK_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_program(program: str) -> str:
    """Absolute path of ``program`` on PATH; raises ``ProgramMissing``."""
    found = shutil.which(program, path=os.environ.get("PATH", _FALLBACK_PATH))
    if found is None:
        raise ProgramMissing("it is not found in PATH", program=program)
    return found


def cleaned_environment(private: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: PATH, the proxy variables, and ``private`` as home and place for temporary
    files.

    ``private`` is an existing directory of the child's own, so that no file of a user's home decides what a
    system service does.
    """
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment.setdefault("PATH", _FALLBACK_PATH)
    environment |= {"HOME": str(private), "TMPDIR": str(private), "LC_ALL": "C.UTF-8"}
    return environment | dict(extra or {})


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` with nothing on its standard input; the kernel kills it when the calling thread ends.

    PR_SET_PDEATHSIG counts the death of the *thread* that forked, so call this from a thread that lives as
    long as the child is wanted. It is set by setpriv(1) after the fork: code of ours between fork and exec
    would run in a process that may hold other threads' locks. Raises ``ProgramMissing`` when either program
    is not there.
    """
    command = [find_program("setpriv"), "--pdeathsig", "KILL", "--", find_program(argv[0]), *argv[1:]]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=dict(environment),
            pass_fds=pass_fds,
            cwd="/",
        )
    except OSError as error:
        raise from_os_error(error, f"starting {argv[0]}") from None


def stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """End ``process`` and reap it: SIGTERM, and SIGKILL where ``patience`` seconds were not enough."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def bytes_moved(pid: int) -> int | None:
    """Bytes that the program has read and written so far, by whatever way; None if that cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        facts = dict(line.split(": ", 1) for line in lines)
        return int(facts["rchar"]) + int(facts["wchar"])
    except (OSError, ValueError, KeyError):
        return None


def widen_pipe(fd: int, size: int) -> None:
    """Let the pipe ``fd`` hold ``size`` bytes, where the system allows it; a small one only costs time."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
