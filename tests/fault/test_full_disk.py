"""Pulls over the bus onto real file systems that are full, have no inode left, or turned read-only."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from hostimage_dbus.errors import ErrorName
from hostimage_testing import tars
from hostimage_testing.bus import Client, Daemon, connected, running_bus
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import check_whole
from hostimage_testing.tools import absent, require, run
from hostimaged.composefs.repository import Repository
from hostimaged.oci import images
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.root]

MIB = 1 << 20


@contextmanager
def mounted(target: Path, options: str) -> Iterator[None]:
    """A tmpfs at ``target``."""
    if os.geteuid() != 0:
        absent("mounting needs root")
    target.mkdir(parents=True, exist_ok=True)
    if run(require("mount"), "-t", "tmpfs", "-o", options, "none", target, check=False).code:
        absent("nothing can be mounted here")
    try:
        yield
    finally:
        run(require("umount"), target)


def remount(target: Path, options: str) -> None:
    run(require("mount"), "-o", f"remount,{options}", target)


class Scene:
    """A daemon whose physical root is a file system of its own."""

    def __init__(self, daemon: Daemon, client: Client, layout: Layout, host: HostPaths, judge: Judge) -> None:
        self.daemon = daemon
        self.client = client
        self.layout = layout
        self.host = host
        self._judge = judge

    async def pull(self, tag: str = "v1") -> list[str]:
        """State, error name and message of the job's end."""
        path = await self.client.pull(f"oci:{self.layout.path}:{tag}")
        end: list[str] = (await self.client.removed(path))[3:]
        return end

    async def refused(self, error: ErrorName) -> str:
        """A pull fails with ``error``, and nothing that has a name is incomplete; gives the message."""
        state, name, message = await self.pull()
        assert (state, name) == ("failed", error), message
        assert "\n" not in message
        with Repository.open(self.host.repository, lock_timeout=0) as repository:
            check_whole(repository)
            assert images.tags(repository) == {}
        self._judge.check(images=0)
        status = await self.client.status()
        assert status["images"] == []
        assert status["problems"] == []
        return message

    async def works(self) -> None:
        """A pull succeeds, and cfsctl agrees."""
        assert await self.pull() == ["done", "", ""]
        self._judge.check(images=1)
        (row,) = (await self.client.status())["images"]
        assert "problem" not in row


@pytest_asyncio.fixture
async def scene(tmp_path: Path, cfsctl: str, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    with running_bus(tmp_path) as bus:
        daemon = Daemon(bus, tmp_path / "root", scripted=False)
        with mounted(daemon.root / "sysroot", request.param):
            host = scratch_host(daemon.root)
            try:
                async with connected(bus) as client:
                    await daemon.start()
                    layout = Layout(tmp_path / "layout")
                    yield Scene(daemon, client, layout, host, Judge(cfsctl, host.repository))
            finally:
                daemon.clean_up()


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)
    assert os.statvfs(path).f_bavail == 0


def roomy(layout: Layout) -> None:
    """An image that is small when compressed, so that nobody can know beforehand how much it takes."""
    layers = [
        layout.layer(
            tars.directory(b"usr")
            + b"".join(
                tars.file(b"usr/%d-%d" % (layer, n), b"%016d" % (layer * 1000 + n) * 65536) for n in range(12)
            )
            + tars.END,
            "zstd",
        )
        for layer in range(2)
    ]
    assert sum(layer.descriptor["size"] for layer in layers) < MIB
    layout.image("v1", layers)


@pytest.mark.parametrize("scene", ["size=32m"], indirect=True)
async def test_full(scene: Scene) -> None:
    """24 MiB do not fit beside the file that takes most of 32."""
    roomy(scene.layout)
    filler = scene.host.physical_root / "filler"
    filler.write_bytes(bytes(20 * MIB))
    message = await scene.refused(ErrorName.NO_SPACE)
    assert "No space left on device" in message
    # Again, and now with nothing left at all: not even a directory can be made.
    fill(scene.host.physical_root / "more")
    await scene.refused(ErrorName.NO_SPACE)
    filler.unlink()
    (scene.host.physical_root / "more").unlink()
    await scene.works()


