"""Merges of /etc that are killed at any instant: what is named ``etc`` is the old tree, or the merged one."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostimage_testing import etctrees
from hostimage_testing.etctrees import make, opened, snapshot
from hostimage_testing.processes import python_environment
from hostimaged.host import etcmerge

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
SEED = int(os.environ.get("HOSTIMAGE_SEED", "20240612"))
KILLS = 200 if SOAK else 20
MERGER = """
import os, pickle, signal, sys
from pathlib import Path
from hostimage_testing.etctrees import image, opened
from hostimaged.host import etcmerge
from hostimaged.host.setuproot import MountMode
from hostimaged.progress import Silent
pristine, new = pickle.load(sys.stdin.buffer)
class Deadly(Silent):
    left = int(sys.argv[2])
    def at(self, point):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
print("go", flush=True)
with opened(Path(sys.argv[1], "current")) as current, opened(Path(sys.argv[1], "deploy")) as deployment:
    etcmerge.merge(image(pristine), current, image(new), deployment,
                   booted_mode=MountMode.BIND, mode=MountMode.BIND, reporter=Deadly())
    etcmerge.discard(deployment)
"""


@contextmanager
def merging(path: Path, trees: bytes, steps: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that merges; it has begun when the block does. After ``steps`` it kills itself."""
    command = [sys.executable, "-c", MERGER, str(path), str(steps)]
    with subprocess.Popen(
        command, env=python_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(trees)
        process.stdin.close()
        assert process.stdout.readline() == b"go\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_random_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = random.Random(SEED)
    many = {f"many/{n}/{m}": etctrees.file(noise.randbytes(200)) for n in range(5) for m in range(20)}
    pristine = etctrees.tree({**many, "x": etctrees.file("a")})
    ours = {path: item for path, item in many.items() if noise.random() < 0.8}
    current = etctrees.tree({**ours, "x": etctrees.file("b")})
    new = etctrees.tree({**many, "x": etctrees.file("c"), "y": etctrees.file("d")})
    merged = etctrees.model(pristine, current, new).result
    trees = pickle.dumps((pristine, new))
    make(current, tmp_path / "current")
    make(new, tmp_path / "deploy/etc")
    with merging(tmp_path, trees) as process:
        begin = time.monotonic()
        assert process.wait(60) == 0
        duration = time.monotonic() - begin
    assert snapshot(tmp_path / "deploy/etc") == merged
    ends = {"unmerged": 0, "merged": 0, "done": 0}
    with opened(tmp_path / "deploy") as deployment:
        for number in range(KILLS):
            subprocess.run(["rm", "-r", tmp_path / "deploy/etc"], check=True)
            make(new, tmp_path / "deploy/etc")
            # By its own count, whatever the machine is busy with, and at any instruction.
            with merging(tmp_path, trees, noise.randrange(1, len(new)) if number % 2 else 0) as process:
                if not number % 2:
                    time.sleep(noise.uniform(0, duration))
                    process.send_signal(signal.SIGKILL)
                finished = process.wait(60) == 0
            etc = snapshot(tmp_path / "deploy/etc")
            assert etc in (new, merged)
            assert not finished or etc == merged
            ends["done" if finished else "merged" if etc == merged else "unmerged"] += 1
            if noise.random() < 0.5:
                etcmerge.undo(deployment)
                assert snapshot(tmp_path / "deploy/etc") in (new, etc)
            else:
                etcmerge.discard(deployment)
                assert snapshot(tmp_path / "deploy/etc") == etc
            assert os.listdir(deployment) == ["etc"]
    assert ends["unmerged"]
    with capsys.disabled():
        print(f" [seed {SEED}, {ends}]", end="")
