"""Random hosts and random stores: what a collection takes from the store, against a naive model.

The store is written file by file, and only the plan is looked at; that podman does it is tried elsewhere.
Twenty of them by default, two hundred with HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives others.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import stores, tars
from hostimage_testing.hosts import Deployment, RecordedHost
from hostimage_testing.operating import session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.host.collectplan import Rules, make_plan
from hostimaged.ids import DeploymentId
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

SEED = int(os.environ.get("HOSTIMAGE_SEED", "20261201"))
EXAMPLES = 200 if os.environ.get("HOSTIMAGE_SOAK") == "1" else 20
DAY = 24 * 3600
LAYER = tars.directory(b"usr") + tars.file(b"usr/file", b"content " * 100) + tars.END
RECIPES = (
    Recipe(version="1", bound=("localhost/one", "docker.io/busybox:1")),
    Recipe(version="2", kernel=b"kernel two ", bound=("quay.io/org/two@sha256:" + "2" * 64,)),
    Recipe(version="3", kernel=b"kernel three ", bound=("three:3",)),
)
#: What each is bound to, as a store calls it.
BOUND = (
    {"localhost/one:latest", "docker.io/library/busybox:1"},
    {"quay.io/org/two@sha256:" + "2" * 64},
    {"docker.io/library/three:3", "localhost/three:3"},
)
#: What an origin may say, and the name that a store has for it.
REFERENCES = {
    "docker://localhost/os": "localhost/os:latest",
    "docker://quay.io/os:2": "quay.io/os:2",
    "registry:docker.io/os": "docker.io/library/os:latest",
    "containers-storage:localhost/built:1": "localhost/built:1",
    "docker://quay.io/os:4@sha256:" + "4" * 64: "quay.io/os@sha256:" + "4" * 64,
}
NAMES = sorted(
    set().union(*BOUND) | set(REFERENCES.values()) | {"localhost/one:1", "quay.io/org/two:1", "quay.io/os:4"}
)


@dataclass
class Drawn:
    live: list[int]
    references: list[str]
    #: Names of each image of the store, and which deployment's configuration and manifest it has, or none.
    images: list[tuple[set[str], int | None, bool]] = field(default_factory=list)
    without: bool = False


def draw(chance: random.Random) -> Drawn:
    """A host with one to three deployments, and a store in which most names occur."""
    live = chance.sample(range(3), chance.randint(1, 3))
    references = chance.choices(sorted(REFERENCES), k=3)
    images = []
    for _ in range(chance.randint(4, 20)):
        names = set(chance.sample(NAMES, chance.choice([0, 1, 1, 1, 2])))
        of = chance.choice([None, None, None, None, 0, 1, 2])
        images.append((names, of, chance.random() < 0.8))
    return Drawn(live, references, images, without=chance.random() < 0.5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> tuple[RecordedHost, list[OsImage]]:
    host = RecordedHost(tmp_path_factory.mktemp("random") / "host", cfsctl)
    return host, [host.image(recipe) for recipe in RECIPES]


def build(host: RecordedHost, made: list[OsImage], drawn: Drawn) -> list[Deployment]:
    deployments = [host.deploy(made[at]) for at in drawn.live]
    for deployment, reference in zip(deployments, drawn.references, strict=False):
        host.write_origin(deployment, reference=f"ostree-unverified-image:{reference}")
    host.live(*deployments)
    host.booted(deployments[0])
    store = stores.Store(HostPaths.scratch(host.root).store)
    layer = store.layer(LAYER)
    for number, (names, of, old) in enumerate(drawn.images):
        store.image(*sorted(names), layers=[layer, store.layer(LAYER + bytes(512 * (number + 1)), [layer])])
        entry = store.images[-1]
        if of is not None:
            entry["digest"] = made[of].manifest_digest
        if old:
            then = time.time() - 2 * DAY
            os.utime(store.root / "overlay-images" / entry["id"], (then, then))
    store.containers([])
    return deployments


def expected(drawn: Drawn, staying: list[int]) -> set[int]:
    """Which of the images of the store go."""
    wanted = set().union(*(BOUND[at] for at in staying))
    for at, reference in zip(drawn.live, drawn.references, strict=False):
        if at in staying:
            wanted.add(REFERENCES[reference])
    return {
        number
        for number, (names, of, old) in enumerate(drawn.images)
        if old and not names & wanted and of not in staying
    }


def test_random_hosts(images: tuple[RecordedHost, list[OsImage]], tmp_path: Path, cfsctl: str) -> None:
    first, made = images

    chance = random.Random(SEED)
    for number in range(EXAMPLES):
        drawn = draw(chance)
        root = tmp_path / str(number)
        host = first.copy(root)
        deployments = build(host, made, drawn)
        with session(host) as opened:
            plan = partial(
                make_plan, opened.paths, opened.repository, opened.state(), Rules(), now=opened.now()
            )
            check(plan().store, drawn, drawn.live)
            if drawn.without and len(drawn.live) > 1:
                # Its tag is old enough not to be bootc's for a deployment that is to come.
                last = deployments[-1]
                then = time.time() - 2 * DAY
                os.utime(host.tag(last.image), (then, then), follow_symlinks=False)
                check(plan(without=DeploymentId(last.id)).store, drawn, drawn.live[:-1])
        shutil.rmtree(root)


def check(plan: Any, drawn: Drawn, staying: list[int]) -> None:
    assert plan.doubts == ()
    assert len(plan.stay) + len(plan.gone) == len(drawn.images)
    gone = {tuple(sorted(image.names)) for image in plan.gone}
    wanted = [tuple(sorted(drawn.images[number][0])) for number in expected(drawn, staying)]
    assert sorted(gone) == sorted(set(wanted))
    assert len(plan.gone) == len(wanted)
    assert all(reasons for _, reasons in plan.stay)
    assert not plan.gone or plan.freed > 0
