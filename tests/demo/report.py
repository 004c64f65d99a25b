"""What the demo prints: headings, commands, what was checked, the summary."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class DemoFailed(Exception):
    """Something did not go as it should."""


@dataclass
class Report:
    """What the summary tells: how much was run, and what was seen to be true."""

    commands: int = 0
    checks: list[str] = field(default_factory=list)
    boots: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def check(self, what: str, truth: bool) -> None:
        """Note that ``what`` is true; raises ``DemoFailed`` if it is not."""
        if not truth:
            raise DemoFailed(f"not true: {what}")
        self.checks.append(what)
        print(f"  checked: {what}", flush=True)

    def booted(self, title: str) -> None:
        """Note that the host came up with what that menu entry starts."""
        self.boots.append(title)

    def lines(self) -> list[str]:
        """The figures of the summary."""
        seconds = time.monotonic() - self.started
        return [
            f"{self.commands} commands run, {len(self.checks)} results checked, {seconds:.0f} seconds.",
            f"The host came up {len(self.boots)} times: {', then '.join(self.boots)}.",
        ]


def heading(text: str) -> None:
    """A title above what follows."""
    print(f"\n=== {text}", flush=True)


def print_command(argv: Sequence[str]) -> None:
    """A command as one would type it."""
    words = ["python" if word == sys.executable else word for word in argv]
    print(f"$ {shlex.join(words)}", flush=True)
