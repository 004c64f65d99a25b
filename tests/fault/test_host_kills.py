"""Operations on a host killed at random moments of their work: workers and finalisers, by SIGKILL.

After each kill the deployments that run and that one can roll back to are whole, the boot loader would start
every line of its menu, status and bootc can be asked. Then, at random: the machine is restarted, bootc acts,
recovery runs, or the same is done again. In the end nothing is left that no deployment needs.

The moments are spread evenly over what the operation takes. Twenty kills of each operation, over all kinds of
hosts, or 200 with HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives another course of events.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bootc_model import Bootc, Refused

from hostimage_testing.explained import listing, unexplained
from hostimage_testing.forks import End, Forks, forking
from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.recorded import paths_of, problems_of, state_of
from hostimage_testing.standing import EDITED, REFERENCE, Standing, Stood
from hostimaged.host.status import scan
from hostimaged.jobs.operations import (
    Delete,
    KernelArguments,
    Operation,
    Order,
    Pin,
    Recover,
    Rollback,
    Stage,
    Switch,
    Unstage,
    Upgrade,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20240612"))
KILLS = 200 if SOAK else 20
#: One in so many is started by name, as the daemon and the unit do, and not forked.
FRESH = 20
#: What may be answered when an operation is done again that was done, or whose object went with the power.
REFUSALS = {"NothingStaged", "NoSuchDeployment", "NoRollback", "PreconditionFailed", "AlreadyBooted"}


#: References to configurations that are being written anew.
KEPT = re.compile("streams/refs/hostimaged(/|$)")
#: bootc activates, or in GRUB's menu drops, what is staged, and keeps the marker until the next boot.
LEFT_BY_BOOTC = {
    "a marker without a staged set",
    "a marker without entry or origin",
    "left over: run/composefs/staged-deployment",
}


@dataclass(frozen=True)
class Plan:
    """An operation: what the worker is told, or None for the finaliser; and where it can be done."""

    order: Callable[[Stood], Operation] | None
    kinds: tuple[Kind, ...] = KINDS


PLANS = {
    "stage": Plan(lambda s: Stage(manifest_digest=s.image.manifest_digest, reference=REFERENCE.image_text)),
    "upgrade": Plan(lambda s: Upgrade(reference=s.remote[0].source, verity="opportunistic")),
    "switch": Plan(lambda s: Switch(reference=s.remote[1].source, verity="opportunistic")),
    "unstage": Plan(lambda _: Unstage()),
    "rollback": Plan(lambda _: Rollback()),
    "default": Plan(lambda s: Rollback(action="default", deployment=s.rollback)),
    "delete": Plan(lambda s: Delete(deployment=s.rollback)),
    "pin": Plan(lambda s: Pin(deployment=s.rollback, pinned=True)),
    # Those of a unified kernel are its own.
    "kargs": Plan(lambda _: KernelArguments(add=("quiet",)), tuple(k for k in KINDS if not k.uki)),
    "finalize": Plan(None),
}


@dataclass
class Figures:
    """What happened."""

    killed: int = 0
    missed: int = 0
    changed: int = 0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Base:
    """Hosts to be copied, a process to fork from, and the judge."""

    standing: Standing
    forks: Forks
    cfsctl: str


class Campaign:
    """Kills of one operation."""

    def __init__(self, base: Base, plan: Plan, place: Path, noise: random.Random) -> None:
        self._base = base
        self._plan = plan
        self._place = place
        self._noise = noise
        self._forks = base.forks
        self.figures = Figures()
        self.course: list[str] = []
        self._seconds: dict[tuple[Kind, bool], list[float]] = {}
        self._contents: dict[Kind, set[str]] = {}
        self._menus: dict[Kind, list[list[str]]] = {}

    # Running

    def perform(
        self, stood: Stood, kill: tuple[int, float] | None = None, *, fresh: bool = False
    ) -> list[End]:
        """Do the operation; ``kill`` says in which of its processes and when."""
        if self._plan.order is None:
            return [self._forks.finalize(stood.host.root, None if kill is None else kill[1], fresh=fresh)]
        operation: Operation | None = self._plan.order(stood)
        ends: list[End] = []
        while operation is not None:
            moment = kill[1] if kill is not None and kill[0] == len(ends) else None
            ends.append(self._work(stood, operation, moment, fresh=fresh))
            result = ends[-1].result
            operation = None if result is None or moment is not None else operation.then(result)
        return ends

    def _work(
        self, stood: Stood, operation: Operation, moment: float | None = None, *, fresh: bool = False
    ) -> End:
        order = Order(root=str(stood.host.root), operation=operation)
        return self._forks.work(order.model_dump_json(), str(operation.profile), moment, fresh=fresh)

    def measure(self, kind: Kind, *, fresh: bool) -> None:
        """How long the operation takes as a whole, and what it leaves."""
        if fresh and self._plan.order is not None:
            # A worker tells when its work begins.
            self._seconds[kind, True] = list(self._seconds[kind, False])
            return
        seconds = []
        for _ in range(1 if fresh else 2):
            with copied(self._base.standing, kind, self._place) as stood:
                before, there = menu_of(stood.host), listing(stood.host.repository)
                ends = self.perform(stood, fresh=fresh)
                assert all(end.code == 0 and not end.error for end in ends), ends
                seconds.append([end.seconds for end in ends])
                self._contents[kind] = listing(stood.host.repository) | there
                self._menus[kind] = [before, menu_of(stood.host)]
        self._seconds[kind, fresh] = [min(each) for each in zip(*seconds, strict=True)]

    # One kill

    def strike(self, kind: Kind, number: int, share: float) -> None:
        """Kill it after ``share`` of its time, and look at what is left."""
        fresh = number % FRESH == FRESH // 2
        for started in sorted({False, fresh}):
            if (kind, started) not in self._seconds:
                self.measure(kind, fresh=started)
        with copied(self._base.standing, kind, self._place) as stood:
            untouched = listing(stood.host.root)
            ends = self.perform(stood, self._moment(kind, share, fresh=fresh), fresh=fresh)
            killed = ends[-1].code < 0
            assert killed or ends[-1].error == "", ends
            self.figures.killed += killed
            self.figures.missed += not killed
            self.figures.changed += listing(stood.host.root) != untouched
            if not killed:
                # The machine is faster than it was.
                known = self._seconds[kind, fresh]
                for at, end in enumerate(ends):
                    known[at] = min(known[at], end.seconds)
            self.aftermath(stood, kind)
            self.figures.counts.update(self.course)

    def _moment(self, kind: Kind, share: float, *, fresh: bool) -> tuple[int, float]:
        """In which of its processes, and when."""
        seconds = self._seconds[kind, fresh]
        left = share * sum(seconds)
        for at, each in enumerate(seconds[:-1]):
            if left < each:
                return at, left
            left -= each
        return len(seconds) - 1, left

    def aftermath(self, stood: Stood, kind: Kind) -> None:
        """What was left boots; whatever comes now, in the end nothing is left over."""
        self.whole(stood, kind)
        course = self._noise.choice(["nothing", "nothing", "reboot", "bootc", "bootc"])
        self.course = [course]
        if course == "reboot":
            stood.host.reboot()
            daemon_started(stood.host)
        strangers = course == "bootc" and self.bootc_acts(stood)
        if self._noise.random() < 0.5:
            self.course.append("recovered")
            self.recover(stood)
            self.clean(stood, kind, strangers=strangers, done=False)
        ends = self.perform(stood)
        self.course.append(ends[-1].error or "done")
        assert ends[-1].error == "" or ends[-1].error in REFUSALS, ends
        self.recover(stood)
        self.clean(stood, kind, strangers=strangers, done=not ends[-1].error)
        wrong = Bootc(stood.host.root, self._base.cfsctl, stood.host.images).accepts()
        assert [what for what in wrong if what not in (LEFT_BY_BOOTC if strangers else ())] == []

    def whole(self, stood: Stood, kind: Kind) -> None:
        """The menu is the old or the new one and starts; status and bootc's can be asked."""
        host = stood.host
        assert menu_of(host) in self._menus[kind]
        state = state_of(host)
        assert problems_of(state) == set()
        assert state.booted_deployment is not None
        assert str(state.booted_deployment.id) == stood.booted
        for row in state.visible:
            if row.live is not None:
                assert row.bootable, row.problems
                assert problems_of(row) == set()
        assert scan(paths_of(host))["problems"] == []
        wrong = Bootc(host.root, self._base.cfsctl, host.images).accepts()
        assert not any(what.startswith("status:") for what in wrong), wrong
        Judge(self._base.cfsctl, host.repository).check()

    def bootc_acts(self, stood: Stood) -> bool:
        """bootc does something, and recovery leaves what it did; whether it did not refuse to."""
        bootc = Bootc(stood.host.root, self._base.cfsctl, stood.host.images)
        acts: dict[str, Callable[[], object]] = {
            "rollback": bootc.rollback,
            "gc": bootc.gc,
            "finalize": bootc.finalize,
        }
        if menu_of(stood.host)[0] == stood.booted:
            # With another one first bootc drops what runs from GRUB's menu.
            acts["upgrade"] = lambda: bootc.upgrade(stood.image)
        name = self._noise.choice(list(acts))
        with suppress(Refused):
            done = acts[name]()
            self.course.append(name)
            before = menu_of(stood.host)
            self.recover(stood)
            assert menu_of(stood.host) == before
            if done == "staged":
                row = state_of(stood.host).staged_deployment
                assert row is not None
                assert str(row.id) == stood.image.id
            return True
        return False

    def recover(self, stood: Stood) -> None:
        """As the daemon does at its start."""
        end = self._work(stood, Recover())
        assert end.result == {"result": "recovered"}, end

    def clean(self, stood: Stood, kind: Kind, *, strangers: bool, done: bool) -> None:
        """Nothing is there but what deployments need, in the repository what the whole operation leaves."""
        host = stood.host
        waiting: set[str] = set()
        if strangers:
            # What bootc puts aside it leaves to its collector.
            waiting = set(host.images)
        elif self._plan.order is None:
            waiting = {stood.rollback}
        wrong = unexplained(host, waiting, etc=[Path(EDITED).name])
        assert [what for what in wrong if what not in (LEFT_BY_BOOTC if strangers else ())] == []
        if not strangers:
            # What keeps a configuration that is written anew goes with the next one that is written.
            kept = set() if done else {path for path in listing(host.repository) if KEPT.match(path)}
            assert listing(host.repository) - kept <= self._contents[kind]


