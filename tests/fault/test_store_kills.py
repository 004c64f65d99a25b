"""Work on the store that bootc owns, killed at random moments, podman or all: what is needed stays or comes.

Four kills of each kind by default, fifty with HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives another course.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing import collect_once, fetch_once
from hostimage_testing.hosts import Kind, Loader, RecordedHost
from hostimage_testing.layout import Layout
from hostimage_testing.operating import session
from hostimage_testing.os_images import OsImage, Recipe
from hostimage_testing.owned_stores import age_images, names, podman_on, put, stored
from hostimage_testing.registry import Registry
from hostimage_testing.samples import copy, three_layers
from hostimage_testing.tools import require
from hostimaged.host import boundimages, boundstore
from hostimaged.host.collect import collect
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts of its own need root"),
    pytest.mark.timeout(1800),
]
SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20261201"))
KILLS = 50 if SOAK else 4
PATIENCE = 120.0
LIVE = "localhost/app:latest"


@dataclass(frozen=True)
class Scene:
    host: RecordedHost
    image: OsImage


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, cfsctl: str, registry: Registry, skopeo: str) -> Scene:
    """A host with an image that is bound to one in the store, and one that is bound to one in a registry."""
    require("podman")
    place = tmp_path_factory.mktemp("storekills")
    host = RecordedHost(place / "host", cfsctl, kind=Kind(Loader.SYSTEMD))
    booted = host.deploy(host.image(Recipe(version="1", bound=(LIVE,))))
    host.live(booted)
    host.booted(booted)
    (host.root / "etc/containers/registries.conf").write_text(registry.registries_conf)
    layout = Layout(place / "app")
    three_layers(layout)
    name = f"{registry.host}/killed{os.getpid()}:1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    image = host.image(Recipe(version="2", kernel=b"kernel two ", bound=(name,)))
    # Not to be collected, though nothing is of it.
    host.write_tag(image, "localhost/kept-")
    return Scene(host, image)


def fill(host: RecordedHost) -> None:
    """Needed and unneeded images; those that share layers among them."""
    with podman_on(host) as podman:
        put(podman, LIVE)
        for at in range(4):
            put(podman, f"localhost/gone:{at}", f"localhost/gone:also{at}")
    age_images(host)


@contextmanager
def running(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("\n")
            process.stdin.flush()
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def podmen(process: subprocess.Popen[str]) -> list[int]:
    """The programs that the process started."""
    found = []
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(pid) for pid in task.read_text().split()]
    return found


def killed(process: subprocess.Popen[str], after: float, *, podman: bool) -> str:
    """Kill the process so many seconds from now, or what it has started then; says what became of it."""
    end = time.monotonic() + after
    while process.poll() is None and (time.monotonic() < end or (podman and not podmen(process))):
        time.sleep(0.005)
    if not podman:
        process.kill()
    for pid in podmen(process) if podman else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    return {0: "done", -signal.SIGKILL: "killed"}.get(process.returncode, "failed")


def in_order(host: RecordedHost, *wanted: str) -> None:
    """podman finds its store in order, with whole images of these names."""
    with podman_on(host) as podman:
        for name in wanted:
            podman.run(["image", "inspect", name])
        for image in stored(host).values():
            podman.run(["image", "tree", image.id])
    for image in stored(host).values():
        store = HostPaths.scratch(host.root).store
        assert all((store / "overlay" / top / "diff").is_dir() for top in image.tops)


@pytest.mark.parametrize("podman", [False, True])
def test_collections(scene: Scene, *, podman: bool) -> None:
    chance = random.Random(SEED + podman)
    host = scene.host
    ends: Counter[str] = Counter()
    shutil.rmtree(host.repository / "bootc", ignore_errors=True)
    fill(host)
    start = time.monotonic()
    with running(sys.executable, str(collect_once.__file__), host.root) as process:
        process.communicate(timeout=PATIENCE)
    took = time.monotonic() - start
    assert names(host) == {LIVE}
    for _ in range(KILLS):
        fill(host)
        with running(sys.executable, str(collect_once.__file__), host.root) as process:
            ends[killed(process, chance.uniform(0, took * 0.8), podman=podman)] += 1
        assert LIVE in names(host)
        with session(host) as opened:
            collect(opened)
        assert names(host) == {LIVE}
        assert len(stored(host)) == 1
        in_order(host, LIVE)
        with session(host) as opened:
            assert collect(opened)["result"] == "nothing"
    print(f"seed {SEED}: {KILLS} kills of {'podman' if podman else 'all'} within {took:.1f} s: {dict(ends)}")
    assert ends["killed"] or podman


@pytest.mark.parametrize("podman", [False, True])
def test_fetches(scene: Scene, *, podman: bool) -> None:
    chance = random.Random(SEED + 7 + podman)
    host, image = scene.host, scene.image
    paths = HostPaths.scratch(host.root)
    (wanted,) = image.recipe.bound
    ends: Counter[str] = Counter()
    shutil.rmtree(host.repository / "bootc", ignore_errors=True)
    start = time.monotonic()
    with running(sys.executable, str(fetch_once.__file__), host.root, image.id) as process:
        process.communicate(timeout=PATIENCE)
    took = time.monotonic() - start
    assert names(host) == {wanted}
    for _ in range(KILLS):
        shutil.rmtree(host.repository / "bootc")
        with running(sys.executable, str(fetch_once.__file__), host.root, image.id) as process:
            ends[killed(process, chance.uniform(0, took * 0.8), podman=podman)] += 1
        # Half an image has no name.
        if wanted in names(host):
            in_order(host, wanted)
        with session(host) as opened:
            bound = boundimages.of_deployment(opened.repository, DeploymentId(image.id))
        boundstore.fetch(paths, bound, Silent())
        assert names(host) == {wanted}
        in_order(host, wanted)
    print(f"seed {SEED}: {KILLS} kills of {'podman' if podman else 'all'} within {took:.1f} s: {dict(ends)}")
    assert ends["killed"] or podman
