"""Pulls from a registry that fails in every way: the right error in bounded time, or a success after all."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import pulling, tars
from hostimage_testing.faulty_registry import Fault, FaultyRegistry, Then
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import CONFIG_TYPE, INDEX_TYPE, Layer, Layout
from hostimage_testing.pulling import check_nothing_named
from hostimaged.errors import (
    Cancelled,
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    NetworkError,
    NoSpace,
    RegistryAuth,
    Unavailable,
    UnsupportedImage,
)
from hostimaged.oci.pull import PullResult
from hostimaged.oci.source import Patience
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

#: As patient as the default in kind, not in seconds.
QUICK = Patience(silence=2, pause=0.05)
#: The longest that anything here may take: tries times silence, what skopeo itself waits, and a busy machine.
BOUND = 45.0
BIG = hashlib.sha256(b"big").digest() * 100_000
MANIFESTS, BLOB, CONFIG = "/manifests/", "the large layer", "the configuration"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def layers(layout: Layout) -> list[Layer]:
    """A large layer, and a small one."""
    made = [
        layout.layer(tars.directory(b"usr") + tars.file(b"usr/big", BIG) + tars.END, "none"),
        layout.layer(tars.file(b"usr/small", b"small" * 50) + tars.END, "gzip"),
    ]
    layout.image("v1", made)
    return made


@pytest.fixture
def registry(layout: Layout, layers: list[Layer]) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(layout) as running:
        yield running


@pytest.fixture
def host(tmp_path: Path, registry: FaultyRegistry, skopeo: str) -> HostPaths:
    return scratch_host(tmp_path / "host", registries=registry.registries_conf)


@pytest.fixture
def judge(cfsctl: str, host: HostPaths) -> Judge:
    return Judge(cfsctl, host.repository)


class Listener(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.advanced = self.total = 0

    def message(self, text: str) -> None:
        self.messages.append(text)

    def totals(self, total: int, cached: int) -> None:
        self.total = total

    def advance(self, count: int) -> None:
        self.advanced += count

    @property
    def retries(self) -> list[str]:
        return [text for text in self.messages if "trying again" in text]


def pull(host: HostPaths, registry: FaultyRegistry, **options: Any) -> PullResult:
    return pulling.pull(host, f"docker://{registry.host}/test/os:v1", **({"patience": QUICK} | options))


def path_of(what: str, layers: list[Layer], layout: Layout) -> str:
    """The part of a request's path that ``what`` stands for."""
    if what == BLOB:
        return str(layers[0].descriptor["digest"])
    if what == CONFIG:
        manifest = json.loads(layout.blob_path(layout.manifests[0]["digest"]).read_bytes())
        return str(manifest["config"]["digest"])
    return what


GARBAGE = {
    "no text": b"\x00\xff\x00garbage",
    "half of it": b'{"schemaVersion":2,"layers":[{"digest":"sha256:0',
    "nothing": b"",
    "another type": b'{"schemaVersion":2,"config":[],"layers":{"a":1}}',
    "a web page": b"<!doctype html><title>Log in</title>",
    "too much": b'{"schemaVersion":2,"x":"' + b"x" * (5 << 20) + b'"}',
}
BASIC = {"WWW_Authenticate": 'Basic realm="test"'}

