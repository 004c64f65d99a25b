"""A real registry (Debian's docker-registry) on a loopback port of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.tools import require

_CONFIG = """\
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: 127.0.0.1:{port}}}
"""


#: Name and password, and the bcrypt hash of that.
CREDENTIALS = "somebody:secret"
_HASH = "$2b$04$8VxrD18GWvnYG8nS8uaf/ODTcAznBkrF/.1bdV8OIuZXzq9ufkHxO"


@dataclass(frozen=True)
class Registry:
    """A running registry; ``host`` is ``127.0.0.1:port``, ``registries_conf`` allows it over plain http."""

    host: str
    storage: Path
    registries_conf: str


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_registry(directory: Path, *, password: bool = False) -> Iterator[Registry]:
    """Start a registry that keeps its data in ``directory``; stopped at the end.

    With ``password`` it wants ``CREDENTIALS``.
    """
    program = require("docker-registry")
    port = free_port()
    storage = directory / "storage"
    storage.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yml"
    text = _CONFIG.format(storage=storage, port=port)
    if password:
        users = directory / "users"
        users.write_text(f"{CREDENTIALS.partition(':')[0]}:{_HASH}\n")
        text += f"auth: {{htpasswd: {{realm: tests, path: {users}}}}}\n"
    config.write_text(text)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        _wait_ready(port, process, directory / "log")
        host = f"127.0.0.1:{port}"
        yield Registry(host, storage, f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
    finally:
        process.terminate()
        process.wait(20)


def _wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            # It answers, and wants a password.
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"docker-registry did not start: {log.read_text()}") from None
            time.sleep(0.05)
