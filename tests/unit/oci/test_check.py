"""Checking an image: what is told, and that nothing on the host changes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layer, Layout
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.errors import Cancelled, ImageNotFound, SignatureRejected
from hostimaged.oci import images
from hostimaged.oci.check import FAULT_POINTS, CheckResult, check_image
from hostimaged.oci.pull import pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

CREATED = "2024-05-06T07:08:09.123456789Z"
CREATED_USEC = 1_714_979_289_123_456


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "root")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def layer(layout: Layout, name: bytes, size: int = 50_000) -> Layer:
    return layout.layer(tars.directory(b"usr") + tars.file(b"usr/" + name, name * size) + tars.END)


def image(layout: Layout, *layers: Layer, **extra: Any) -> dict[str, Any]:
    extra.setdefault("config_extra", {"created": CREATED})
    return layout.image("v1", list(layers), labels={"org.opencontainers.image.version": "1.0"}, **extra)


def reference(layout: Layout) -> ImageReference:
    return ImageReference.parse(f"oci:{layout.path}:v1")


def check(host: HostPaths, layout: Layout) -> CheckResult:
    return check_image(host, reference(layout), Silent())


def pull(host: HostPaths, layout: Layout) -> None:
    pull_image(
        host,
        reference(layout),
        expect_digest=None,
        verity=Verity.OPPORTUNISTIC,
        lock_timeout=5,
        reporter=Silent(),
    )


def everything(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below ``root``, with what a write would change."""
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def test_an_image_that_is_not_here(host: HostPaths, layout: Layout) -> None:
    one, two = layer(layout, b"one"), layer(layout, b"two")
    descriptor = image(layout, one, two)
    before = everything(host.physical_root)
    found = check(host, layout)
    assert everything(host.physical_root) == before, "no repository is made, and nothing is written"
    total = one.descriptor["size"] + two.descriptor["size"]
    assert found.as_dict() == {
        "reference": str(reference(layout)),
        "manifest-digest": descriptor["digest"],
        "source-digest": descriptor["digest"],
        "version": "1.0",
        "timestamp": CREATED_USEC,
        "total-size": found.total_size,
        "download-size": found.total_size,
        "state": "available",
    }
    assert 0 < found.total_size - total < 2000, "the configuration is part of it"
    assert not list(host.run_dir.glob("tmp/*"))


def test_the_page_of_what_changed(host: HostPaths, layout: Layout) -> None:
    page = "https://os.example/changes?v=1.0"
    layout.image("v1", [layer(layout, b"one")], labels={"changelog-url": page})
    assert check(host, layout).as_dict()["changelog-url"] == page


def test_an_image_that_is_here(host: HostPaths, layout: Layout) -> None:
    image(layout, layer(layout, b"one"))
    pull(host, layout)
    before = everything(host.physical_root)
    found = check(host, layout)
    assert (found.download_size, found.downloaded) == (0, True)
    assert everything(host.physical_root) == before


def test_only_the_layers_that_are_missing_count(host: HostPaths, layout: Layout) -> None:
    base = layer(layout, b"base")
    image(layout, base)
    pull(host, layout)
    new = layer(layout, b"new")
    image(layout, base, new, new)
    found = check(host, layout)
    assert not found.downloaded
    config = found.total_size - base.descriptor["size"] - new.descriptor["size"]
    assert found.download_size == new.descriptor["size"] + config


def test_a_layer_whose_objects_are_gone_is_missing(host: HostPaths, layout: Layout) -> None:
    base = layer(layout, b"base")
    image(layout, base)
    pull(host, layout)
    for directory in (host.repository / "objects").iterdir():
        for path in directory.iterdir():
            if path.stat().st_size >= 200_000:
                path.unlink()
    found = check(host, layout)
    assert (found.download_size, found.downloaded) == (base.descriptor["size"], False)


