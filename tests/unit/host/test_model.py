"""The model of a host: what follows from its facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hostimaged.boot.loader import Bootloader
from hostimaged.bus.findings import Findings
from hostimaged.errors import NoSuchDeployment
from hostimaged.host.bootdirs import BootDirs
from hostimaged.host.booted import Booted
from hostimaged.host.entries import BootSets
from hostimaged.host.marker import Marker
from hostimaged.host.model import (
    Deployment,
    HostState,
    ImageFacts,
    Problem,
    ProblemId,
    Role,
    rollback_queued,
)
from hostimaged.host.status import deployments
from hostimaged.ids import DeploymentId

A, B, C = (DeploymentId(digit * 128) for digit in "abc")


@pytest.mark.parametrize(
    ("booted", "default", "staged", "expected"),
    [
        (A, A, None, False),
        (A, B, None, True),
        (A, A, C, False),
        (A, B, C, True),
        # Between the exchange of a finalizer and the reboot.
        (A, C, C, False),
        (A, None, None, False),
        (None, A, None, False),
        (None, None, None, False),
    ],
)
def test_r32_rollback_is_queued_if_the_first_of_the_menu_neither_runs_nor_is_staged(
    booted: DeploymentId | None,
    default: DeploymentId | None,
    staged: DeploymentId | None,
    expected: bool,
) -> None:
    assert rollback_queued(booted, default, staged) is expected


@pytest.mark.parametrize("loader", Bootloader)
def test_a_state_answers_by_roles(loader: Bootloader) -> None:
    rows = (
        Deployment(C, Role.STAGED),
        Deployment(A, Role.BOOTED, default=True),
        Deployment(B, Role.ROLLBACK),
        Deployment(DeploymentId("d" * 128), Role.HIDDEN),
    )
    dirs = BootDirs(loader, Path("/x"), Path("/x"), "", None)
    state = HostState(rows, loader, dirs, BootSets(None, None), Booted(A), Marker(C))
    assert (state.staged_deployment, state.booted_deployment, state.rollback_deployment) == rows[:3]
    assert state.visible == rows[:3]
    assert state.default_deployment == rows[1]
    assert state.next_deployment == rows[0]
    locked = replace(state, deployments=(replace(rows[0], locked=True), *rows[1:]))
    assert locked.next_deployment == rows[1]
    assert state.get(A) == rows[1]
    assert state.find(rows[3].id) == rows[3]
    for missing in (rows[3].id, DeploymentId("e" * 128)):
        with pytest.raises(NoSuchDeployment):
            state.get(missing)
    assert not state.rollback_queued


@pytest.mark.parametrize(
    ("problem", "bootable"),
    [
        (ProblemId.STATE_MISSING, False),
        (ProblemId.IMAGE_MISSING, False),
        (ProblemId.ARTIFACT_MISSING, False),
        (ProblemId.ORIGIN_MISSING, True),
        (ProblemId.METADATA_MISSING, True),
    ],
)
def test_some_problems_keep_a_deployment_from_starting(problem: ProblemId, bootable: bool) -> None:
    assert Deployment(A, Role.OTHER, problems=(Problem(problem, "x"),)).bootable is bootable


def test_an_image_of_a_far_future_does_not_break_the_status() -> None:
    """What a scan tells is taken in by the daemon, whatever time an image gives itself."""
    facts = ImageFacts(None, None, created="2300-01-01T00:00:00Z")
    dirs = BootDirs(Bootloader.SYSTEMD, Path("/x"), Path("/x"), "", None)
    row = Deployment(A, Role.BOOTED, image=facts)
    state = HostState((row,), Bootloader.SYSTEMD, dirs, BootSets(None, None), Booted(A), None)
    found = Findings.model_validate(deployments(state))
    assert [row.timestamp for row in found.deployments] == [0]
