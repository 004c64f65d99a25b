"""The store of the host, made and used by the real podman without touching the machine."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.registry import Registry
from hostimage_testing.samples import BASE, copy, more, three_layers
from hostimage_testing.tools import require
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.errors import Cancelled, ImageNotFound
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.leftovers import leftovers, sweep
from hostimaged.oci.storage.podman import Podman
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts of its own need root"),
]


@pytest.fixture(autouse=True)
def podman_program() -> str:
    return require("podman")


@pytest.fixture
def host(tmp_path: Path, registry: Registry) -> HostPaths:
    paths = scratch_host(tmp_path / "host", registries=registry.registries_conf)
    Repository.ensure(paths.repository, verity=Verity.OPPORTUNISTIC, lock_timeout=1)[0].close()
    return paths


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def podman(host: HostPaths, work_dir: Path) -> Iterator[Podman]:
    owned.ensure(host, work_dir, lambda _point: None)
    with owned.podman(host, work_dir, lambda: None) as opened:
        yield opened


def test_r23_looking_creates_nothing(host: HostPaths) -> None:
    before = sorted(host.physical_root.rglob("*"))
    assert not owned.exists(host)
    assert owned.open_store(host) is None
    assert sorted(host.physical_root.rglob("*")) == before


def test_made_once_as_bootc_makes_it(host: HostPaths, work_dir: Path) -> None:
    points: list[str] = []
    mounts = Path("/proc/self/mountinfo").read_text()
    assert owned.ensure(host, work_dir, points.append)
    assert [point for point in points if point in owned.FAULT_POINTS] == [
        "store.directory", "store.initialized", "store.made", "store.link",
    ]  # fmt: skip
    assert os.readlink(host.physical_root / "ostree/bootc") == "../composefs/bootc"
    assert (host.physical_root / "ostree/bootc/storage/overlay-images").is_dir()
    # What podman will compare with: where it is told to work, not where that is.
    # podman 5 has another kind of database.
    places = [host.store / "libpod/bolt_state.db", host.store / "db.sql"]
    database = next(path.read_bytes() for path in places if path.exists())
    assert b"/run/bootc/storage" in database
    assert b"/proc/self/fd/3" in database
    assert os.fsencode(host.store) not in database
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not owned.ensure(host, work_dir, points.append)


def test_an_unfinished_one_is_no_store(host: HostPaths, work_dir: Path) -> None:
    def stop(point: str) -> None:
        if point == "store.initialized":
            raise Cancelled

    with pytest.raises(Cancelled):
        owned.ensure(host, work_dir, stop)
    assert not owned.exists(host)
    assert owned.ensure(host, work_dir, lambda _point: None)
    assert [path.name for path in host.store.parent.iterdir()] == ["storage"]


def test_labels_and_stamp(host: HostPaths, work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[bytes, bytes] = {}
    monkeypatch.setattr(os, "setxattr", lambda path, _name, value, **_: given.setdefault(path, value))
    owned.ensure(host, work_dir, lambda _point: None, lambda path, _mode: b"label of " + path)
    unfinished = os.fsencode(host.store.with_name("storage.tmp"))
    assert given[unfinished] == b"label of /var/lib/containers/storage"
    assert given[unfinished + b"/overlay/l"] == b"label of /var/lib/containers/storage/overlay/l"
    assert (host.store / ".bootc_labeled").exists()


def test_images_come_and_go(
    tmp_path: Path, host: HostPaths, podman: Podman, registry: Registry, skopeo: str
) -> None:
    layout = Layout(tmp_path / "layout")
    three_layers(layout)
    name = f"{registry.host}/owned:v1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    said: list[str] = []
    podman.run(["pull", name], said=said.append)
    assert any("Copying blob" in line for line in said)
    store = owned.open_store(host)
    assert store is not None
    with store:
        (image,) = store.images()
        assert image.names == (name,)
        assert all(image.layers().values())
        podman.tag(image.id, "localhost/other:1")
        podman.untag(image.id, name)
        (image,) = store.images()
        assert image.names == ("localhost/other:1",)
        podman.remove([image.id, "localhost/never:1"])
        assert store.images() == ()
        assert store.layers() == {}


def test_errors_are_those_of_sources(podman: Podman, registry: Registry) -> None:
    reference = ImageReference.parse(f"docker://{registry.host}/nothing:here")
    with pytest.raises(ImageNotFound, match="nothing:here"):
        podman.run(["pull", reference.name], reference=reference)


def test_r24_what_an_interrupted_pull_leaves_is_swept(
    tmp_path: Path, host: HostPaths, podman: Podman, registry: Registry, skopeo: str
) -> None:
    """Layers that no image has; those that one has stay."""
    layout = Layout(tmp_path / "layout")
    noise = random.Random(1).randbytes
    shared = layout.layer(BASE, "gzip")
    layout.image("kept", [shared, layout.layer(more(b"kept"), "none")])
    slow = tars.file(b"usr/large", noise(100 << 20)) + tars.END
    layout.image("left", [shared, layout.layer(more(b"left"), "gzip"), layout.layer(slow, "none")])
    names = {tag: f"{registry.host}/swept:{tag}" for tag in ("kept", "left")}
    for tag, name in names.items():
        copy(skopeo, f"oci:{layout.path}:{tag}", f"docker://{name}", "--preserve-digests")
    podman.run(["pull", names["kept"]])
    store = owned.open_store(host)
    assert store is not None
    with store:
        before = store.layer_facts().keys()

        def kill() -> None:
            if len(store.layer_facts()) > len(before):
                raise Cancelled

        with pytest.raises(Cancelled):
            podman.run(["pull", names["left"]], looked=kill)
        (chain,) = leftovers(store)
        assert len(chain.layers) in (2, 3)
        assert [image.names for image in store.images()] == [(names["kept"],)]
        assert sweep(store, podman) == 1
        assert store.layer_facts().keys() == before
        assert [image.names for image in store.images()] == [(names["kept"],)]
        assert all(image.complete for image in store.images())
        podman.run(["pull", names["left"]])
        assert leftovers(store) == []


def test_ends_when_the_job_does(host: HostPaths, work_dir: Path, podman: Podman) -> None:
    def stop() -> None:
        raise Cancelled

    podman.check = stop
    with pytest.raises(Cancelled):
        podman.run(["system", "service", "--time=0", f"unix://{work_dir}/socket"])
    # The leak check of every test sees that it is gone.
    assert owned.exists(host)