def test_a_repository_that_cannot_be_opened_does_not_keep_from_looking(
    host: HostPaths, layout: Layout
) -> None:
    image(layout, layer(layout, b"one"))
    pull(host, layout)
    (host.repository / "meta.json").write_text("nonsense")
    found = check(host, layout)
    assert (found.download_size, found.downloaded) == (found.total_size, False)


def config_object(host: HostPaths) -> Path:
    """The file with the only configuration."""
    with Repository.open(host.repository) as repository:
        [digest] = images.tags(repository).values()
        name = images.config_stream(images.open_image(repository, digest).config_digest)
        with repository.open_stream(name) as stream:
            [content] = stream.object_refs
    return host.repository / "objects" / content.pathname


def remove_objects(host: HostPaths, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(host.repository / "objects")


def replace_directories(host: HostPaths, _: pytest.MonkeyPatch) -> None:
    for path in (host.repository / "objects").iterdir():
        shutil.rmtree(path)
        path.write_bytes(b"")


def cut_streams(host: HostPaths, _: pytest.MonkeyPatch) -> None:
    for path in (host.repository / "streams").glob("oci-*"):
        os.truncate(path, 10)


def fail_reads(_: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object is on a bad part of the disk."""
    real = os.open

    def failing(path: Any, *args: Any, **options: Any) -> int:
        if len(os.fspath(path)) == 126:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", failing)


@pytest.mark.parametrize("damage", [remove_objects, replace_directories, cut_streams, fail_reads])
def test_what_cannot_be_read_counts_as_missing(
    host: HostPaths,
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[HostPaths, pytest.MonkeyPatch], None],
) -> None:
    image(layout, layer(layout, b"one"))
    pull(host, layout)
    assert check(host, layout).downloaded
    damage(host, monkeypatch)
    found = check(host, layout)
    assert (found.download_size, found.downloaded) == (found.total_size, False)


@pytest.mark.parametrize("size", [10, 1 << 30], ids=["cut short", "too large"])
def test_a_damaged_configuration_is_fetched(host: HostPaths, layout: Layout, size: int) -> None:
    base = layer(layout, b"one")
    image(layout, base)
    pull(host, layout)
    os.truncate(config_object(host), size)
    found = check(host, layout)
    assert found.download_size == found.total_size - base.descriptor["size"]
    assert not found.downloaded
    assert found.version == "1.0"


def test_an_artifact(host: HostPaths, layout: Layout) -> None:
    blob = layout.blob(b"data", "application/x-data")
    config = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    image(layout, manifest_extra={"config": config, "layers": [blob]})
    found = check(host, layout)
    assert (found.timestamp, found.download_size) == (0, 6)


@pytest.mark.parametrize(
    ("created", "usec"),
    [
        ("2024-05-06T07:08:09+02:00", CREATED_USEC - 123_456 - 7200 * 1_000_000),
        ("2024-05-06T07:08:09", 0),
        ("1960-01-01T00:00:00Z", 0),
        ("2300-01-01T00:00:00Z", 0),
        ("9999-12-31T23:59:59Z", 0),
        ("0001-01-01T00:00:00+14:00", 0),
        ("yesterday", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_times(host: HostPaths, layout: Layout, created: str | None, usec: int) -> None:
    image(layout, layer(layout, b"one"), config_extra={"created": created})
    assert check(host, layout).timestamp == usec


def test_what_is_not_there_or_not_allowed(host: HostPaths, layout: Layout) -> None:
    with pytest.raises(ImageNotFound):
        check(host, layout)
    image(layout, layer(layout, b"one"))
    host.containers.policy.write_text('{"default": [{"type": "reject"}]}')
    with pytest.raises(SignatureRejected):
        check(host, layout)


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_it_can_be_stopped(host: HostPaths, layout: Layout, point: str) -> None:
    class Stopping(Silent):
        def at(self, reached: str) -> None:
            if reached == point:
                raise Cancelled

    image(layout, layer(layout, b"one"))
    with pytest.raises(Cancelled):
        check_image(host, reference(layout), Stopping())
    assert not list(host.run_dir.glob("tmp/*"))
