"""What deployments demand of the signatures of the image that they follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import installed, staged
from hostimage_testing.recorded import paths_of
from hostimaged.host.followed import demands_signature
from hostimaged.oci.reference import ImageReference

pytestmark = pytest.mark.interop

SIGNED = "ostree-image-signed:docker://registry.example/os:stable"


@pytest.fixture
def host(tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[2])


def demanded(host: RecordedHost, image: str = "docker://registry.example/os:stable") -> bool:
    return demands_signature(paths_of(host), ImageReference.parse(image))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (SIGNED, True),
        ("ostree-image-signed:registry:registry.example/os:stable", True),
        ("ostree-unverified-image:docker://registry.example/os:stable", False),
        ("ostree-remote-image:fedora:docker://registry.example/os:stable", False),
    ],
)
def test_the_origin_of_what_runs_says_it(host: RecordedHost, written: str, expected: bool) -> None:
    life = installed(host)
    host.write_origin(life.booted, reference=written)
    assert demanded(host) is expected
    assert not demanded(host, "docker://registry.example/os:other")
    # Whatever became of the repository.
    shutil.rmtree(host.repository)
    assert demanded(host) is expected


def test_what_is_staged_comes_first(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    host.write_origin(life.staged, reference=SIGNED)
    assert demanded(host)
    host.write_origin(life.staged, reference="ostree-unverified-image:docker://registry.example/other")
    host.write_origin(life.booted, reference=SIGNED)
    assert demanded(host)


def test_what_cannot_be_read_demands_nothing_and_stops_nobody(host: RecordedHost) -> None:
    assert not demanded(host)
    life = installed(host)
    host.origin(life.booted).write_bytes(b"\xff")
    assert not demanded(host)
