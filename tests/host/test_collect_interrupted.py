"""Collections interrupted at every step, or by a disk that fails: nothing live is lost, repeating ends it.

All steps with HOSTIMAGE_SOAK=1; by default of those that come in hundreds the first two and the last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.collecting import DAY, age, collected, objects, told
from hostimage_testing.disk import EXPECTED, Crash, Disk
from hostimage_testing.explained import unexplained
from hostimage_testing.hosts import KINDS, Kind
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, staged, upgraded
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.errors import Cancelled, HostimageError
from hostimaged.host import reorder
from hostimaged.host.collect import FAULT_POINTS, collect
from hostimaged.ids import DeploymentId

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
Recorded = Callable[..., Life]


@dataclass(frozen=True)
class Stood:
    """A host with leftovers of every kind, and the image that only a dead tag keeps."""

    life: Life
    image: OsImage

    @property
    def live(self) -> list[str]:
        assert self.life.staged is not None
        return [self.life.booted.id, self.life.staged.id]


def stand(recorded: Recorded, kind: Kind) -> Stood:
    life = recorded(staged, kind)
    host = life.host
    assert life.rollback is not None
    # An entry without state, state without an entry, a dead tag, objects of nobody, a tag that is missing.
    shutil.rmtree(host.state(life.rollback))
    age(host.tag(life.rollback.image), 2 * DAY)
    orphan = host.deploy(host.image(Recipe(version="60", kernel=b"kernel sixty ")))
    age(host.tag(orphan.image), 2 * DAY)
    image = host.image(Recipe(version="61"))
    age(host.write_tag(image), 2 * DAY)
    host.image(Recipe(version="62"))
    host.tag(life.booted.image).unlink()
    return Stood(life, image)


def check(stood: Stood, cfsctl: str) -> None:
    """What is live is whole; what reads the host reads it; and once more ends it."""
    host = stood.life.host
    Judge(cfsctl, host.repository).check()
    for line in host.menu():
        # What never started, as it has no state, may still be there.
        if stood.life.booted.id in f"{line.text} {line.get('options') or ''}":
            assert host.startable(line).id == stood.life.booted.id
    with session(host) as opened:
        state = opened.state()
        assert {str(row.id) for row in state.visible} >= set(stood.live)
        assert all(row.bootable for row in state.visible if str(row.id) in stood.live)
    Bootc(host.root, cfsctl, host.images).status()
    with session(host) as opened:
        collect(opened)
    assert collected(host)["result"] == "nothing"
    assert {
        row for row in (path.name for path in (host.repository / "images").iterdir()) if len(row) > 9
    } >= {*stood.live}
    assert not (host.repository / "images" / stood.image.id).exists()
    assert not list(host.root.rglob(".hostimaged-*"))
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


class _Steps(At):
    """Never raises; knows the steps afterwards."""

    def __init__(self) -> None:
        super().__init__(-1)


def chosen(points: list[str]) -> list[int]:
    """The steps to be interrupted at."""
    if SOAK:
        return list(range(len(points)))
    total, seen = Counter(points), Counter[str]()
    steps = []
    for number, point in enumerate(points):
        seen[point] += 1
        if seen[point] <= 2 or seen[point] == total[point]:
            steps.append(number)
    return steps


@pytest.fixture
def steps(recorded: Recorded, kind: Kind, tmp_path: Path) -> list[str]:
    """The points of a collection that is not interrupted."""
    stood, reporter = stand(recorded, kind), _Steps()
    with session(stood.life.host, reporter) as opened:
        assert collect(opened)["result"] == "collected"
    shutil.rmtree(stood.life.host.root)
    return reporter.points


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]], ids=str)
def test_every_step_has_a_name(steps: list[str]) -> None:
    assert set(FAULT_POINTS) <= set(steps)
    places = [FAULT_POINTS.index(point) for point in steps if point in FAULT_POINTS]
    assert places == sorted(places), "in the order in which they are told"


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]], ids=str)
@pytest.mark.parametrize("ending", [Crash, Cancelled], ids=["crash", "cancel"])
def test_a5_interrupted_at_every_step(
    recorded: Recorded, kind: Kind, ending: type[BaseException], steps: list[str], cfsctl: str
) -> None:
    done = 0
    for number in chosen(steps):
        stood = stand(recorded, kind)
        try:
            with session(stood.life.host, At(number, ending)) as opened:
                collect(opened)
        except ending:
            done += 1
        else:
            assert ending is Cancelled, f"step {number}, {steps[number]}"
        if number % 2:
            # Whoever comes first after a crash finishes what is about deployments.
            with session(stood.life.host) as opened:
                reorder.begin(opened)
        check(stood, cfsctl)
        shutil.rmtree(stood.life.host.root)
    assert done > 20


def test_a5_an_administrators_collector_may_come_in_between(recorded: Recorded, cfsctl: str) -> None:
    """After every group of a collection that was killed, ``cfsctl gc`` harms nothing."""
    for point in ("collect.tagged", "collect.entries", "collect.states", "collect.untagged", "gc.synced"):
        stood = stand(recorded, KINDS[2])
        with pytest.raises(Crash), session(stood.life.host, _AtPoint(point)) as opened:
            collect(opened)
        Judge(cfsctl, stood.life.host.repository)("gc")
        check(stood, cfsctl)
        shutil.rmtree(stood.life.host.root)


class _AtPoint(At):
    """Crashes where a point is first reached."""

    def __init__(self, point: str) -> None:
        super().__init__(-1)
        self._point = point

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point == self._point:
            raise Crash


#: Changes of the file system between two that fail: all in a long run would take an hour.
STRIDES = {errno.ENOSPC: 11, errno.EIO: 13, errno.EROFS: 17}


@pytest.mark.slow
@pytest.mark.parametrize("code", STRIDES, ids=lambda code: errno.errorcode[code])
def test_a_disk_that_fails(
    recorded: Recorded, code: int, cfsctl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, failures = 0, 0
    while True:
        stood = stand(recorded, KINDS[2])
        failure: HostimageError | None = None
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            disk.install()
            disk.plan(at, code)
            try:
                with session(stood.life.host) as opened:
                    collect(opened)
            except HostimageError as error:
                failure = error
        if disk.count <= at:
            break
        if failure is not None:
            assert isinstance(failure, EXPECTED[code]), failure
        failures += failure is not None
        check(stood, cfsctl)
        shutil.rmtree(stood.life.host.root)
        at += 1 if SOAK else STRIDES[code]
    assert failures > 3


def test_a_dry_run_after_a_crash_counts_what_is_interrupted_as_kept(recorded: Recorded, cfsctl: str) -> None:
    stood = stand(recorded, KINDS[2])
    with pytest.raises(Crash), session(stood.life.host, _AtPoint("collect.entries")) as opened:
        collect(opened)
    before = objects(stood.life.host.repository)
    assert "states" not in told(stood.life.host)
    assert objects(stood.life.host.repository) == before
    check(stood, cfsctl)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]], ids=str)
def test_r15_after_a_deletion_killed_anywhere_a_collection_leaves_nothing_of_it(
    recorded: Recorded, kind: Kind, cfsctl: str
) -> None:
    """The entry goes with the state, or both stay; nobody has recovered anything in between."""
    number, gone = 0, 0
    while True:
        life = recorded(upgraded, kind)
        host = life.host
        assert life.rollback is not None
        try:
            with session(host, At(number)) as opened:
                reorder.delete(opened, DeploymentId(life.rollback.id))
        except Crash:
            pass
        else:
            break
        with session(host) as opened:
            assert collect(opened)["result"] in ("collected", "nothing")
        offered = {host.startable(line).id for line in host.menu()}
        assert offered in ({life.booted.id}, {life.booted.id, life.rollback.id})
        gone += life.rollback.id not in offered
        assert host.state(life.rollback).exists() == (life.rollback.id in offered)
        Judge(cfsctl, host.repository).check()
        assert unexplained(host) == []
        shutil.rmtree(host.root)
        number += 1
    assert number > 2
    assert gone
