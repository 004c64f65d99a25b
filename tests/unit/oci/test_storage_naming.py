"""Names of images in the store of the host, and what a pull copies and counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostimage_testing.host import scratch_host
from hostimaged.ids import ConfigDigest
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage.naming import name_in_store
from hostimaged.oci.storage.podman import LOCATION
from hostimaged.oci.storage.transfer import Copying, Count
from hostimaged.progress import Silent

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("docker://registry.example/os", "registry.example/os:latest"),
        ("docker://busybox", "docker.io/library/busybox:latest"),
        (f"docker://registry.example/os@{DIGEST}", f"registry.example/os@{DIGEST}"),
        ("containers-storage:localhost/built", "localhost/built:latest"),
        ("containers-storage:[overlay@/srv/store+/run/x]localhost/built:1", "localhost/built:1"),
        ("docker-daemon:os:1", "docker.io/library/os:1"),
    ],
)
def test_names_of_registries_and_stores_stay(reference: str, name: str) -> None:
    assert name_in_store(ImageReference.parse(reference)) == name


def test_names_of_files_are_names_and_differ() -> None:
    texts = [
        "oci:/srv/My Layout:v1",
        "oci:/srv/My Layout:v2",
        "oci:/other/My Layout:v1",
        "dir:/srv/!",
        "oci-archive:/srv/a.tar",
        "docker-archive:/srv/a.tar",
        "containers-storage:@" + "b" * 64,
    ]
    names = [name_in_store(ImageReference.parse(text)) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        # What podman takes for a name, unchanged.
        assert str(ImageReference.parse(f"docker://{name}").named) == name
    assert names[0].startswith("localhost/oci/my-layout:")


class Told(Silent):
    def __init__(self) -> None:
        self.bytes: list[int] = []

    def advance(self, count: int) -> None:
        self.bytes.append(count)


def test_bytes_are_counted_once_and_never_too_many(tmp_path: Path) -> None:
    told = Told()
    (tmp_path / "before").write_bytes(bytes(1000))
    count = Count({DIGEST: 100, "sha256:" + "b" * 64: 50}, tmp_path, told)
    count.look()
    assert told.bytes == []
    (tmp_path / "blob").write_bytes(bytes(60))
    count.look()
    count.line(f"Copying blob {'a' * 12} skipped: already exists")
    count.line("Copying blob sha256:" + "c" * 64)
    count.look()
    (tmp_path / "blob").unlink()
    count.look()
    count.component("sha256:" + "c" * 64, 5)
    count.component(DIGEST, 1 << 60)
    count.component(DIGEST, -5)
    count.finish()
    count.finish()
    assert sum(told.bytes) == 150
    assert told.bytes[0] == 60
    assert all(each > 0 for each in told.bytes)


@pytest.mark.parametrize(
    ("given", "copied"),
    [
        ("oci:{here}/link:v1", "oci:{here}/real:v1"),
        ("dir:{here}/real", "dir:{here}/real"),
        ("docker-daemon:example.org/os:v1", "docker-daemon:example.org/os:v1"),
    ],
)
def test_what_is_copied_is_named_without_links(tmp_path: Path, given: str, copied: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    ran: list[list[str]] = []
    podman: Any = SimpleNamespace(work_dir=tmp_path, run=lambda argv, **_: ran.append(argv))
    reference = ImageReference.parse(given.format(here=tmp_path.resolve()))
    config = ConfigDigest(DIGEST)
    copying = Copying.from_source(scratch_host(tmp_path / "host"), reference, config)
    assert copying.run(podman, "localhost/os:v1", {}, Silent()) == config.hex
    assert ran[0][-2:] == [copied.format(here=tmp_path.resolve()), f"{LOCATION}localhost/os:v1"]