#: Whoever asks again gets the same.
FINAL: dict[str, tuple[str, Fault, type[HostimageError]]] = {
    "no such image": (MANIFESTS, Fault.refusing(404, "MANIFEST_UNKNOWN"), ImageNotFound),
    "image for others": (MANIFESTS, Fault.refusing(401, "UNAUTHORIZED", **BASIC), RegistryAuth),
    "image denied": (MANIFESTS, Fault.refusing(403, "DENIED"), RegistryAuth),
    "not implemented": (MANIFESTS, Fault.refusing(501), NetworkError),
    "endless manifest": (MANIFESTS, Fault(declared=-1, after=5, then=Then.ENDLESS), UnsupportedImage),
    "empty list": (
        MANIFESTS,
        Fault(body=b'{"schemaVersion":2,"manifests":[]}', headers={"Content-Type": INDEX_TYPE}),
        ImageNotFound,
    ),
    "list that is none": (
        MANIFESTS,
        Fault(body=b'{"manifests":"x"}', headers={"Content-Type": INDEX_TYPE}),
        UnsupportedImage,
    ),
    **{
        f"manifest: {name}": (MANIFESTS, Fault(body=body), UnsupportedImage) for name, body in GARBAGE.items()
    },
    "no such configuration": (CONFIG, Fault.refusing(404, "BLOB_UNKNOWN"), ImageNotFound),
    "another configuration": (CONFIG, Fault(body=b"{}"), DigestMismatch),
    "endless configuration": (CONFIG, Fault(declared=-1, after=5, then=Then.ENDLESS), DigestMismatch),
    "no such layer": (BLOB, Fault.refusing(404, "BLOB_UNKNOWN"), ImageNotFound),
    "layer for others": (BLOB, Fault.refusing(401, "UNAUTHORIZED", **BASIC), RegistryAuth),
    "layer denied": (BLOB, Fault.refusing(403, "DENIED"), RegistryAuth),
    "other bytes": (BLOB, Fault(body=bytes(len(BIG) + 2048)), DigestMismatch),
    "too few bytes": (BLOB, Fault(body=BIG[:1000]), DigestMismatch),
    "no bytes": (BLOB, Fault(body=b""), DigestMismatch),
    "too many bytes": (BLOB, Fault(body=BIG * 2), DigestMismatch),
    "endless bytes": (BLOB, Fault(declared=-1, after=100_000, then=Then.ENDLESS), DigestMismatch),
    "length too short": (BLOB, Fault(declared=100_000, after=100_000, then=Then.CLOSE), DigestMismatch),
    "redirected in a circle": (BLOB, Fault(status=302, headers={"Location": "/v2/x/blobs/y"}), ImageNotFound),
}

#: It may be better the next time.
PASSING: dict[str, tuple[str, Fault]] = {
    "connection reset before the manifest": (MANIFESTS, Fault(after=0)),
    "connection closed before the manifest": (MANIFESTS, Fault(after=0, then=Then.CLOSE)),
    "connection reset in the manifest": (MANIFESTS, Fault(after=20)),
    "busy": (MANIFESTS, Fault.refusing(503)),
    "gateway timed out": (MANIFESTS, Fault.refusing(504, "UNAVAILABLE")),
    "broken server": ("/v2/$", Fault.refusing(500)),
    "too many requests": (MANIFESTS, Fault.refusing(429, "TOOMANYREQUESTS", Retry_After="0")),
    "silence": (MANIFESTS, Fault(silent=True)),
    "stalled manifest": (MANIFESTS, Fault(after=20, then=Then.STALL)),
    "trickling manifest": (MANIFESTS, Fault(after=20, then=Then.TRICKLE)),
    "configuration cut": (CONFIG, Fault(after=20, then=Then.CLOSE)),
    "configuration unavailable": (CONFIG, Fault.refusing(503)),
    "configuration stalled": (CONFIG, Fault(after=20, then=Then.STALL)),
    "layer reset": (BLOB, Fault(after=1_000_000)),
    "layer closed": (BLOB, Fault(after=1_000_000, then=Then.CLOSE)),
    "layer reset at once": (BLOB, Fault(after=0)),
    "length too long": (BLOB, Fault(declared=10_000_000, after=3_000_000, then=Then.CLOSE)),
    "layer unavailable": (BLOB, Fault.refusing(503)),
    "bad gateway": (BLOB, Fault.refusing(502)),
    "too many requests for a layer": (BLOB, Fault.refusing(429, "TOOMANYREQUESTS", Retry_After="0")),
    "layer met with silence": (BLOB, Fault(silent=True)),
    "layer stalls": (BLOB, Fault(after=1_000_000, then=Then.STALL)),
    "layer trickles": (BLOB, Fault(after=1_000_000, then=Then.TRICKLE)),
}


@pytest.mark.parametrize("case", FINAL)
def test_final_errors(
    case: str, host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer], layout: Layout
) -> None:
    """The right class at once, nothing named, and the registry is not asked again."""
    what, fault, kind = FINAL[case]
    path = path_of(what, layers, layout)
    registry.plan(path, fault)
    listener = Listener()
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        pull(host, registry, reporter=listener)
    assert time.monotonic() - begin < BOUND
    assert type(caught.value) is kind
    assert str(host.temporary) not in caught.value.message
    assert "\n" not in caught.value.message
    assert listener.retries == []
    assert len(registry.asked(path)) == 1
    check_nothing_named(host, *(layer.diff_id for layer in layers[1:] if what == BLOB))
    judge.check(images=0)
    registry.heal()
    assert pull(host, registry).changed
    judge.check(images=1)


