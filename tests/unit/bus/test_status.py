"""The status cache: only the newest findings count, and nonsense from a worker is not believed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from jeepney import HeaderFields, MessageType, Parser

from hostimage_dbus.framing import return_header
from hostimaged.bus.sizes import Sizes
from hostimaged.bus.status import StatusCache, to_variants
from hostimaged.errors import NoSpace
from hostimaged.jobs.events import Event, SizesEvent, StatusEvent
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
    def __init__(self, run_dir: Path) -> None:
        self.changes = 0
        self.next: FakeWorker = FakeWorker([], Outcome())
        self.asked: list[str] = []
        self.sizes = Sizes(run_dir / "sizes.json", "boot")
        self.cache = StatusCache(self.start, self.changed, self.sizes)  # type: ignore[arg-type]

    def start(self, operation: Operation) -> FakeWorker:
        assert isinstance(operation, Scan)
        self.asked.append(operation.known)
        return self.next

    def changed(self) -> None:
        self.changes += 1


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    yield Bench(tmp_path)
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.fixture
def stalls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of a processor that each callback of the loop took in the loop's own thread."""
    durations: list[float] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        started = time.thread_time()
        run(handle)
        durations.append(time.thread_time() - started)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    return durations


def listed(bench: Bench) -> list[dict[str, tuple[str, Any]]]:
    """The answer to ListImages, as another implementation of D-Bus reads it."""
    answer = bench.cache.image_list
    header = return_header(7, 9, ":1.5", answer.signature, len(answer.data))
    parser = Parser()
    parser.add_data(header + answer.data)
    message = parser.get_next_message()
    assert message is not None
    assert message.header.message_type is MessageType.method_return
    assert message.header.serial == 7
    assert message.header.fields == {
        HeaderFields.reply_serial: 9,
        HeaderFields.destination: ":1.5",
        HeaderFields.signature: "aa{sv}",
    }
    return list(message.body[0])


async def test_the_first_findings_are_waited_for(bench: Bench) -> None:
    waiting = asyncio.ensure_future(bench.cache.known())
    await asyncio.sleep(0)
    assert not bench.cache.is_known
    assert not waiting.done()
    await bench.cache.take(bench.cache.begin(), FOUND)
    await waiting
    assert bench.cache.is_known


async def test_they_are_not_waited_for_for_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostimaged.bus.status.FIRST_SCAN", 0.01)
    assert not await bench.cache.known()
    assert not await bench.cache.known(0.01)
    assert not bench.cache.is_known
    # Who asks is not told that nothing is installed.
    assert [(row.id, row.severity) for row in bench.cache.findings.problems] == [("scan", "warning")]
    assert bench.changes > 0
    await bench.cache.take(bench.cache.begin(), FOUND)
    assert await bench.cache.known()
    assert [row.id for row in bench.cache.findings.problems] == ["pulls"]


async def test_findings_are_taken_and_unknown_keys_dropped(bench: Bench) -> None:
    await bench.cache.take(bench.cache.begin(), FOUND)
    assert bench.changes == 1
    assert bench.cache.findings.repository is not None
    assert bench.cache.findings.repository.used == 5
    (row,) = listed(bench)
    assert row == {
        "tag": ("s", "a"),
        "manifest-digest": ("s", "sha256:1"),
        "size": ("t", 7),
        "image-ids": ("as", ["x"]),
        "artifact": ("b", False),
        "deployed": ("b", False),
    }


async def test_what_could_be_reclaimed_is_known_until_it_is_looked_at_again(bench: Bench) -> None:
    async def found(**sizes: int) -> tuple[int, int | None]:
        repository = {**FOUND["repository"], **sizes}
        await bench.cache.take(bench.cache.begin(), {**FOUND, "repository": repository})
        row = bench.cache.findings.repository
        assert row is not None
        return row.used, row.reclaimable

    assert await found(used=5) == (5, None)
    assert await found(used=6, reclaimable=3) == (6, 3)
    assert await found(used=7) == (7, 3)
    assert await found(used=4, reclaimable=0) == (4, 0)


