"""Splitstreams, meta.json and link texts under random and hostile input."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, MetadataError, Repository, Verity
from hostimaged.composefs.repository.metadata import Metadata
from hostimaged.composefs.repository.names import link_text
from hostimaged.composefs.splitstream import SplitStream, SplitStreamError, Writer
from hostimaged.ids import ObjectId

algorithms = st.sampled_from(Algorithm)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def ids(algorithm: Algorithm) -> st.SearchStrategy[ObjectId]:
    # Few, so that they repeat.
    return st.integers(0, 5).map(lambda n: ObjectId(bytes([n]) * algorithm.digest_size))


@st.composite
def streams(draw: st.DrawFn) -> tuple[Algorithm, list[bytes | ObjectId], list[tuple[str, ObjectId]]]:
    algorithm = draw(algorithms)
    chunks = draw(st.lists(st.binary(max_size=100) | ids(algorithm), max_size=30))
    return algorithm, chunks, draw(st.lists(st.tuples(texts, ids(algorithm)), max_size=10))


def written(algorithm: Algorithm, chunks: list[bytes | ObjectId], names: list[tuple[str, ObjectId]]) -> bytes:
    with Writer(algorithm, 7) as writer:
        for chunk in chunks:
            if isinstance(chunk, ObjectId):
                writer.external(chunk, 1000)
            else:
                writer.inline(chunk)
        for name, id_ in names:
            writer.named_ref(name, id_)
        return b"".join(writer.finish())


def opened(path: Path, data: bytes, algorithm: Algorithm) -> SplitStream:
    (path / "stream").write_bytes(data)
    return SplitStream(os.open(path / "stream", os.O_RDONLY), algorithm)


def merged(chunks: list[bytes | ObjectId]) -> list[bytes | ObjectId]:
    """Chunks as they must come back: neighbouring inline ones made one, empty ones gone."""
    result: list[bytes | ObjectId] = []
    for chunk in chunks:
        if isinstance(chunk, ObjectId) or not result or isinstance(result[-1], ObjectId):
            if chunk:
                result.append(chunk)
        else:
            result[-1] += chunk
    return result


@given(streams())
@settings(max_examples=200)
def test_streams_come_back(
    tmp_path: Path, given_: tuple[Algorithm, list[bytes | ObjectId], list[tuple[str, ObjectId]]]
) -> None:
    algorithm, chunks, names = given_
    data = written(algorithm, chunks, names)
    with opened(tmp_path, data, algorithm) as stream:
        assert list(stream.chunks()) == merged(chunks)
        assert stream.named_refs == dict(names)
        assert stream.object_refs == tuple(dict.fromkeys(c for c in chunks if isinstance(c, ObjectId)))
        assert stream.stream_refs == tuple(dict.fromkeys(id_ for _, id_ in names))
        assert stream.size == sum(1000 if isinstance(chunk, ObjectId) else len(chunk) for chunk in chunks)


@given(
    streams(),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(0) | st.none(),
)
@settings(max_examples=500)
def test_damaged_streams_raise_nothing_else(
    tmp_path: Path,
    given_: tuple[Algorithm, list[bytes | ObjectId], list[tuple[str, ObjectId]]],
    changes: list[tuple[int, int]],
    cut: int | None,
) -> None:
    algorithm, chunks, names = given_
    data = bytearray(written(algorithm, chunks, names))
    for at, value in changes:
        data[at % len(data)] = value
    if cut is not None:
        del data[cut % len(data) :]
    try:
        with opened(tmp_path, bytes(data), algorithm) as stream:
            for _ in stream.chunks():
                pass
    except SplitStreamError:
        pass


@given(st.binary(max_size=300))
def test_random_bytes_are_no_stream(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SplitStreamError):
        opened(tmp_path, data, Algorithm.SHA256).close()


formats = st.builds(
    FormatSet, st.sampled_from(Format), st.lists(st.sampled_from(Format), max_size=4).map(tuple)
)


@given(algorithms, formats)
def test_metadata_comes_back(algorithm: Algorithm, chosen: FormatSet) -> None:
    metadata = Metadata.new(algorithm, chosen)
    parsed = Metadata.parse(metadata.render())
    assert parsed == metadata
    assert parsed.formats == chosen
    parsed.check()


VALID = Metadata.new(Algorithm.SHA512, FormatSet(Format.V1, (Format.V2,))).render()


@given(st.integers(0, len(VALID)), st.integers(0, 10), st.binary(max_size=10))
@example(0, 0, b"")
def test_damaged_metadata_raises_nothing_else(at: int, removed: int, inserted: bytes) -> None:
    with contextlib.suppress(MetadataError):
        Metadata.parse(VALID[:at] + inserted + VALID[at + removed :])


parts = st.sampled_from(["a", "b", "c"])
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)


@given(paths, paths)
def test_links_lead_where_they_should(link: str, target: str) -> None:
    assert os.path.normpath(os.path.join(os.path.dirname(link), link_text(link, target))) == target


@given(st.lists(st.binary(max_size=9000) | st.integers(0, 20_000).map(bytes), max_size=8), algorithms)
@settings(max_examples=50)
def test_objects_come_back(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], algorithm: Algorithm
) -> None:
    data = b"".join(pieces)
    path = tmp_path_factory.mktemp("repository") / "composefs"
    repository, _ = Repository.init(path, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)
    with repository:
        with repository.object_writer() as writer:
            for piece in pieces:
                writer.write(piece)
            stored = writer.commit()
        assert stored.id == fsverity.digest(algorithm, data)
        assert repository.read_object(stored.id, len(data)) == data
        assert repository.store_object(data).is_new is False
