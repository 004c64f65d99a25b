"""Collections killed at random moments while others use the repository: nothing that anybody wants is lost.

Each time ``cfsctl`` pulls an image, another ``cfsctl gc`` waits for its turn, and bootc writes a tag before
there is a deployment of it. Then collecting again ends the work. Twenty kills by default, two hundred with
HOSTIMAGE_SOAK=1; HOSTIMAGE_SEED gives another course of events.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing import collect_once
from hostimage_testing.collecting import DAY, age, collected
from hostimage_testing.hosts import Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, staged
from hostimage_testing.operating import session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.host.collect import collect

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20261123"))
KILLS = 200 if SOAK else 20
#: Seconds for anything that a machine with other work does in one.
PATIENCE = 60.0


@dataclass(frozen=True)
class Scene:
    """A host with garbage, what others are about to pull, and what bootc is about to deploy."""

    life: Life
    garbage: OsImage
    pulled: OsImage
    tagged: OsImage

    def copy(self, root: Path) -> Scene:
        host = self.life.host.copy(root)
        return Scene(
            Life(host, self.life.booted, self.life.rollback, self.life.staged),
            self.garbage,
            self.pulled,
            self.tagged,
        )

    @property
    def host(self) -> RecordedHost:
        return self.life.host


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Scene:
    host = RecordedHost(tmp_path_factory.mktemp("kills") / "host", cfsctl, kind=Kind(Loader.SYSTEMD))
    noise = random.Random(SEED)
    many = {f"usr/share/noise/{number}": noise.randbytes(600) for number in range(400)}
    life = staged(host)
    garbage = host.image(Recipe(version="60", kernel=b"kernel sixty ", files=many))
    orphan = host.deploy(garbage)
    age(host.tag(orphan.image), 2 * DAY)
    other = {f"usr/share/noise/{number}": noise.randbytes(600) for number in range(300)}
    pulled = host.image(Recipe(version="61", files=other))
    tagged = host.image(Recipe(version="62"))
    # Pulled anew by each: what is there only for having no name is as if it were not.
    Judge(cfsctl, host.repository)("gc")
    host.maker._pull(host.repository, garbage.tag)
    host.maker._run(host.repository, "oci", "untag", garbage.tag)
    return Scene(life, garbage, pulled, tagged)


@contextmanager
def running(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def collecting(host: RecordedHost) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for a line to collect."""
    with running(sys.executable, str(collect_once.__file__), host.root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def measure(scene: Scene, root: Path) -> float:
    """Seconds that a collection takes which nobody disturbs."""
    copy = scene.copy(root)
    with collecting(copy.host) as process:
        start = time.monotonic()
        begin(process)
        out, _ = process.communicate(timeout=PATIENCE)
    assert out == "collected\n", out
    shutil.rmtree(root)
    return time.monotonic() - start


@pytest.mark.timeout(3000 if SOAK else 600)
def test_random_kills(scene: Scene, tmp_path: Path, cfsctl: str, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(SEED)
    whole = measure(scene, tmp_path / "measure")
    figures: Counter[str] = Counter()
    while figures["killed"] < KILLS:
        figures["rounds"] += 1
        assert figures["rounds"] < 3 * KILLS, figures
        host = scene.copy(tmp_path / "host").host
        strike(scene, host, cfsctl, chance, whole, figures)
        shutil.rmtree(host.root)
    with capsys.disabled():
        print(f" [seed {SEED}, {dict(figures)}]", end="")
    assert figures["tags"] > 0


def strike(
    scene: Scene, host: RecordedHost, cfsctl: str, chance: random.Random, whole: float, figures: Counter[str]
) -> None:
    judge = Judge(cfsctl, host.repository)
    base = (cfsctl, "--repo", host.repository, "--insecure")
    commands = [
        (*base, "oci", "pull", "--bootable", scene.pulled.source, "localhost/app"),
        (*base, "gc"),
    ]
    tagged = chance.random() < 0.5
    if tagged:
        # All that bootc does before it deploys.
        name = f"localhost/bootc-{scene.tagged.manifest_digest}"
        commands.insert(0, (*base, "oci", "pull", "--bootable", scene.tagged.source, name))
    with ExitStack() as stack:
        process = stack.enter_context(collecting(host))
        others = [stack.enter_context(running(*command)) for command in commands]
        time.sleep(chance.uniform(0, 0.1))
        begin(process)
        time.sleep(chance.uniform(0, 1.2 * whole))
        figures["killed"] += process.poll() is None
        process.kill()
        for other in others:
            out, _ = other.communicate(timeout=PATIENCE)
            assert other.returncode == 0, out
    figures["tags"] += tagged
    check(scene, host, judge, tagged=tagged)
    with session(host) as opened:
        collect(opened)
    assert collected(host)["result"] == "nothing"
    check(scene, host, judge, tagged=tagged)
    assert not (host.repository / "images" / scene.garbage.id).exists()


def check(scene: Scene, host: RecordedHost, judge: Judge, *, tagged: bool) -> None:
    """What is deployed, what was pulled, and what has a tag is whole."""
    judge.check()
    life = scene.life
    assert life.rollback is not None
    assert life.staged is not None
    wanted = [life.booted.id, life.rollback.id, life.staged.id, scene.pulled.id]
    wanted += [scene.tagged.id] if tagged else []
    for identifier in wanted:
        assert (host.repository / "images" / identifier).exists(), f"seed {SEED}"
    for line in (*host.menu(), *host.menu(staged=True)):
        host.startable(line)
