"""jobs.json: what survives a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.errors import Internal, NoSpace
from hostimaged.jobs.history import KEPT_RESULTS, History
from hostimaged.jobs.job import Failure, Initiator, Job
from hostimaged.jobs.operations import Pull


def job(number: int, state: JobState = JobState.QUEUED, failure: Failure | None = None) -> Job:
    made = Job(number, Pull(reference="oci:/x"), Initiator(1000, "me"))
    if state.finished:
        made.finish(state, failure)
    else:
        made.state = state
    return made


def loaded(path: Path, boot_id: str = "boot") -> History:
    history = History(path, boot_id)
    history.load()
    return history


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.json"


def test_nothing_yet(path: Path) -> None:
    history = loaded(path)
    assert (history.results, history.orphans, history.problem) == ([], [], "")
    assert history.allot() == 1


def test_ids_go_on_and_orphans_are_found(path: Path) -> None:
    history = loaded(path)
    first, second, third = (history.allot() for _ in range(3))
    done = job(first, JobState.DONE)
    history.add_result(done)
    history.told(done)
    history.save(history.snapshot([job(second, JobState.RUNNING), job(third)]))
    again = loaded(path)
    assert again.allot() == 4
    assert [(o.id, o.state, o.error) for o in again.orphans] == [
        (2, JobState.FAILED, ErrorName.INTERNAL),
        (3, JobState.FAILED, ErrorName.INTERNAL),
    ]
    assert all(orphan.finished >= orphan.created for orphan in again.orphans)
    assert [(r.id, r.state) for r in again.results] == [(1, "done"), (2, "failed"), (3, "failed")]
    # Once written down, they are orphans no more.
    again.save(again.snapshot([]))
    assert loaded(path).orphans == []
    assert [r.id for r in loaded(path).results] == [1, 2, 3]


def test_an_end_that_was_not_announced_is_told_by_the_next_daemon(path: Path) -> None:
    """As it was: a job that was done does not fail because the daemon ended before it said so."""
    history = loaded(path)
    history.add_result(job(1, JobState.FAILED, Failure.of(NoSpace("full"))))
    history.add_result(job(2, JobState.DONE))
    history.save(history.snapshot([job(3)]))
    again = loaded(path)
    ends = [(o.id, o.state, o.error) for o in again.orphans]
    assert ends == [(1, "failed", ErrorName.NO_SPACE), (2, "done", ""), (3, "failed", ErrorName.INTERNAL)]
    assert [r.id for r in again.results] == [1, 2, 3]
    again.save(again.snapshot([]))
    assert loaded(path).orphans == []


def test_only_the_last_results_are_kept(path: Path) -> None:
    history = loaded(path)
    for number in range(1, 50):
        history.add_result(job(number, JobState.DONE))
    assert [r.id for r in history.results] == list(range(50 - KEPT_RESULTS, 50))
    history.save(history.snapshot([]))
    assert [r.id for r in loaded(path).results] == [r.id for r in history.results]


def test_a_failure_keeps_its_error(path: Path) -> None:
    history = loaded(path)
    history.add_result(job(1, JobState.FAILED, Failure.of(NoSpace("full"))))
    history.save(history.snapshot([]))
    assert loaded(path).results[0].failure == Failure(ErrorName.NO_SPACE, "full")


def test_another_boot_begins_anew(path: Path) -> None:
    history = loaded(path, "one")
    history.allot()
    history.save(history.snapshot([job(1)]))
    other = loaded(path, "two")
    assert (other.orphans, other.results, other.allot()) == ([], [], 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "next_id": 0}',
        b"\xff",
        b'{"active": [{"id": 1}]}',
    ],
)
def test_damage_is_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    history = loaded(path)
    assert "jobs.json" in history.problem
    assert history.allot() == 1


def test_the_file_is_private_and_replaced_whole(path: Path) -> None:
    history = loaded(path)
    history.save(history.snapshot([job(1)]))
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["active"][0]["uid"] == 1000
    assert [entry.name for entry in path.parent.iterdir()] == ["jobs.json"]


def test_only_jobs_that_ended_are_results(path: Path) -> None:
    with pytest.raises(Internal):
        loaded(path).add_result(job(1, JobState.RUNNING))
