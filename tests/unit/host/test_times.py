"""Times of image configurations."""

from __future__ import annotations

import pytest

from hostimaged.host.times import microseconds, utc_text


@pytest.mark.parametrize(
    ("text", "expected", "normal"),
    [
        ("2026-11-01T08:00:00Z", 1_793_520_000_000_000, "2026-11-01T08:00:00Z"),
        ("2026-11-01T08:00:00.5Z", 1_793_520_000_500_000, "2026-11-01T08:00:00.500Z"),
        ("2026-11-01T08:00:00.123456789Z", 1_793_520_000_123_456, "2026-11-01T08:00:00.123456789Z"),
        ("2026-11-01T08:00:00.123400Z", 1_793_520_000_123_400, "2026-11-01T08:00:00.123400Z"),
        ("2026-11-01T10:00:00+02:00", 1_793_520_000_000_000, "2026-11-01T08:00:00Z"),
        ("1970-01-01T00:00:00Z", 0, "1970-01-01T00:00:00Z"),
        ("0001-01-01T00:00:00Z", 0, "0001-01-01T00:00:00Z"),
        ("1969-12-31T23:59:59Z", 0, "1969-12-31T23:59:59Z"),
        ("0001-01-01T00:00:00+10:00", 0, None),
        ("2026-13-01T08:00:00Z", 0, None),
        ("2026-11-01", 0, None),
        ("2026-11-01T08:00:00", 0, None),
        ("٢٠٢٦-11-01T08:00:00Z", 0, None),
        ("", 0, None),
    ],
)
def test_times(text: str, expected: int, normal: str | None) -> None:
    assert microseconds(text) == expected
    assert utc_text(text) == normal
