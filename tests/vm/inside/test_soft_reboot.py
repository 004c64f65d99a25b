"""The root of a soft reboot on fs-verity: what the kernel vouches for, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing.processes import python_environment
from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import build
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.host.nextroot import Action, Plan

CONTENT = bytes(i % 251 for i in range(100_000))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "nextroot"
    yield place
    carry_out(Plan(Action.REMOVE, str(place)))
    assert str(place) not in Path("/proc/self/mountinfo").read_text()


def carry_out(plan: Plan) -> None:
    argv = [sys.executable, "-P", "-m", "hostimaged.host.nextroot", plan.render()]
    descriptors = [plan.image] if plan.image != -1 else []
    environment = python_environment() | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, pass_fds=descriptors, env=environment, cwd="/"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_are_those_of_the_image_or_not_there(tmp_path: Path, target: Path) -> None:
    physical = tmp_path / "physical"
    state = physical / "state/deploy/x"
    (state / "etc").mkdir(parents=True)
    (physical / "state/os/default/var").mkdir(parents=True)
    (state / "var").symlink_to("../../os/default/var")
    made, _ = Repository.init(physical / "composefs", verity=Verity.REQUIRE)
    with made as repository:
        stored = repository.store_object(CONTENT)
        image = repository.write_image(bytes(build(_tree(stored.id), Format.V1, repository.algorithm)))
        repository.sync()
        fd = repository.open_image(image.hex())
        objects = repository.path / "objects"
        plan = Plan(
            Action.PLACE,
            str(target),
            image=fd,
            verity=True,
            source="composefs:x",
            physical_root=str(physical),
            objects=str(objects),
            state=str(state),
        )
        try:
            for replaced in (False, True):
                carry_out(plan)
                if replaced:
                    with pytest.raises(OSError):
                        (target / "file").read_bytes()
                else:
                    assert (target / "file").read_bytes() == CONTENT
                    (target / "etc/mine").touch()
                    assert (state / "etc/mine").exists()
                    # Without fs-verity, though with the same bytes.
                    (objects / stored.id.pathname).unlink()
                    (objects / stored.id.pathname).write_bytes(CONTENT)
        finally:
            os.close(fd)
    table = Path("/proc/self/mountinfo").read_text()
    assert table.count(f" {target} ") == 1, "the second took the place of the first"
    assert "verity=require" in table


def _tree(object_id: bytes) -> Directory:
    def stat(mode: int) -> Stat:
        return Stat(mode, 0, 0, 1_700_000_000, 0, {})

    file = Leaf(stat(0o644), External(fsverity.ObjectId(object_id), len(CONTENT)))
    places = {name: Directory(stat(0o755), {}) for name in (b"etc", b"sysroot", b"var")}
    return Directory(stat(0o755), {b"file": file} | places)