@pytest.mark.parametrize("case", PASSING)
def test_passing_errors(
    case: str, host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer], layout: Layout
) -> None:
    """Two failures are got over, told to the user; bytes are counted once."""
    what, fault = PASSING[case]
    # What skopeo itself asks again for, it would get over without us.
    times = 12 if fault.status == 429 else 2
    registry.plan(path_of(what, layers, layout), fault, times=times)
    listener = Listener()
    begin = time.monotonic()
    result = pull(host, registry, reporter=listener)
    assert time.monotonic() - begin < BOUND
    assert result.changed
    # A blob that is not answered holds up skopeo, and with it the other layer.
    most = 4 if case == "layer met with silence" else 2
    assert 2 <= len(listener.retries) <= most, listener.messages
    assert listener.retries[0].startswith(f"docker://{registry.host}/test/os:v1: ")
    assert listener.retries[0].endswith("(1 of 3)")
    assert listener.advanced == listener.total
    judge.check(images=1)


@pytest.mark.parametrize("case", ["busy", "silence", "layer reset", "layer stalls", "layer trickles"])
def test_passing_errors_that_do_not_pass(
    case: str, host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer], layout: Layout
) -> None:
    """It is given up after a few tries; what was complete is not fetched again by the next pull."""
    what, fault = PASSING[case]
    path, small = path_of(what, layers, layout), layers[1].descriptor["digest"]
    registry.plan(path, fault)
    listener = Listener()
    begin = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        pull(host, registry, reporter=listener)
    assert time.monotonic() - begin < BOUND
    assert str(host.temporary) not in caught.value.message
    assert len(registry.asked(path)) == 4
    assert len(listener.retries) == 3
    check_nothing_named(host, *(layer.diff_id for layer in layers[1:] if what == BLOB))
    judge.check(images=0)
    fetched_before = len(registry.asked(small))
    registry.heal()
    result = pull(host, registry)
    if what == BLOB:
        assert result.layers_present == 1
        assert len(registry.asked(small)) == fetched_before
    judge.check(images=1)


def test_every_try_brings_a_part(
    host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer]
) -> None:
    """A line that breaks over and over gets the layer through as long as it gets on."""
    path = str(layers[0].descriptor["digest"])
    for mebibytes in (1, 2):
        fault = Fault(after=mebibytes * (1 << 20) + 500_000, then=Then.CLOSE)
        registry.plan(path, fault, times=3)
    listener = Listener()
    pull(host, registry, reporter=listener)
    assert len(registry.asked(path)) == 7
    assert listener.advanced == listener.total
    judge.check(images=1)


def test_all_bytes_are_all_that_is_wanted(
    host: HostPaths, registry: FaultyRegistry, layers: list[Layer]
) -> None:
    """A length that promises more does not matter once the right bytes are there."""
    fault = Fault(declared=10_000_000, after=layers[0].descriptor["size"], then=Then.CLOSE)
    registry.plan(str(layers[0].descriptor["digest"]), fault)
    listener = Listener()
    assert pull(host, registry, reporter=listener).changed
    assert listener.retries == []


def test_one_stalled_layer_does_not_cost_the_others(
    host: HostPaths, judge: Judge, registry: FaultyRegistry, layout: Layout, layers: list[Layer]
) -> None:
    more = [layout.layer(tars.file(b"usr/%d" % n, os.urandom(200_000)) + tars.END) for n in range(5)]
    layout.image("v1", [*layers, *more])
    registry.plan(str(layers[0].descriptor["digest"]), Fault(after=500_000, then=Then.STALL), times=1)
    result = pull(host, registry)
    assert (result.layers_total, result.layers_present) == (7, 0)
    judge.check(images=1)