@pytest.mark.parametrize("scene", ["size=64m"], indirect=True)
async def test_full_for_helpers(scene: Scene) -> None:
    """An image that is large enough for helper processes: they are told the same, and tell it."""
    noise = os.urandom(10 * MIB)
    files = [tars.file(b"usr/noise%d" % n, noise[n * 10000 : (n + 1) * 10000]) for n in range(1000)]
    files += [tars.file(b"usr/%d" % n, b"%016d" % n * 65536) for n in range(20)]
    scene.layout.image("v1", [scene.layout.layer(tars.directory(b"usr") + b"".join(files) + tars.END)])
    filler = scene.host.physical_root / "filler"
    filler.write_bytes(bytes(44 * MIB))
    message = await scene.refused(ErrorName.NO_SPACE)
    assert "No space left on device" in message
    filler.unlink()
    await scene.works()


@pytest.mark.parametrize("scene", ["size=64m"], indirect=True)
async def test_too_large_to_begin_with(scene: Scene) -> None:
    """What cannot fit even compressed is not fetched."""
    tar = tars.directory(b"usr") + tars.file(b"usr/noise", os.urandom(8 * MIB)) + tars.END
    scene.layout.image("v1", [scene.layout.layer(tar, "none")])
    filler = scene.host.physical_root / "filler"
    filler.write_bytes(bytes(58 * MIB))
    message = await scene.refused(ErrorName.NO_SPACE)
    assert "needs at least" in message
    objects = list(scene.host.repository.glob("objects/*/*"))
    assert objects == []
    filler.unlink()
    await scene.works()


@pytest.mark.parametrize("scene", ["size=64m"], indirect=True)
async def test_what_is_to_stay_free(scene: Scene) -> None:
    """A pull that fits, and would leave less than the settings demand, fetches nothing."""
    tar = tars.directory(b"usr") + tars.file(b"usr/noise", os.urandom(8 * MIB)) + tars.END
    layer = scene.layout.layer(tar, "none")
    scene.layout.image("v1", [layer])
    scene.daemon.settings('verity = "opportunistic"\nminimum-free = 60\n')
    await scene.client.manager("Reload")
    message = await scene.refused(ErrorName.NO_SPACE)
    needed, free = (int(number) for number in re.findall(r"(?:least|where) (\d+)", message))
    assert layer.descriptor["size"] < needed < layer.descriptor["size"] + 4096
    assert 56 * MIB < free < 64 * MIB
    assert f"{60 * MIB} are to stay so (minimum-free)" in message
    assert list(scene.host.repository.glob("objects/*/*")) == []
    scene.daemon.settings('verity = "opportunistic"\nminimum-free = 40\n')
    await scene.client.manager("Reload")
    await scene.works()
    # What is there already takes nothing more.
    scene.daemon.settings('verity = "opportunistic"\nminimum-free = 63\n')
    await scene.client.manager("Reload")
    await scene.works()


@pytest.mark.parametrize("scene", ["size=64m,nr_inodes=2000"], indirect=True)
async def test_no_inode_left(scene: Scene) -> None:
    files = b"".join(tars.file(b"usr/%d" % n, b"%0100d" % n) for n in range(1200))
    scene.layout.image("v1", [scene.layout.layer(tars.directory(b"usr") + files + tars.END)])
    crowd = scene.host.physical_root / "crowd"
    crowd.mkdir()
    for n in range(1000):
        (crowd / str(n)).touch()
    message = await scene.refused(ErrorName.NO_SPACE)
    assert "No space left on device" in message
    for path in crowd.iterdir():
        path.unlink()
    await scene.works()


@pytest.mark.parametrize("scene", ["size=64m"], indirect=True)
async def test_read_only(scene: Scene) -> None:
    """Before the first pull, and with a repository."""
    roomy(scene.layout)
    root = scene.host.physical_root
    remount(root, "ro")
    state, name, _ = await scene.pull()
    assert (state, name) == ("failed", ErrorName.READ_ONLY)
    remount(root, "rw")
    await scene.works()
    tar = tars.directory(b"usr") + tars.file(b"usr/new", b"new" * 100) + tars.END
    scene.layout.image("v2", [scene.layout.layer(tar)])
    remount(root, "ro")
    state, name, _ = await scene.pull("v2")
    assert (state, name) == ("failed", ErrorName.READ_ONLY)
    assert len((await scene.client.status())["images"]) == 1
    remount(root, "rw")
    assert await scene.pull("v2") == ["done", "", ""]
