"""The status cache: only the newest findings count, and nonsense from a worker is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hostimaged.bus.status import StatusCache, to_variants
from hostimaged.errors import NoSpace
from hostimaged.jobs.events import Event, StatusEvent
from hostimaged.jobs.job import Failure
from hostimaged.jobs.operations import Operation, Scan
from hostimaged.jobs.process import Outcome

FOUND = {
    "repository": {"algorithm": "sha512", "formats": ["V1"], "secure": True, "used": 5, "new-key": 1},
    "images": [
        {
            "tag": "a",
            "manifest-digest": "sha256:1",
            "size": 7,
            "image-ids": ["x"],
            "artifact": False,
            "other": 1,
        }
    ],
    "problems": [{"id": "pulls", "severity": "warning", "text": "odd"}],
}


class FakeWorker:
    def __init__(self, events: list[Event], outcome: Outcome) -> None:
        self._events, self._outcome = events, outcome

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        for event in self._events:
            on_event(event)
        return self._outcome


class Bench:
    def __init__(self) -> None:
        self.changes = 0
        self.next: FakeWorker = FakeWorker([], Outcome())
        self.cache = StatusCache(self.start, self.changed)  # type: ignore[arg-type]

    def start(self, operation: Operation) -> FakeWorker:
        assert isinstance(operation, Scan)
        return self.next

    def changed(self) -> None:
        self.changes += 1


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_findings_are_taken_and_unknown_keys_dropped(bench: Bench) -> None:
    bench.cache.take(bench.cache.begin(), FOUND)
    assert bench.changes == 1
    assert bench.cache.findings.repository is not None
    assert bench.cache.findings.repository.used == 5
    (row,) = bench.cache.image_rows
    assert {key: (value.signature, value.value) for key, value in row.items()} == {
        "tag": ("s", "a"),
        "manifest-digest": ("s", "sha256:1"),
        "size": ("t", 7),
        "image-ids": ("as", ["x"]),
        "artifact": ("b", False),
        "deployed": ("b", False),
    }


def test_older_findings_do_not_replace_newer_ones(bench: Bench) -> None:
    first, second = bench.cache.begin(), bench.cache.begin()
    bench.cache.take(second, FOUND)
    bench.cache.take(first, {"images": []})
    assert len(bench.cache.image_rows) == 1
    assert bench.changes == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        {"repository": {"algorithm": "x"}},
        {"images": [{"size": -1}]},
        {"images": [{"tag": 5}]},
        {"images": "none"},
        {"problems": [{"id": "x"}]},
        {"problems": [{"id": "x", "text": "y", "severity": "fatal"}]},
    ],
)
def test_nonsense_keeps_what_was_known(bench: Bench, nonsense: dict[str, Any]) -> None:
    bench.cache.take(bench.cache.begin(), FOUND)
    bench.cache.take(bench.cache.begin(), nonsense)
    assert len(bench.cache.image_rows) == 1
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls", "scan"]
    bench.cache.take(bench.cache.begin(), nonsense)
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls", "scan"]
    bench.cache.take(bench.cache.begin(), FOUND)
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls"]


async def test_refresh_asks_a_worker(bench: Bench) -> None:
    bench.next = FakeWorker([StatusEvent(status=FOUND)], Outcome())
    await bench.cache.refresh()
    assert len(bench.cache.image_rows) == 1
    bench.next = FakeWorker([], Outcome(failure=Failure.of(NoSpace("full"))))
    await bench.cache.refresh()
    assert len(bench.cache.image_rows) == 1
    assert bench.cache.findings.problems[-1].text == "the state of the repository could not be read: full"


def test_document_before_the_first_scan(bench: Bench) -> None:
    daemon = {"version": "1", "bootId": "", "state": "idle"}
    text = bench.cache.document(
        daemon=daemon, tracked_image="", jobs=[], results=[], problems=[], update={}, holds=[]
    )
    document = json.loads(text)
    assert document["repository"] is None
    assert document["daemon"] == daemon | {"apiVersion": 1}


def test_variants_leave_out_what_is_unknown() -> None:
    assert to_variants({"a": None, "b": ""}).keys() == {"b"}
    with pytest.raises(KeyError):
        to_variants({"a": 1.5})