def test_a_registry_that_stops_and_comes_back(
    host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer]
) -> None:
    registry.plan(str(layers[0].descriptor["digest"]), Fault(after=1_000_000, then=Then.STALL), times=1)
    told = threading.Event()

    class Told(Listener):
        def message(self, text: str) -> None:
            super().message(text)
            told.set()

    def restart() -> None:
        registry.await_fault()
        registry.stop()
        told.wait(20)
        registry.start()

    thread = threading.Thread(target=restart)
    thread.start()
    listener = Told()
    try:
        pull(host, registry, reporter=listener, patience=Patience(silence=20, pause=0.5))
    finally:
        thread.join()
    assert listener.retries
    judge.check(images=1)


def test_a_registry_that_stops_for_good(
    host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer]
) -> None:
    registry.plan(str(layers[0].descriptor["digest"]), Fault(after=1_000_000, then=Then.STALL), times=1)

    def stop() -> None:
        registry.await_fault()
        registry.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(Unavailable, match="connection refused"):
        pull(host, registry, patience=Patience(silence=20, pause=0.05))
    thread.join()
    assert time.monotonic() - begin < BOUND
    check_nothing_named(host, layers[1].diff_id)
    judge.check(images=0)
    registry.start()
    assert pull(host, registry).changed


@pytest.mark.parametrize("case", ["busy", "silence", "stalled manifest", "layer stalls", "layer trickles"])
def test_cancelled_while_waiting(
    case: str, host: HostPaths, registry: FaultyRegistry, layers: list[Layer], layout: Layout
) -> None:
    """Waiting for the network, or for the next try, ends within moments."""
    what, fault = PASSING[case]
    registry.plan(path_of(what, layers, layout), fault)
    cancelled_at: list[float] = []

    class Impatient(Listener):
        def at(self, point: str) -> None:
            if not cancelled_at and (self.retries or registry.in_trouble):
                cancelled_at.append(time.monotonic())
            if cancelled_at:
                raise Cancelled

    with pytest.raises(Cancelled):
        pull(host, registry, reporter=Impatient(), patience=Patience(silence=60, pause=60))
    assert time.monotonic() - cancelled_at[0] < 5
    check_nothing_named(host, *(layer.diff_id for layer in layers[1:] if what == BLOB))


Lie = tuple[str, int, type[HostimageError]]
LIES: dict[str, Lie] = {
    "a layer is shorter than said": ("layer", 1, DigestMismatch),
    "a layer is longer than said": ("layer", -1, DigestMismatch),
    "a layer is said to be empty": ("layer", -(len(BIG) + 2048), DigestMismatch),
    "a layer is said to fill any disk": ("layer", 1 << 47, NoSpace),
    "a layer is said to be larger than anything": ("layer", 1 << 60, UnsupportedImage),
    "a size below nothing": ("layer", -(1 << 40), UnsupportedImage),
    "the configuration is shorter than said": ("config", 1, DigestMismatch),
    "the configuration is longer than said": ("config", -1, DigestMismatch),
    "the configuration is said to be huge": ("config", 5 << 20, UnsupportedImage),
}


@pytest.mark.parametrize("case", LIES)
def test_sizes_in_the_manifest_that_lie(
    case: str, host: HostPaths, judge: Judge, registry: FaultyRegistry, layers: list[Layer], layout: Layout
) -> None:
    where, by, kind = LIES[case]
    layout.image("v1", layers)
    manifest = json.loads(layout.blob_path(layout.manifests[-1]["digest"]).read_bytes())
    entry = manifest["config"] if where == "config" else manifest["layers"][0]
    entry["size"] += by
    layout.add(layout.blob(json.dumps(manifest).encode(), manifest["mediaType"]), "v1")
    listener = Listener()
    with pytest.raises(kind) as caught:
        pull(host, registry, reporter=listener)
    assert type(caught.value) is kind
    assert listener.retries == []
    check_nothing_named(host, *(layer.diff_id for layer in layers[1:] if where == "layer"))
    judge.check(images=0)


def test_a_manifest_that_names_no_configuration_of_ours(
    host: HostPaths, registry: FaultyRegistry, layout: Layout, layers: list[Layer]
) -> None:
    """The bytes are right, and mean nothing."""
    layout.image("v1", layers, manifest_extra={"config": layout.blob(b'{"rootfs": 7}', CONFIG_TYPE)})
    with pytest.raises(UnsupportedImage):
        pull(host, registry)
    check_nothing_named(host)