async def test_older_findings_do_not_replace_newer_ones(bench: Bench) -> None:
    first, second = bench.cache.begin(), bench.cache.begin()
    await bench.cache.take(second, FOUND)
    await bench.cache.take(first, {"images": []})
    assert len(listed(bench)) == 1
    assert bench.changes == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        {"repository": {"algorithm": "x"}},
        {"images": "none"},
        {"deployments": {}},
        {"repository": None, "images": [{"tag": 5}], "host": 5},
        {"problems": [{"id": "x", "text": "a\0"}]},
        {"problems": [{"id": "x"}]},
        {"problems": [{"id": "x", "text": "y", "severity": "fatal"}]},
    ],
)
async def test_nonsense_keeps_what_was_known(bench: Bench, nonsense: dict[str, Any]) -> None:
    await bench.cache.take(bench.cache.begin(), FOUND)
    await bench.cache.take(bench.cache.begin(), nonsense)
    assert len(listed(bench)) == 1
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls", "scan"]
    await bench.cache.take(bench.cache.begin(), nonsense)
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls", "scan"]
    await bench.cache.take(bench.cache.begin(), FOUND)
    assert [problem.id for problem in bench.cache.findings.problems] == ["pulls"]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"images": [{"tag": "b", "size": -1}]}, "image b cannot be shown: size: "),
        ({"images": [{"tag": 5}]}, "image without a name cannot be shown: tag: "),
        ({"images": [{"tag": "a\0"}]}, r"image a\x00 cannot be shown: tag: "),
        ({"images": [{"tag": "\ud800"}]}, "image "),
        ({"images": ["row"]}, "image without a name cannot be shown: "),
        (
            {"deployments": [{"id": "c" * 128, "timestamp": 1 << 53}]},
            f"deployment {'c' * 128} cannot be shown: timestamp: ",
        ),
        ({"deployments": [{"id": "/"}]}, "deployment / cannot be shown: id: "),
    ],
)
async def test_a_bad_row_costs_a_problem_and_no_more(
    bench: Bench, bad: dict[str, list[Any]], text: str
) -> None:
    good = FOUND | {"deployments": [{"id": "d" * 128}]}
    status = good | {key: [*bad[key], *good[key]] for key in bad}  # type: ignore[misc]
    await bench.cache.take(bench.cache.begin(), status)
    assert len(listed(bench)) == 1
    assert [row.id for row in bench.cache.findings.deployments] == ["d" * 128]
    pulls, problem = bench.cache.findings.problems
    assert (pulls.id, problem.id, problem.severity) == ("pulls", text.split()[0], "error")
    assert problem.text.startswith(text)
    assert problem.text.isprintable()


async def test_of_many_bad_rows_a_few_are_told(bench: Bench) -> None:
    await bench.cache.take(bench.cache.begin(), {"images": [{"tag": f"t{n}", "size": -1} for n in range(20)]})
    texts = [problem.text for problem in bench.cache.findings.problems]
    assert len(texts) == 9
    assert texts[7].startswith("image t7 ")
    assert texts[8] == "image and 12 more like it"


async def test_thousands_of_images_hold_nobody_up(bench: Bench, stalls: list[float]) -> None:
    """All that is done in the loop for 3,000 images, beside what any callback may wait for."""
    digest, rows = "sha256:" + "a" * 64, 3000
    row = {"manifest-digest": digest, "config-digest": digest, "reference": "docker://registry.example/os:x",
           "source-digest": digest, "pulled": 1, "version": "1.0", "size": 1 << 30,
           "image-ids": ["a" * 128, "b" * 128]}  # fmt: skip
    status = {"images": [{"tag": f"localhost/hostimaged-pull-{n:071}"} | row for n in range(rows)]}
    await bench.cache.take(bench.cache.begin(), status)
    await asyncio.sleep(0)
    assert len(listed(bench)) == rows
    await asyncio.sleep(0)
    stalls.clear()
    await bench.cache.take(bench.cache.begin(), status)
    bench.cache.document(daemon={}, tracked_image="", jobs=[], results=[], problems=[], update={}, holds=[])
    await asyncio.sleep(0)
    assert max(stalls) < 0.1, sorted(stalls)[-5:]


