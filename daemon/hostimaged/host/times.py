"""Times as image configurations write them (RFC 3339)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,12}))?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII
)
_FRACTION_DIGITS: Final = 6


def microseconds(text: str) -> int:
    """An RFC 3339 time in microseconds since the epoch; 0 for anything else, and for times before it."""
    found = _TIME.match(text)
    if found is None:
        return 0
    day, clock, fraction, zone = found.groups()
    fraction = (fraction or "")[:_FRACTION_DIGITS].ljust(_FRACTION_DIGITS, "0")
    try:
        time = datetime.fromisoformat(f"{day}T{clock}.{fraction}{'+00:00' if zone in 'Zz' else zone}")
    except ValueError:
        return 0
    return max((time - _EPOCH) // timedelta(microseconds=1), 0)
