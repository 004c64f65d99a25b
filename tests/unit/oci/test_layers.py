"""Planning layers, and what happens when one of several fails."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, DigestMismatch, NetworkError, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.layers import (
    LayerPlan,
    StoppableReporter,
    fetch_layers,
    plan_layers,
    stored_layer,
)
from hostimaged.oci.models import CONFIG_TYPE, Descriptor, ImageConfig, Manifest
from hostimaged.oci.source import verified
from hostimaged.progress import Silent

TAR = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(tmp_path / "repository", verity=Verity.OPPORTUNISTIC)
    with made:
        yield made


def descriptor(data: bytes, media_type: str = TAR, size: int | None = None) -> Descriptor:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    size = len(data) if size is None else size
    return Descriptor.model_validate({"mediaType": media_type, "digest": digest, "size": size})


def manifest(*layers: Descriptor, config_type: str = CONFIG_TYPE) -> Manifest:
    config = descriptor(b"config", config_type)
    return Manifest.model_validate({"schemaVersion": 2, "config": config, "layers": layers})


def config(*diff_ids: str) -> ImageConfig:
    return ImageConfig.model_validate({"rootfs": {"type": "layers", "diff_ids": diff_ids}})


def plan(data: bytes, media_type: str = TAR, kind: ContentType = ContentType.LAYER) -> LayerPlan:
    described = descriptor(data, media_type)
    return LayerPlan(described, described.as_digest(DiffId), kind)


def test_plan_of_an_image() -> None:
    one, two = descriptor(b"1", TAR + "+gzip"), descriptor(b"2", TAR + "+zstd")
    ids = ["sha256:" + "1" * 64, "sha256:" + "2" * 64]
    plans = plan_layers(manifest(one, two), config(*ids))
    assert [(p.descriptor, str(p.id), p.content_type) for p in plans] == [
        (one, ids[0], ContentType.LAYER),
        (two, ids[1], ContentType.LAYER),
    ]
    assert plans[0].stream == f"oci-layer-{ids[0]}"


def test_plan_refuses_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedImage, match="has 1 layers, the image configuration 0"):
        plan_layers(manifest(descriptor(b"1")), config())
    with pytest.raises(UnsupportedImage, match="text/plain"):
        plan_layers(manifest(descriptor(b"1", "text/plain")), config("sha256:" + "1" * 64))


def test_plan_of_an_artifact() -> None:
    """A stream's name is the digest of its content: only what is not compressed is split like a layer."""
    blobs = [descriptor(b"1", "text/plain"), descriptor(b"2", TAR + "+gzip"), descriptor(b"3", TAR)]
    plans = plan_layers(manifest(*blobs, config_type="x/y"), None)
    assert [p.content_type for p in plans] == [ContentType.BLOB, ContentType.BLOB, ContentType.LAYER]
    assert [str(p.id) for p in plans] == [blob.digest for blob in blobs]


def test_blob_with_the_digest_of_the_tar_is_the_tar() -> None:
    blob = descriptor(b"1", TAR + "+gzip")
    [same] = plan_layers(manifest(blob), config(blob.digest))
    [other] = plan_layers(manifest(blob), config("sha256:" + "1" * 64))
    assert (same.media_type, other.media_type) == (TAR, TAR + "+gzip")


