"""What is damaged: told until the next verification or repair says otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.bus.verified import Verified
from hostimaged.jobs.job import Failure, Initiator, Job
from hostimaged.jobs.operations import Recover, Repair, Verify

DAMAGED = {"ok": False, "damaged": 3, "broken-deployments": ["ab" * 64], "broken-images": ["image:v1"]}


def ended(operation: Any, failure: Failure | None = None, **result: Any) -> Job:
    job = Job(1, operation, Initiator(0))
    job.result = result
    job.finish(JobState.FAILED if failure else JobState.DONE, failure)
    return job


@pytest.fixture
def verified(tmp_path: Path) -> Verified:
    return Verified(tmp_path / "verified.json", "boot")


def test_damage_is_a_problem_until_it_is_gone(verified: Verified) -> None:
    assert verified.problems == []
    assert verified.job_ended(ended(Verify(), **DAMAGED))
    [problem] = verified.problems
    assert (problem.id, problem.severity) == ("damage", "error")
    assert problem.text == (
        "the repository is damaged in 3 places, which breaks deployment abababababab, image image:v1"
    )
    assert verified.job_ended(ended(Verify(), ok=True, damaged=0))
    assert verified.problems == []


def test_damage_that_breaks_nothing_is_a_warning(verified: Verified) -> None:
    verified.job_ended(ended(Verify(), ok=False, damaged=1))
    assert [problem.severity for problem in verified.problems] == ["warning"]


@pytest.mark.parametrize(
    "job",
    [
        ended(Repair(dry_run=True), **{"ok": True, "dry-run": True}),
        ended(Repair(), Failure(ErrorName.NETWORK, "no network")),
        ended(Recover(), ok=True),
    ],
)
def test_jobs_that_say_nothing_of_it(verified: Verified, job: Job) -> None:
    verified.job_ended(ended(Verify(), **DAMAGED))
    assert not verified.job_ended(job)
    assert len(verified.problems) == 1


@pytest.mark.parametrize(("result", "problems"), [({"ok": True}, 0), ({"ok": False, "damaged-still": 1}, 1)])
def test_a_repair_counts(verified: Verified, result: dict[str, Any], problems: int) -> None:
    verified.job_ended(ended(Verify(), **DAMAGED))
    assert verified.job_ended(ended(Repair(), **result))
    assert len(verified.problems) == problems


def test_a_restart_forgets_nothing(verified: Verified, tmp_path: Path) -> None:
    many = [f"image:{number}" for number in range(100)]
    verified.job_ended(ended(Verify(), **(DAMAGED | {"broken-images": many})))
    asyncio.run(verified.save())
    for boot_id, expected in (("boot", verified.problems), ("later", [])):
        after = Verified(tmp_path / "verified.json", boot_id)
        after.load()
        assert after.problems == expected
    assert verified.problems[0].text.endswith("and more")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"version": 1, "boot_id": "boot", "damaged": -1}', b"\xff"]
)
def test_a_damaged_file_counts_as_none(verified: Verified, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "verified.json").write_bytes(content)
    verified.load()
    assert verified.problems == []
