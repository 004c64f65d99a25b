"""Times as image configurations write them (RFC 3339)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,30}))?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII
)
_NANO_DIGITS: Final = 9
#: Exact in JSON everywhere; in the year 2255.
_LATEST: Final = (1 << 53) - 1


def _parse(text: str) -> tuple[datetime, int] | None:
    """The whole second in UTC, and nanoseconds."""
    found = _TIME.match(text)
    if found is None:
        return None
    day, clock, fraction, zone = found.groups()
    try:
        time = datetime.fromisoformat(f"{day}T{clock}{'+00:00' if zone in 'Zz' else zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time, int((fraction or "0")[:_NANO_DIGITS].ljust(_NANO_DIGITS, "0"))


def microseconds(text: str) -> int:
    """An RFC 3339 time in microseconds since the epoch; 0 for anything else.

    Also for times before it, and for those that are too late for a number in JSON: nobody made an image then.
    """
    found = _parse(text)
    if found is None:
        return 0
    time, nanoseconds = found
    since = (time - _EPOCH) // timedelta(microseconds=1) + nanoseconds // 1000
    return since if 0 <= since <= _LATEST else 0


def utc_text(text: str) -> str | None:
    """An RFC 3339 time in UTC with as many digits as it needs, of 0, 3, 6 and 9; None for anything else."""
    found = _parse(text)
    if found is None:
        return None
    time, nanoseconds = found
    digits = f"{nanoseconds:09d}"
    while digits and digits.endswith("000"):
        digits = digits[:-3]
    return f"{time.replace(tzinfo=None).isoformat()}{'.' if digits else ''}{digits}Z"
