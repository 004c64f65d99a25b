"""Importing layers: the bytes come back, the digest decides, errors end what they should."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimaged.composefs import splitstream
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import ObjectWriter, Repository, Verity
from hostimaged.composefs.repository.store_pool import StorePool
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, DigestMismatch, NetworkError, NoSpace, UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci import layer_parts, layer_store
from hostimaged.oci.images import layer_stream
from hostimaged.oci.layer_import import ImportedLayer, import_layer
from hostimaged.progress import Silent

NOISE = random.Random(1).randbytes(3_000_000)
CONTENT = (0, 1, 64, 65, 511, 512, 513, 4096, 70_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made, _ = Repository.init(tmp_path / "repo", algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)
    with made:
        yield made


def diff_id(data: bytes) -> DiffId:
    return DiffId.of_hash(hashlib.sha256(data).hexdigest())


def cut(data: bytes, step: int) -> Iterator[bytes]:
    for at in range(0, len(data), step):
        yield data[at : at + step]


def imported(
    repository: Repository, data: bytes, step: int = 100_000, pool: StorePool | None = None
) -> ImportedLayer:
    return import_layer(repository, cut(data, step), diff_id(data), Silent(), pool)


def cat(repository: Repository, layer: ImportedLayer) -> bytes:
    parts: list[bytes] = []
    with repository.open_stream("", layer.stream_id, ContentType.LAYER) as stream:
        splitstream.cat(stream, repository, lambda piece: parts.append(bytes(piece)))
        assert stream.size == layer.size
    return b"".join(parts)


def archive() -> bytes:
    files = b"".join(
        tars.file(b"f%d" % size, NOISE[-size:] if size else b"", fill=b"\xaa") for size in CONTENT
    )
    return (
        tars.directory(b"d/") + files + tars.header(b"l", 0, b"1", link=b"f65") + tars.END + b"after the end"
    )


@pytest.mark.parametrize("step", [1000, 100_000, 1 << 30])
def test_the_tar_comes_back_bit_for_bit(repository: Repository, step: int) -> None:
    data = archive()
    layer = imported(repository, data, step)
    assert cat(repository, layer) == data
    assert repository.has_stream(layer_stream(layer.diff_id)) == layer.stream_id
    assert (layer.size, layer.entries) == (len(data), len(CONTENT) + 2)
    large = [size for size in CONTENT if size > 64]
    assert (layer.objects_new, layer.bytes_new) == (len(large), sum(large))
    assert (layer.objects_present, layer.bytes_present) == (0, 0)
    assert layer.inline_bytes == len(data) - sum(large)


@pytest.mark.parametrize("worth", [0, 8 << 20])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("step", [1000, 100_000, 1 << 30])
def test_helpers_store_the_same(repository: Repository, processes: int, step: int, worth: int) -> None:
    """There from the beginning, or started on the way."""
    small = [tars.file(b"s%d" % n, NOISE[n : n * 7 % 5000 + 70]) for n in range(700)]
    data = b"".join(small[:350]) + archive()[: -len(tars.END) - 13] + b"".join(small[350:]) + tars.END
    with StorePool(repository, processes, worth=worth) as pool:
        layer = imported(repository, data, step, pool)
        again = imported(repository, data, step, pool)
    assert cat(repository, layer) == data
    alone = imported(repository, data)
    assert again == replace(
        layer,
        objects_new=0,
        bytes_new=0,
        objects_present=alone.objects_present,
        bytes_present=alone.bytes_present,
    )
    assert alone == again


def test_what_waits_for_a_helper_is_bounded(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_store, "_WAITING", 10_000)
    data = tars.file(b"f", NOISE[:100]) + b"".join(tars.file(b"i%d" % n, b"inline") for n in range(100))
    data += tars.END + bytes(1 << 20)
    with StorePool(repository, 1, worth=0) as pool:
        assert cat(repository, imported(repository, data, 5000, pool)) == data


def test_contents_become_objects_in_order(repository: Repository) -> None:
    layer = imported(repository, archive())
    with repository.open_stream(layer_stream(layer.diff_id)) as stream:
        expected = [digest(repository.algorithm, NOISE[-size:]) for size in CONTENT if size > 64]
        assert list(stream.object_refs) == expected


def test_importing_again_writes_nothing(repository: Repository) -> None:
    data = archive()
    first = imported(repository, data)
    second = imported(repository, data, 777)
    assert second.stream_id == first.stream_id
    assert (second.objects_new, second.bytes_new) == (0, 0)
    assert second.bytes_present == first.bytes_new


@pytest.mark.parametrize("end", [b"", tars.END, tars.END + bytes(9216), tars.END + b"x" * 100_000])
def test_whatever_follows_the_entries_is_kept(repository: Repository, end: bytes) -> None:
    data = tars.file(b"f", NOISE[:100]) + end
    assert cat(repository, imported(repository, data, 300)) == data


def test_an_empty_archive(repository: Repository) -> None:
    for data in (b"", tars.END):
        layer = imported(repository, data)
        assert (layer.entries, cat(repository, layer)) == (0, data)


def test_vectors_of_composefs_rs(repository: Repository) -> None:
    # Recorded: the test of composefs-rs 0.9 that pins the id of a config stream; sha256, libzstd 1.5.7.
    vectors = {
        b"alpha": (1000, "757d6903198804b6ed96421a93a9973f5facc0e445a2a6c61cb0129eb67026e2"),
        b"beta": (2000, "77dd145166ef191089dabd4d2c52d32143850a3c81a074fedf48dca360e2dcb9"),
        b"gamma": (3000, "9b57f0e91c403b650e9391fd5e4154cac5dc1469acc0f3312e6149aa34f160ef"),
    }
    streams = {
        b"alpha": "61c07629b8a41273f190744a8545c132e6b784dcb2235bb31ade307a83e092ff",
        b"beta": "ce472620ab69da46e385b0936865ef22f940e6bf55a083d3be37b1003795e221",
        b"gamma": "99ce11df4bb808a1e80ce69425dae527b64aa7a270bf99c4a6e24d66be270f3f",
    }
    for name, (size, expected) in vectors.items():
        block = bytearray(tars.header(name, size, mode=0o700))
        block[148:156] = b"\0" * 8
        block[148:156] = b"%07o\0" % (sum(block) + 8 * 0x20)
        data = bytes(block) + tars.padded(bytes(size)) + tars.END
        assert hashlib.sha256(data).hexdigest() == expected
        assert imported(repository, data).stream_id.hex() == streams[name]


def test_a_lying_diff_id_gives_no_name(repository: Repository) -> None:
    wrong = diff_id(b"something else")
    with pytest.raises(DigestMismatch, match=str(wrong)):
        import_layer(repository, cut(archive(), 5000), wrong, Silent())
    assert repository.streams() == []


def test_a_bad_archive_with_another_digest_is_a_digest_mismatch(repository: Repository) -> None:
    data = bytearray(archive())
    data[700_000] ^= 1
    data[600] ^= 1
    with pytest.raises(DigestMismatch):
        import_layer(repository, cut(bytes(data), 5000), diff_id(archive()), Silent())
    assert repository.streams() == []


@pytest.mark.parametrize(
    "data",
    [
        tars.file(b"../up", b""),
        tars.header(b"f", 100),
        tars.header(b"f", 100) + NOISE[:100],
        tars.header(b"f", 3_000_000) + NOISE[:2_000_000],
        tars.header(b"f", tars.base256(1 << 40, 12)) + NOISE[:2_000_000],
        tars.header(b"f", 10),
        tars.header(b"f", 0)[:300],
        tars.header(b"f", 0, b"S", magic=tars.GNU),
        bytes(512),
        NOISE[:2000],
    ],
)
def test_what_is_no_layer_is_refused_and_gives_no_name(repository: Repository, data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match=f"layer {diff_id(data)}"):
        imported(repository, data, 10_000)
    assert repository.streams() == []


def test_too_many_entries_are_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_parts, "MAX_ENTRIES", 10)
    imported(repository, tars.file(b"f", b"") * 10 + tars.END)
    with pytest.raises(UnsupportedImage, match="over 10 entries"):
        imported(repository, tars.file(b"f", b"") * 11 + tars.END)


class Stops(Silent):
    """Raises at the n-th time a point is passed."""

    def __init__(self, point: str, times: int, error: Exception) -> None:
        self.point, self.times, self.error = point, times, error

    def at(self, point: str) -> None:
        if point == self.point:
            self.times -= 1
            if self.times == 0:
                raise self.error


class Endless:
    """An endless archive of one endless file, which notices that it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield tars.header(b"endless", tars.base256(1 << 40, 12))
        while True:
            yield NOISE[: 1 << 20]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("point", ["layer.read", "layer.store"])
