"""Fixtures of the tests with the real tools."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.tools import run
from hostimaged.system.paths import HostPaths


@pytest.fixture
def signing_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A GPG key made for the test: its fingerprint and the file of its public half."""
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "test@example.com", "rsa2048", "sign")
    listing = run("gpg", "--list-keys", "--with-colons").out
    fingerprint = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr"))
    public = tmp_path / "key.gpg"
    public.write_text(run("gpg", "--armor", "--export", fingerprint).out)
    yield fingerprint, public
    subprocess.run(["gpgconf", "--kill", "gpg-agent"], check=False)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "host")


@pytest.fixture
def judge(cfsctl: str, host: HostPaths) -> Judge:
    return Judge(cfsctl, host.repository)
