"""Jobs read from properties that may be anything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimage_dbus.names import JobState, job_path
from hostimagectl.job import Job, JobError, job_id

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "Id",
    "Kind",
    "State",
    "Phase",
    "Progress",
    "BytesDone",
    "Rate",
    "Eta",
    "Message",
    "Cancellable",
    "Error",
    "Result",
]


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (job_path(7), 7),
        (job_path(2**64 - 1), 2**64 - 1),
        ("/org/hostimage1/jobs/7", 0),
        ("/org/hostimage1/jobs/_7x", 0),
        ("/org/hostimage1/jobs/_٣", 0),
        ("/other/_7", 0),
        ("/org/hostimage1/jobs/_" + "9" * 5000, 0),
    ],
)
def test_job_id(path: str, number: int) -> None:
    assert job_id(path) == number


@given(st.dictionaries(st.sampled_from(NAMES), anything))
def test_any_properties_make_a_job(properties: dict[str, Any]) -> None:
    job = Job.from_properties(job_path(3), properties)
    assert isinstance(job.state, str)
    assert job.progress is None or 0 <= job.progress <= 1
    assert job.bytes_done >= 0
    assert isinstance(job.error, JobError | None)
    assert set(job.as_dict()) == set(Job(id=1, path="/x").as_dict())


@pytest.mark.parametrize("state", list(JobState))
def test_states(state: JobState) -> None:
    job = Job(id=1, path="/x", state=state)
    assert job.ended == state.finished
    assert job.succeeded == (state == "done")
    assert job.cancelled == (state == "cancelled")


def test_unknown_states_have_not_ended() -> None:
    assert not Job(id=1, path="/x", state="levitating").ended


def test_no_error_is_two_empty_strings() -> None:
    assert Job.from_properties("/x", {"Error": ["", ""]}).error is None
    assert Job.from_properties("/x", {"Error": ["a", "b"]}).error == JobError("a", "b")
