"""Pulls whose helper processes fail or die: the error has its class, and nothing unfinished has a name."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.disk import EXPECTED
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.processes import Process, descendants
from hostimage_testing.pulling import check_nothing_named, pull
from hostimaged.composefs.repository import store_pool
from hostimaged.errors import StorageError
from hostimaged.oci import layers
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

#: What a helper runs before its own program: its change ``HELPER_AT`` of the file system fails.
_FAILING = """
import os
left = int(os.environ["HELPER_AT"])
def failing(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            code = int(os.environ["HELPER_ERRNO"])
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)
    return call
for name in ("write", "link", "mkdir"):
    setattr(os, name, failing(getattr(os, name)))
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Contents for both kinds of requests, many more than a helper is sent at once."""
    small = [tars.file(b"usr/%d" % n, b"%d " % n * 100) for n in range(600)]
    large = tars.file(b"usr/large", b"0123456789abcdef" * 200_000)
    layout = Layout(tmp_path / "layout")
    layers = [layout.layer(tars.directory(b"usr") + b"".join(small) + large + tars.END, "zstd")]
    layers.append(layout.layer(tars.file(b"usr/huge", bytes(5_000_000)) + tars.END, "gzip"))
    layout.image("v1", layers)
    return layout


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostPaths]:
    """Pulls into it have one helper; none is left afterwards, and no descriptor."""
    monkeypatch.setattr(layers, "_WORTH_HELPERS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    before = sorted(os.listdir("/proc/self/fd"))
    yield scratch_host(tmp_path / "host")
    assert helpers() == []
    assert sorted(os.listdir("/proc/self/fd")) == before


def helpers() -> list[Process]:
    return [process for process in descendants(os.getpid()) if "store_helper" in process.command]


def check_repaired(host: HostPaths, cfsctl: str, layout: Layout) -> None:
    """Nothing has a name; the next pull completes it, and cfsctl agrees."""
    check_nothing_named(host, *_diff_ids(layout))
    pull(host, f"oci:{layout.path}:v1")
    Judge(cfsctl, host.repository).check(images=1)


def _diff_ids(layout: Layout) -> list[str]:
    (entry,) = layout.manifests
    manifest = json.loads(layout.blob_path(entry["digest"]).read_text())
    config = json.loads(layout.blob_path(manifest["config"]["digest"]).read_text())
    found: list[str] = config["rootfs"]["diff_ids"]
    return found


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("at", [0, 1, 2, 50, 300])
def test_a_disk_that_fails_in_a_helper(
    host: HostPaths, layout: Layout, cfsctl: str, monkeypatch: pytest.MonkeyPatch, code: int, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_pool, "_PROGRAM", _FAILING + store_pool._PROGRAM)
        patch.setenv("HELPER_AT", str(at))
        patch.setenv("HELPER_ERRNO", str(code))
        with pytest.raises(EXPECTED[code]) as raised:
            pull(host, f"oci:{layout.path}:v1")
    assert type(raised.value) is EXPECTED[code]
    assert raised.value.message == f"cannot write an object of the repository: {os.strerror(code)}"
    check_repaired(host, cfsctl, layout)


class KillsHelper(Silent):
    """Kills the helper when the pull comes to ``point`` for the nth time."""

    def __init__(self, point: str, count: int) -> None:
        self._point = point
        self.left = count

    def at(self, point: str) -> None:
        if point != self._point:
            return
        self.left -= 1
        if self.left == 0:
            (helper,) = helpers()
            os.kill(helper.pid, signal.SIGKILL)


@pytest.mark.parametrize(("point", "count"), [("layer.read", 1), ("layer.store", 1), ("layer.store", 5)])
def test_a_helper_that_dies(host: HostPaths, layout: Layout, cfsctl: str, point: str, count: int) -> None:
    killer = KillsHelper(point, count)
    with pytest.raises(StorageError, match=r"^a helper process that stores objects ended unexpectedly$"):
        pull(host, f"oci:{layout.path}:v1", reporter=killer)
    assert killer.left <= 0
    check_repaired(host, cfsctl, layout)


def test_without_helpers_where_none_can_be_started(
    host: HostPaths, layout: Layout, cfsctl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/nonexistent")
        pull(host, f"oci:{layout.path}:v1")
    Judge(cfsctl, host.repository).check(images=1)