def test_cancelling_stops_the_source(repository: Repository, point: str) -> None:
    pieces = Endless()
    with pytest.raises(Cancelled):
        import_layer(repository, pieces, diff_id(b""), Stops(point, 20, Cancelled()))
    assert pieces.closed
    assert repository.streams() == []


def test_cancelling_before_the_name(repository: Repository) -> None:
    with pytest.raises(Cancelled):
        import_layer(repository, [archive()], diff_id(archive()), Stops("layer.verified", 1, Cancelled()))
    assert repository.streams() == []


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_several_layers_at_once(repository: Repository, processes: int) -> None:
    tar_files = [tars.file(b"f%d" % n, NOISE[n * 1000 :]) + archive() for n in range(6)]
    with StorePool(repository, processes, worth=0) as store, ThreadPoolExecutor(6) as pool:
        layers = list(pool.map(lambda data: imported(repository, data, pool=store), tar_files))
    assert [cat(repository, layer) for layer in layers] == tar_files


def test_an_error_of_the_source_comes_through(repository: Repository) -> None:
    def pieces() -> Iterable[bytes]:
        yield archive()[:100_000]
        raise NetworkError("connection lost")

    with pytest.raises(NetworkError, match="connection lost"):
        import_layer(repository, pieces(), diff_id(archive()), Silent())
    assert repository.streams() == []