async def test_refresh_asks_a_worker(bench: Bench) -> None:
    bench.next = FakeWorker([StatusEvent(status=FOUND)], Outcome())
    await bench.cache.refresh()
    assert len(listed(bench)) == 1
    bench.next = FakeWorker([], Outcome(failure=Failure.of(NoSpace("full"))))
    await bench.cache.refresh()
    assert len(listed(bench)) == 1
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


ID, OTHER = "a" * 128, "b" * 128


def measurable(contents: str, used: int | None = None) -> StatusEvent:
    """What a scan finds of a host with two deployments."""
    repository = {"algorithm": "sha512", "formats": ["V1"], "secure": True} | ({"used": used} if used else {})
    rows = [{"id": ID}, {"id": OTHER}]
    return StatusEvent(status={"contents": contents, "repository": repository, "deployments": rows})


def shown(bench: Bench) -> tuple[int | None, int, int]:
    """Bytes in all, and of each deployment."""
    findings = bench.cache.findings
    assert findings.repository is not None
    first, second = findings.deployments
    return findings.repository.used, first.size_exclusive, second.size_exclusive


async def test_sizes_are_shown_as_long_as_they_hold(bench: Bench) -> None:
    assert bench.cache.is_measured
    bench.next = FakeWorker([measurable("one")], Outcome())
    await bench.cache.refresh()
    assert shown(bench) == (0, 0, 0)
    assert not bench.cache.is_measured
    sizes = SizesEvent(contents="one", used=100, exclusive={ID: 10, OTHER: 20})
    bench.next = FakeWorker([measurable("one"), sizes], Outcome())
    await bench.cache.refresh()
    assert shown(bench) == (100, 10, 20)
    assert bench.cache.is_measured
    # A job changed what they depend on, and looked how much there is in all.
    await bench.cache.take(bench.cache.begin(), measurable("two", used=90).status)
    assert shown(bench) == (90, 0, 0)
    assert not bench.cache.is_measured
    # It was taken back.
    again = SizesEvent(contents="one", used=80, exclusive={})
    bench.next = FakeWorker([measurable("one"), again], Outcome())
    await bench.cache.refresh()
    assert shown(bench) == (80, 10, 20)
    assert bench.asked == ["", "", "one"]
    failed = SizesEvent(contents="", used=70, exclusive={})
    bench.next = FakeWorker([measurable("one"), failed], Outcome())
    await bench.cache.refresh()
    assert shown(bench) == (70, 0, 0)


async def test_sizes_outlive_the_daemon_and_not_the_boot(bench: Bench, tmp_path: Path) -> None:
    sizes = SizesEvent(contents="one", used=100, exclusive={ID: 10, OTHER: 20})
    bench.next = FakeWorker([measurable("one"), sizes], Outcome())
    await bench.cache.refresh()
    later = Bench(tmp_path)
    await asyncio.to_thread(later.sizes.load)
    later.next = FakeWorker([measurable("one")], Outcome())
    await later.cache.refresh()
    assert shown(later) == (100, 10, 20)
    assert later.asked == ["one"]
    other_boot = Sizes(tmp_path / "sizes.json", "later")
    await asyncio.to_thread(other_boot.load)
    assert other_boot.contents == ""
    (tmp_path / "sizes.json").write_text("{")
    damaged = Sizes(tmp_path / "sizes.json", "boot")
    await asyncio.to_thread(damaged.load)
    assert damaged.contents == ""
