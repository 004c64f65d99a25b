"""Progress: never backwards, in steps, not too often, and the numbers are right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimaged.jobs.progress import BYTES_WEIGHT, IMPORT_WEIGHT, INTERVAL, Progress

steps = st.lists(
    st.one_of(
        st.tuples(st.just("totals"), st.integers(0, 1000), st.integers(0, 2000)),
        st.tuples(st.just("bytes"), st.integers(0, 2000)),
        st.tuples(st.just("imported"), st.integers(0, 2000), st.integers(0, 1000)),
        st.tuples(st.just("generated"), st.integers(0, 5), st.integers(0, 4)),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_a_worker_reports_nothing_runs_backwards(reports: list[tuple[str, int, int]]) -> None:
    progress = Progress(0.0)
    last = (-1.0, 0)
    for what, *values in reports:
        getattr(progress, f"set_{what}")(*values)
        assert (progress.fraction, progress.done) >= last
        assert progress.fraction == -1.0 or 0.0 <= progress.fraction <= 0.99
        assert progress.cached <= progress.total or progress.total == 0
        last = (progress.fraction, progress.done)
    progress.finish()
    assert progress.fraction == 1.0


def test_fraction_is_the_share_of_bytes_and_images() -> None:
    progress = Progress(0.0)
    assert progress.fraction == -1.0
    progress.set_bytes(10)
    assert progress.fraction == -1.0
    progress.set_totals(1000, 500)
    assert progress.fraction == pytest.approx(0.45)
    progress.set_bytes(250)
    assert progress.fraction == pytest.approx(0.67)
    progress.set_bytes(500)
    assert progress.fraction == pytest.approx(BYTES_WEIGHT)
    progress.set_generated(1, 2)
    assert progress.fraction == pytest.approx(0.95)
    progress.set_generated(2, 2)
    assert progress.fraction == pytest.approx(0.99)


def test_r26_what_is_fetched_first_and_imported_then_is_one_progress() -> None:
    progress = Progress(0.0)
    progress.set_imported(0, 1000)
    assert progress.fraction == -1.0
    progress.set_totals(1000, 500)
    assert progress.fraction == pytest.approx(0.32)
    progress.set_bytes(500)
    assert progress.fraction == pytest.approx(BYTES_WEIGHT - IMPORT_WEIGHT)
    progress.set_imported(500, 1000)
    assert progress.fraction == pytest.approx(0.77)
    progress.set_imported(1000, 1000)
    assert progress.fraction == pytest.approx(BYTES_WEIGHT)
    progress.set_generated(2, 2)
    assert progress.fraction == pytest.approx(0.99)


def test_nothing_to_read_counts_as_read() -> None:
    progress = Progress(0.0)
    progress.set_totals(0, 0)
    assert progress.fraction == pytest.approx(BYTES_WEIGHT)


def test_only_the_first_totals_count() -> None:
    progress = Progress(0.0)
    progress.set_totals(100, 10)
    progress.set_totals(5, 5)
    assert (progress.total, progress.cached) == (100, 10)


def test_rate_and_eta() -> None:
    progress = Progress(0.0)
    progress.set_totals(10_000, 0)
    for second in range(1, 6):
        progress.set_bytes(second * 1000)
        progress.measure(float(second))
    assert progress.rate == 1000
    assert progress.eta == 5_000_000
    # A stall lowers the rate smoothly, not at once.
    progress.measure(6.0)
    assert 500 < progress.rate < 1000
    for second in range(7, 60):
        progress.measure(float(second))
    assert progress.rate == 0
    assert progress.eta == 0
    progress.set_bytes(10_000)
    progress.measure(61.0)
    assert progress.rate == 0


def test_announcements_are_bounded_in_time_and_step() -> None:
    progress = Progress(0.0)
    progress.set_totals(1_000_000, 0)
    announced = []
    now = 0.0
    for done in range(0, 1_000_000, 1000):
        now += 0.01
        progress.set_bytes(done)
        if progress.due(now):
            announced.append((now, progress.fraction))
    assert 0 < len(announced) <= now / INTERVAL + 1
    for (one, low), (other, high) in itertools.pairwise(announced):
        assert other - one >= INTERVAL - 1e-9
        assert high - low >= 0.01 - 1e-9


def test_a_long_step_is_told_each_second() -> None:
    progress = Progress(0.0)
    progress.set_totals(1 << 40, 0)
    assert not progress.due(0.5)
    progress.set_bytes(1)
    assert progress.due(1.0)
    progress.set_bytes(2)
    assert not progress.due(1.5)
    assert progress.due(2.0)
    assert not progress.due(9.0)


def test_the_configuration_that_comes_first_does_not_hold_the_rate_down() -> None:
    progress = Progress(0.0)
    progress.set_totals(10_000_000, 0)
    progress.set_bytes(900)
    progress.measure(0.01)
    for step in range(1, 6):
        progress.set_bytes(900 + step * 200_000)
        progress.measure(0.01 + step * 0.2)
    assert 800_000 < progress.rate < 1_100_000
    assert progress.eta < 15_000_000