@contextmanager
def copied(standing: Standing, kind: Kind, place: Path) -> Iterator[Stood]:
    """A host that is there for one kill."""
    stood = standing.copy(kind, place / "killed")
    daemon_started(stood.host)
    try:
        yield stood
    finally:
        shutil.rmtree(place / "killed")


def daemon_started(host: RecordedHost) -> None:
    """What the daemon does at its start before it has workers."""
    (host.root / "run/hostimaged").mkdir()


def menu_of(host: RecordedHost) -> list[str]:
    """Ids of what the boot loader offers; each would start."""
    return [host.startable(line).id for line in host.menu()]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """In memory, where there is such a place: no file system loses what was written by whoever is killed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def base(place: Path, cfsctl: str) -> Iterator[Base]:
    """Hosts to be copied, and a process to fork from."""
    with forking() as forks:
        yield Base(Standing(place, cfsctl), forks, cfsctl)


@pytest.mark.timeout(1800 if SOAK else 300)
@pytest.mark.parametrize("name", PLANS)
def test_killed(name: str, base: Base, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = PLANS[name]
    noise = random.Random(f"{SEED} {name}")
    campaign = Campaign(base, plan, place, noise)
    figures = campaign.figures
    for number in range(3 * KILLS):
        if figures.killed == KILLS:
            break
        share = (figures.killed + noise.random()) / KILLS
        try:
            campaign.strike(plan.kinds[number % len(plan.kinds)], number, share)
        except BaseException as error:
            error.add_note(
                f"seed {SEED}, {name} number {number}, at {share:.3f} of its time: {campaign.course}"
            )
            raise
    figures = campaign.figures
    # Not all too early, nor too late.
    assert figures.killed > KILLS // 3
    assert figures.changed > 0
    with capsys.disabled():
        print(f" [seed {SEED}, {figures}]", end="")
