"""Pulls over the API of a podman that tells bytes, played by a double with the recorded events."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimage_testing import podman_double
from hostimage_testing.host import scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.registry import Registry
from hostimage_testing.samples import BASE, copy, more
from hostimage_testing.tools import require
from hostimage_testing.unified import fetch, import_fetched
from hostimaged.errors import Cancelled, HostimageError, ImageNotFound, NetworkError, StorageError
from hostimaged.oci.storage import owned
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="podman needs root"),
]


class Bytes(Silent):
    """Remembers the bytes that it is told of."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def advance(self, count: int) -> None:
        self.told.append(count)


@pytest.fixture
def image(tmp_path: Path, registry: Registry, skopeo: str) -> tuple[str, dict[str, int]]:
    """Its name, and the blobs that its layers are."""
    layout = Layout(tmp_path / "layout")
    layers = [layout.layer(data, "gzip") for data in (BASE, more(b"one", 300_000), more(b"two", 900_000))]
    layout.image("v1", layers)
    name = f"{registry.host}/api{os.getpid()}:v1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    return name, {layer.descriptor["digest"]: layer.descriptor["size"] for layer in layers}


@pytest.fixture
def host(tmp_path: Path, registry: Registry) -> HostPaths:
    return scratch_host(tmp_path / "host", registries=registry.registries_conf)


def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **script: object) -> None:
    directory = podman_double.install(tmp_path / "bin", require("podman"), **script)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_r26_bytes_as_podman_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: HostPaths, image: tuple[str, dict[str, int]]
) -> None:
    name, blobs = image
    play(monkeypatch, tmp_path, blobs=blobs)
    reporter = Bytes()
    fetched = fetch(host, f"docker://{name}", reporter)
    config = fetched.bytes_total - sum(blobs.values())
    expected = [config]
    for size in blobs.values():
        expected += [size // 2, size - size // 2]
    assert reporter.told == expected
    assert import_fetched(host, fetched).changed


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        ({"error": "initializing source docker://x: manifest unknown"}, ImageNotFound, "manifest unknown"),
        ({"error": "pinging container registry: connection refused"}, NetworkError, "refused"),
        ({"silent": True}, HostimageError, None),
        ({"garbage": True}, StorageError, "no JSON"),
    ],
)
def test_what_goes_wrong_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: HostPaths,
    image: tuple[str, dict[str, int]],
    script: dict[str, object],
    error: type[HostimageError],
    text: str | None,
) -> None:
    play(monkeypatch, tmp_path, **script)
    with pytest.raises(error, match=text):
        fetch(host, f"docker://{image[0]}")
    store = owned.open_store(host)
    assert store is not None
    with store:
        assert store.images() == ()


def test_cancelled_while_podman_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: HostPaths, image: tuple[str, dict[str, int]]
) -> None:
    """The service is gone then, which the check for leaks of every test sees."""

    class Impatient(Bytes):
        def at(self, point: str) -> None:
            if len(self.told) > 1:
                raise Cancelled

    play(monkeypatch, tmp_path, blobs=image[1])
    with pytest.raises(Cancelled):
        fetch(host, f"docker://{image[0]}", Impatient())