def test_an_error_of_the_source_goes_before_one_of_its_data(repository: Repository) -> None:
    def pieces() -> Iterable[bytes]:
        yield NOISE[:10_000]
        yield NOISE[:10_000]
        raise DigestMismatch(what="blob", expected="a", actual="b")

    with pytest.raises(DigestMismatch, match="blob"):
        import_layer(repository, pieces(), diff_id(b""), Silent())


@pytest.mark.parametrize("begin", [b"", tars.file(b"f", b"x" * 600)[:700]])
def test_damage_of_the_source_is_not_taken_for_another_digest(repository: Repository, begin: bytes) -> None:
    def pieces() -> Iterable[bytes]:
        yield begin
        raise UnsupportedImage("the gzip data ends early")

    with pytest.raises(UnsupportedImage, match=r": the gzip data ends early$"):
        import_layer(repository, pieces(), diff_id(b""), Silent())


@pytest.mark.parametrize("method", ["store_object", "object_writer", "write_stream"])
def test_an_error_of_the_repository_stops_the_source(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise NoSpace("no space")

    monkeypatch.setattr(Repository, method, fail)
    with pytest.raises(NoSpace):
        imported(repository, archive())
    assert repository.streams() == []


def test_a_large_content_that_fails_leaves_nothing_open(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ObjectWriter, buffer: object) -> None:
        raise NoSpace("no space")

    monkeypatch.setattr(ObjectWriter, "write", fail)
    with pytest.raises(NoSpace):
        imported(repository, archive())


def test_memory_does_not_grow_with_the_layer(repository: Repository) -> None:
    size = 64 << 20

    def pieces() -> Iterator[bytes]:
        yield tars.header(b"large", size)
        for _ in range(size >> 20):
            yield bytes(1 << 20)

    sha256 = hashlib.sha256()
    for piece in pieces():
        sha256.update(piece)
    tracemalloc.start()
    try:
        layer = import_layer(repository, pieces(), DiffId.of_hash(sha256.hexdigest()), Silent())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layer.bytes_new == size
    assert peak < 16 << 20
