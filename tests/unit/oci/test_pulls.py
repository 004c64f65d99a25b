"""The list of pulls: its form on disk, what counts as new, and damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostimaged.errors import StorageError
from hostimaged.ids import ManifestDigest, SourceDigest
from hostimaged.oci.pulls import MAX_SIZE, NewerPulls, PullRow, PullsError, load, record

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def row(
    reference: str = "docker://x.example/os:v1", manifest: str = A, source: str = A, time: int = 5
) -> PullRow:
    return PullRow(reference, ManifestDigest(manifest), SourceDigest(source), time)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/hostimaged/pulls.json"


def test_recorded_bytes(path: Path) -> None:
    """The form on disk, which later versions must read."""
    assert record(path, row())
    assert (
        path.read_text()
        == f"""\
{{
 "version": 1,
 "pulls": [
  {{
   "reference": "docker://x.example/os:v1",
   "manifest_digest": "{A}",
   "source_digest": "{A}",
   "time": 5
  }}
 ]
}}
"""
    )
    assert path.stat().st_mode & 0o777 == 0o644
    assert load(path) == [row()]


def test_nothing_recorded_yet(path: Path) -> None:
    assert load(path) == []


def test_same_pull_again_writes_nothing(path: Path) -> None:
    assert record(path, row(time=5))
    before = path.stat()
    assert not record(path, row(time=6))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert record(path, row(reference="oci:/x", time=7))
    assert not record(path, row(time=8)), "another reference in between does not matter"


def test_newest_comes_last(path: Path) -> None:
    for item in (row(time=1), row(manifest=B, time=2), row(time=3)):
        assert record(path, item)
    assert load(path) == [row(manifest=B, time=2), row(time=3)], "back to the first: it is the newest again"
    assert record(path, row(source=B, time=4))
    assert load(path) == [row(manifest=B, time=2), row(source=B, time=4)]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"version": 1}', '{"version": "1", "pulls": []}',
             '{"version": 1, "pulls": {}}', "[" * 100_000]
)  # fmt: skip
def test_damaged_file_is_an_error_and_replaced(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(PullsError, match="is damaged"):
        load(path)
    assert record(path, row())
    assert load(path) == [row()]


def test_damaged_rows_are_left_out(path: Path) -> None:
    record(path, row())
    content = json.loads(path.read_text())
    good = content["pulls"][0]
    changes = [
        {"reference": 1},
        {"manifest_digest": "x"},
        {"source_digest": None},
        {"time": -1},
        {"time": "5"},
    ]
    bad = [None, [], "x", {}, *(good | change for change in changes), good | {"time": 1 << 60}]
    content["pulls"] = [*bad, good | {"unknown": 1}, *bad]
    path.write_text(json.dumps(content))
    assert load(path) == [row()]


def test_newer_version_is_left_alone(path: Path) -> None:
    path.parent.mkdir(parents=True)
    for text in (
        '{"version": 2, "pulls": "of another form"}',
        '{"version": 2}',
        '{"version": 3, "pulls": []}',
    ):
        path.write_text(text)
        for attempt in (lambda: load(path), lambda: record(path, row())):
            with pytest.raises(NewerPulls, match="newer version"):
                attempt()
        assert path.read_text() == text


def test_limits(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b" " * (MAX_SIZE + 1))
    with pytest.raises(PullsError, match="larger than"):
        load(path)


def test_unreadable(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(PullsError, match="cannot be read"):
        load(path)
    with pytest.raises(StorageError, match="cannot write"):
        record(path, row())