class Source:
    """Gives blobs that are in memory; ``hooks`` run in the middle of a blob."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {descriptor(blob).digest: blob for blob in blobs}
        self.hooks: dict[str, Any] = {}
        self.opened: list[str] = []
        self.closed: list[str] = []

    @contextmanager
    def blob(self, wanted: Descriptor) -> Iterator[Iterator[bytes]]:
        self.opened.append(wanted.digest)
        try:
            yield verified(self._chunks(wanted.digest), wanted, "layer")
        finally:
            self.closed.append(wanted.digest)

    def _chunks(self, digest: str) -> Iterator[bytes]:
        data = self.blobs[digest]
        yield data[:512]
        if digest in self.hooks:
            self.hooks[digest]()
        yield data[512:]


def layer(name: bytes, size: int = 1000) -> bytes:
    return tars.file(name, name * (size // len(name))) + tars.END


def test_fetch(repository: Repository) -> None:
    tar_layers = [layer(b"a", 5000), layer(b"b", 100_000)]
    blob = b"some blob"
    source = Source(*tar_layers, blob)
    plans = [*map(plan, tar_layers), plan(blob, "text/plain", ContentType.BLOB)]
    assert [stored_layer(repository, p) for p in plans] == [None] * 3
    found = fetch_layers(repository, source, plans, StoppableReporter(Silent()))  # type: ignore[arg-type]
    assert found == {p.id: stored_layer(repository, p) for p in plans}
    assert source.opened[0] == plans[1].descriptor.digest, "the largest first"
    assert sorted(source.closed) == sorted(source.opened)
    with repository.open_stream(plans[2].stream, expected=ContentType.BLOB) as stream:
        [content] = stream.object_refs
        assert stream.size == len(blob)
    assert repository.read_object(content, 100) == blob


def test_fetch_nothing(repository: Repository) -> None:
    assert fetch_layers(repository, Source(), [], StoppableReporter(Silent())) == {}  # type: ignore[arg-type]


def test_stored_layer_with_a_missing_object_is_fetched_again(repository: Repository) -> None:
    data = layer(b"a")
    wanted = plan(data)
    fetch_layers(repository, Source(data), [wanted], StoppableReporter(Silent()))  # type: ignore[arg-type]
    with repository.open_stream(wanted.stream) as stream:
        [content] = stream.object_refs
    (repository.path / "objects" / content.pathname).unlink()
    assert stored_layer(repository, wanted) is None
    fetch_layers(repository, Source(data), [wanted], StoppableReporter(Silent()))  # type: ignore[arg-type]
    assert stored_layer(repository, wanted) is not None


def test_stream_of_another_kind_is_no_layer(repository: Repository) -> None:
    data = layer(b"a")
    as_blob = plan(data, "text/plain", ContentType.BLOB)
    fetch_layers(repository, Source(data), [as_blob], StoppableReporter(Silent()))  # type: ignore[arg-type]
    assert stored_layer(repository, as_blob) is not None
    assert stored_layer(repository, plan(data)) is None


def test_first_error_stops_the_rest(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in the middle of its layer ends at its next named point."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    datas = [layer(bytes([letter]), 4000 - letter) for letter in b"abcd"]
    source = Source(*datas)
    plans = [plan(data) for data in datas]
    stopped = threading.Event()

    class Watching(StoppableReporter):
        def stop(self) -> None:
            super().stop()
            stopped.set()

    def fail() -> None:
        raise NetworkError("the cable is out")

    def wait() -> None:
        assert stopped.wait(10)

    source.hooks = {plans[0].descriptor.digest: fail, plans[1].descriptor.digest: wait}
    with pytest.raises(NetworkError, match="the cable is out"):
        fetch_layers(repository, source, plans, Watching(Silent()))  # type: ignore[arg-type]
    assert sorted(source.closed) == sorted(source.opened)
    assert repository.has_stream(plans[1].stream) is None, "the other one was stopped before its name"


@pytest.mark.parametrize("offset", [600, -1], ids=["content", "after the end marker"])
@pytest.mark.parametrize("media_type", [TAR, TAR + "+gzip"])
def test_a_bare_tar_with_flipped_bits_gets_no_name(
    repository: Repository, media_type: str, offset: int
) -> None:
    """Its digest is computed once, by the source: a difference in the very last byte counts all the same."""
    data = layer(b"a", 5000)
    wrong = bytearray(data)
    wrong[offset] ^= 1
    wanted = plan(data, media_type)
    source = Source()
    source.blobs[wanted.descriptor.digest] = bytes(wrong)
    with pytest.raises(DigestMismatch):
        fetch_layers(repository, source, [wanted], StoppableReporter(Silent()))  # type: ignore[arg-type]
    assert repository.streams() == []


def test_a_compressed_layer_with_a_lying_diff_id_gets_no_name(repository: Repository) -> None:
    data = gzip.compress(layer(b"a", 5000))
    wanted = LayerPlan(descriptor(data, TAR + "+gzip"), DiffId("sha256:" + "1" * 64), ContentType.LAYER)
    with pytest.raises(DigestMismatch):
        fetch_layers(repository, Source(data), [wanted], StoppableReporter(Silent()))  # type: ignore[arg-type]
    assert repository.streams() == []


def test_stoppable_reporter() -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.noted: list[str] = []

        def at(self, point: str) -> None:
            self.noted.append(point)

        def message(self, text: str) -> None:
            self.noted.append(text)

    noting = Noting()
    reporter = StoppableReporter(noting)
    reporter.at("one")
    reporter.message("two")
    reporter.stop()
    with pytest.raises(Cancelled):
        reporter.at("three")
    assert noting.noted == ["one", "two"]
