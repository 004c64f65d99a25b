"""The scenarios: how the host is when the mock starts, and how its jobs end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hostimage_dbus.errors import ErrorName

IMAGE: Final = "docker://registry.example/os:stable"


@dataclass(frozen=True, slots=True)
class Failing:
    """How a job ends that does not succeed: error and message, at ``progress`` (0 to 1)."""

    name: ErrorName
    message: str
    progress: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation.

    ``update``: whether there is an update, and how far it is: "", available, downloaded or staged.
    ``pulling``: a pull runs and stands still at this progress. ``failing``: how every job ends.
    ``failed``: whether one ended so already. ``denied``: whether polkit would let nobody do anything.
    """

    name: str
    summary: str
    update: str = ""
    pulling: float | None = None
    failing: Failing | None = None
    failed: bool = False
    denied: bool = False


_NETWORK: Final = Failing(ErrorName.NETWORK, "registry.example cannot be reached: no route to host", 0.42)

SCENARIOS: Final = (
    Scenario("idle", "the host is up to date and nothing happens"),
    Scenario("update-available", "a check found an update; it is not downloaded", update="available"),
    Scenario(
        "pull-at-60-percent",
        "an update is being downloaded and stays at 60 %; it can be cancelled",
        update="available",
        pulling=0.6,
    ),
    Scenario(
        "failure",
        "the last pull failed, and every job fails",
        update="available",
        failing=_NETWORK,
        failed=True,
    ),
    Scenario("reboot-required", "an update is staged and waits for a restart", update="staged"),
    Scenario(
        "denied",
        "somebody would have to be asked for every change, and says no",
        update="available",
        denied=True,
    ),
)


def find(name: str) -> Scenario:
    """The scenario called ``name``; raises ``KeyError``."""
    return {scenario.name: scenario for scenario in SCENARIOS}[name]
