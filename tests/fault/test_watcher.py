"""The watcher of the random kills finds what it is there to find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import pull
from hostimage_testing.watcher import watching
from hostimaged.composefs.repository import Repository
from hostimaged.ids import ObjectId
from hostimaged.system.paths import HostPaths

TREE = tars.directory(b"usr") + tars.file(b"usr/a", b"a" * 100) + tars.file(b"usr/b", b"b" * 5000) + tars.END


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(TREE)])
    host = scratch_host(tmp_path / "host")
    pull(host, f"oci:{layout.path}:v1")
    return host


def content(host: HostPaths, of: str) -> Path:
    """The object that the first name of a kind leads to; for layers, the first content."""
    with Repository.open(host.repository) as repository:
        if of == "images":
            return host.repository / "objects" / ObjectId.fromhex(repository.images()[0]).pathname
        name = next(name for name in repository.streams() if name.startswith(of))
        found = repository.has_stream(name)
        assert found is not None
        if of == "oci-layer-":
            with repository.open_stream(name) as stream:
                found = stream.object_refs[0]
        return host.repository / "objects" / found.pathname


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("of", ["oci-layer-", "oci-config-", "oci-manifest-", "images"])
def test_incomplete_content_is_found(host: HostPaths, damage: Callable[[Path], None], of: str) -> None:
    damage(content(host, of))
    with watching(host.repository) as report:
        pass
    assert report.rounds >= 1
    assert report.findings


def test_what_was_missing_for_a_while_is_found(host: HostPaths) -> None:
    victim = content(host, "oci-layer-")
    aside = victim.with_name("aside")
    with watching(host.repository) as report:
        report.wait()
        victim.rename(aside)
        report.wait()
        aside.rename(victim)
    assert any("object" in finding for finding in report.findings)


def test_dangling_names_are_found(host: HostPaths) -> None:
    (host.repository / "streams/refs/oci/dangling").symlink_to("../../oci-manifest-sha256:0")
    with watching(host.repository) as report:
        pass
    assert any("dangling" in finding for finding in report.findings)


def test_nothing_is_found_where_all_is_well(host: HostPaths, tmp_path: Path) -> None:
    for path in (host.repository, tmp_path / "nothing"):
        with watching(path) as report:
            report.wait(5)
        assert report.findings == []
        assert report.rounds >= 5
