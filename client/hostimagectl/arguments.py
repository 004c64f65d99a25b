"""Types of command line arguments: text in, a checked value out, or ``ArgumentTypeError``.

Only what the daemon cannot say better is checked here.
"""

from __future__ import annotations

import argparse
import re
import time
from datetime import datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HIGHEST_ID: Final = 2**64 - 1
_MICRO: Final = 1_000_000
#: Longest span of a hold; beyond that a typing error is likelier.
_LONGEST_SPAN: Final = 366 * 86400
_UNITS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN: Final = re.compile(rf"([0-9]{{1,9}})({'|'.join(_UNITS)})", re.ASCII)
#: A name of a deployment becomes part of no path, but of messages: short and printable.
_NAME_LIMIT: Final = 128


def job_id(text: str) -> int:
    """The number of a job."""
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or not 0 < int(text) <= _HIGHEST_ID:
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is not the number of a job")
    return int(text)


def deployment_name(text: str) -> str:
    """An alias or the start of a deployment's id; the daemon knows which exist."""
    if not text or len(text) > _NAME_LIMIT or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is not the name of a deployment")
    return text


def one_of(yes: str, no: str) -> Callable[[str], bool]:
    """A type that understands two words."""

    def convert(text: str) -> bool:
        if text not in (yes, no):
            raise argparse.ArgumentTypeError(f"{text[:64]!r} is neither {yes!r} nor {no!r}")
        return text == yes

    return convert


def span_or_time(text: str) -> int:
    """A span from now (``2h``) or a local time in ISO form: microseconds since the epoch, in the future."""
    now = time.time()
    match = _SPAN.fullmatch(text)
    if match:
        end = now + int(match[1]) * _UNITS[match[2]]
    else:
        try:
            end = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise argparse.ArgumentTypeError(
                f"{text[:64]!r} is neither a span such as 2h nor a time such as 2030-12-31T08:00"
            ) from None
    if end <= now:
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is not in the future")
    if end > now + _LONGEST_SPAN:
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is more than a year away")
    return int(end * _MICRO)


def words(choices: Sequence[str]) -> str:
    """``a, b or c``."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
