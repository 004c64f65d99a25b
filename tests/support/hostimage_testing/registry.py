"""A real registry (Debian's docker-registry) on a loopback port of its own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
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
http: {{addr: 127.0.0.1:{port}{tls}}}
"""


#: Name and password, and the bcrypt hash of that.
CREDENTIALS = "somebody:secret"
_HASH = "$2b$04$8VxrD18GWvnYG8nS8uaf/ODTcAznBkrF/.1bdV8OIuZXzq9ufkHxO"


@dataclass(frozen=True)
class Certificate:
    """A server's certificate and its key, as PEM; the certificate is its own authority."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Registry:
    """A running registry; ``host`` is ``127.0.0.1:port``, ``registries_conf`` allows it over plain http.

    ``certificates``: where it speaks TLS, the directory that skopeo is given for it.
    """

    host: str
    storage: Path
    registries_conf: str
    certificates: Path | None = None


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_registry(
    directory: Path, certificate: Certificate | None = None, *, password: bool = False
) -> Iterator[Registry]:
    """Start a registry that keeps its data in ``directory``; stopped at the end.

    It speaks TLS with ``certificate``, else plain http. With ``password`` it wants ``CREDENTIALS``.
    """
    program = require("docker-registry")
    port = free_port()
    storage = directory / "storage"
    storage.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yml"
    tls = certificates = None
    if certificate is not None:
        tls = f", tls: {{certificate: {certificate.certificate}, key: {certificate.key}}}"
        certificates = directory / "certificates"
        certificates.mkdir(exist_ok=True)
        shutil.copy(certificate.certificate, certificates / "ca.crt")
    text = _CONFIG.format(storage=storage, port=port, tls=tls or "")
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
        _wait_ready(port, process, directory / "log", certificate)
        host = f"127.0.0.1:{port}"
        insecure = "" if certificate else f'[[registry]]\nlocation = "{host}"\ninsecure = true\n'
        yield Registry(host, storage, insecure, certificates)
    finally:
        process.terminate()
        process.wait(20)


def _wait_ready(
    port: int, process: subprocess.Popen[bytes], log: Path, certificate: Certificate | None
) -> None:
    context = ssl.create_default_context(cafile=certificate.certificate) if certificate else None
    url = f"{'https' if certificate else 'http'}://127.0.0.1:{port}/v2/"
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=5, context=context).close()
            return
        except urllib.error.HTTPError:
            # It answers, and wants a password.
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"docker-registry did not start: {log.read_text()}") from None
            time.sleep(0.05)
