"""The last check: kept over a restart, believed only if it is what was written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JobState
from hostimaged.bus.findings import Findings
from hostimaged.bus.updates import Updates
from hostimaged.jobs.job import Failure, Initiator, Job
from hostimaged.jobs.operations import Check

TRACKED = "docker://registry.example/os:latest"
DIGEST = "sha256:" + "a" * 64
FOUND = {
    "reference": TRACKED,
    "manifest-digest": DIGEST,
    "version": "2",
    "timestamp": 5,
    "download-size": 1 << 40,
    "changelog-url": "https://os.example/changes",
}


def ended(failure: Failure | None = None, target: str = TRACKED, **result: Any) -> Job:
    job = Job(1, Check(reference=target), Initiator(0))
    job.result = result
    job.finish(JobState.FAILED if failure else JobState.DONE, failure)
    return job


def loaded(path: Path, boot_id: str = "boot") -> Updates:
    updates = Updates(path, boot_id)
    updates.load()
    return updates


def kept(path: Path, *jobs: Job) -> Updates:
    updates = Updates(path, "boot")
    for job in jobs:
        assert updates.job_ended(job, TRACKED)
        asyncio.run(updates.save())
    return updates


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    failed = ended(Failure(ErrorName.NETWORK, "no network"))
    before = kept(tmp_path / "check.json", ended(**FOUND), failed)
    after = loaded(tmp_path / "check.json")
    assert after.last_check(TRACKED) == before.last_check(TRACKED)
    assert after.last_check(TRACKED) == (failed.finished, "org.hostimage1.Error.Network", "no network")
    update = after.current(TRACKED, Findings())
    assert update == before.current(TRACKED, Findings())
    assert update == {
        "image": TRACKED,
        "digest": DIGEST,
        "state": "available",
        "version": "2",
        "timestamp": 5,
        "download-size": 1 << 40,
        "changelog-url": "https://os.example/changes",
    }


def test_another_image_or_boot_is_nobodys(tmp_path: Path) -> None:
    kept(tmp_path / "check.json", ended(**FOUND))
    for updates, tracked in ((loaded(tmp_path / "check.json"), "oci:/x"),
                             (loaded(tmp_path / "check.json"), ""),
                             (loaded(tmp_path / "check.json", "later"), TRACKED)):  # fmt: skip
        assert updates.last_check(tracked) == (0, "", "")
        assert updates.current(tracked, Findings()) == {}


def test_what_another_image_had_is_not_taken_over(tmp_path: Path) -> None:
    updates = kept(tmp_path / "check.json", ended(**FOUND))
    failure = Failure(ErrorName.NETWORK, "no network")
    assert updates.job_ended(ended(failure, "oci:/x"), "oci:/x")
    assert updates.current("oci:/x", Findings()) == {}
    assert updates.last_check(TRACKED) == (0, "", "")


GOOD = {"version": 1, "boot_id": "boot", "image": TRACKED, "time": 5, "found": FOUND}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        *(
            json.dumps(GOOD | bad).encode()
            for bad in (
                {"version": 2},
                {"time": -1},
                {"time": 1 << 63},
                {"error": "org.example.Error"},
                {"message": "a\nb"},
                {"message": "a\x00"},
                {"image": "x" * 5000},
                {"found": FOUND | {"version": "2\x00"}},
                {"found": FOUND | {"manifest-digest": "<b>"}},
                {"found": FOUND | {"download-size": "1"}},
                {"found": FOUND | {"timestamp": 1 << 63}},
                {"padding": "x" * (64 << 10)},
            )
        ),
    ],
)
def test_a_damaged_file_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "check.json").write_bytes(json.dumps(GOOD).encode())
    assert loaded(tmp_path / "check.json").last_check(TRACKED) == (5, "", "")
    (tmp_path / "check.json").write_bytes(content)
    updates = loaded(tmp_path / "check.json")
    assert updates.last_check(TRACKED) == (0, "", "")
    assert updates.current(TRACKED, Findings()) == {}


def test_what_a_worker_may_not_say_is_not_taken(tmp_path: Path) -> None:
    updates = kept(tmp_path / "check.json", ended(**FOUND))
    for bad in ({"version": "a\x00"}, {"manifest-digest": "x" * 200}, {"timestamp": -5}):
        assert not updates.job_ended(ended(**(FOUND | bad)), TRACKED)
    assert updates.current(TRACKED, Findings())["version"] == "2"
    assert updates.job_ended(ended(**(FOUND | {"changelog-url": "javascript:1"})), TRACKED)
    assert "changelog-url" not in updates.current(TRACKED, Findings())


def test_where_nothing_can_be_written_it_goes_on(tmp_path: Path) -> None:
    updates = kept(tmp_path / "missing/check.json", ended(**FOUND))
    assert updates.current(TRACKED, Findings())["digest"] == DIGEST
