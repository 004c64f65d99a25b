"""A merge of /etc, and a seed, that fail at any step: what is named ``etc`` is always whole."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import etctrees
from hostimage_testing.disk import EXPECTED, Crash, Disk
from hostimage_testing.etctrees import Tree, image, make, opened, snapshot
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, Stat
from hostimaged.errors import HostimageError, PreconditionFailed, StorageError
from hostimaged.host import etcmerge, etcseed
from hostimaged.host.etcplan import MergePlan
from hostimaged.host.setuproot import MountMode
from hostimaged.progress import Silent
from hostimaged.system import syscalls

#: Named steps of a merge between its effects, and of a seed.
MERGE_POINTS = (
    "etc-merge.compare", "etc-merge.planned", "etc-merge.copy", "etc-merge.built", "etc-merge.synced",
    "etc-merge.exchanged",
)  # fmt: skip
SEED_POINTS = ("etc-seed.write", "etc-seed.made", "etc-seed.named")
USER = {"user.note": b"1"}
PRISTINE = etctrees.tree({
    "conf": etctrees.file("old"), "d/x": etctrees.file("x"), "d/y": etctrees.file("y"),
    "gone": etctrees.file("g"), "l": etctrees.link("conf"), "big": etctrees.file("b" * 5000),
})  # fmt: skip
CURRENT = etctrees.tree({
    "conf": etctrees.file("mine", 0o600, xattrs=USER), "d": etctrees.directory(0o700),
    "d/x": etctrees.file("x"), "d/z": etctrees.file("z"), "l": etctrees.link("d/x"),
    "big": etctrees.file("b" * 5000), "n/e/w": etctrees.file("w"),
})  # fmt: skip
NEW = etctrees.tree({
    "conf": etctrees.file("new"), "d/x": etctrees.file("newer"), "d/y": etctrees.file("y"),
    "gone": etctrees.file("g"), "l": etctrees.link("conf"), "p": etctrees.fifo(),
    "more/a": etctrees.file("a" * 100, xattrs=USER), ".updated": etctrees.file(),
})  # fmt: skip
MERGED = etctrees.model(PRISTINE, CURRENT, {path: NEW[path] for path in NEW if path != b".updated"}).result


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    # Steps like others, but nothing is gained by doing them thousands of times.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(syscalls, "syncfs", lambda fd: None)
    made = Disk(monkeypatch, trees=True)
    made.install()
    return made


class Place:
    """A deployment's state directory, and the running /etc."""

    def __init__(self, path: Path) -> None:
        self.state = path / "deploy"
        make(NEW, self.state / "etc")
        self.current = make(CURRENT, path / "current")

    def merge(self, reporter: Silent | None = None) -> MergePlan:
        with opened(self.current) as current, opened(self.state) as deployment:
            return etcmerge.merge(
                image(PRISTINE), current, image(NEW), deployment, booted_mode=MountMode.BIND,
                mode=MountMode.BIND, reporter=reporter or Silent(),
            )  # fmt: skip

    def do(self, what: Callable[[int], Any]) -> Any:
        with opened(self.state) as deployment:
            return what(deployment)

    @property
    def etc(self) -> Tree:
        return snapshot(self.state / "etc")

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.state))

    def check_sound(self) -> None:
        """After any crash: whole, and told apart."""
        merged = self.do(etcmerge.is_merged)
        if merged:
            assert self.etc == MERGED
        else:
            # Or merged, with what was unmerged half removed already.
            assert self.etc in (NEW, MERGED)
        assert all(name == "etc" or name.startswith(".etc-") for name in self.names)

    def check_goes_on(self, how: int) -> None:
        """Whatever is done next leads to where it should."""
        before = self.etc
        if how == 0:
            self.merge()
            assert self.etc == MERGED
            self.do(etcmerge.discard)
            assert self.etc == MERGED
        elif how == 1:
            self.do(etcmerge.undo)
            assert self.etc in (NEW, before)
        else:
            self.do(etcmerge.discard)
            assert self.etc == before
        assert self.names == ["etc"]


def steps(disk: Disk, work: Callable[[], object]) -> int:
    """How many changes ``work`` makes."""
    disk.plan(-1, 0)
    work()
    return disk.count


def crashed(disk: Disk, at: int, work: Callable[[], object]) -> bool:
    disk.plan(at, 0)
    try:
        work()
    except Crash:
        return True
    finally:
        disk.plan(-1, 0)
    return False


@pytest.mark.parametrize("how", [0, 1, 2])
def test_merge_crashes_at_every_change(disk: Disk, tmp_path: Path, how: int) -> None:
    count = steps(disk, Place(tmp_path / "trial").merge)
    assert count > 50
    for at in range(count):
        place = Place(tmp_path / str(at))
        assert crashed(disk, at, place.merge)
        place.check_sound()
        place.check_goes_on(how)


@pytest.mark.parametrize("what", [etcmerge.undo, etcmerge.discard])
@pytest.mark.parametrize("half", [False, True])
def test_what_follows_a_merge_crashes_at_every_change(
    disk: Disk, tmp_path: Path, what: Callable[[int], None], half: bool
) -> None:
    """After a merge, or after one that was killed before it was exchanged."""

    def prepared(name: str) -> Place:
        place = Place(tmp_path / name)
        if half:
            with pytest.raises(Crash):
                place.merge(At("etc-merge.synced", Crash))
        else:
            place.merge()
        return place

    trial = prepared("trial")
    count = steps(disk, lambda: trial.do(what))
    assert count > 8
    expected = trial.etc
    assert expected == (MERGED if what is etcmerge.discard and not half else NEW)
    for at in range(count):
        place = prepared(str(at))
        assert crashed(disk, at, lambda place=place: place.do(what))  # type: ignore[misc]
        place.check_sound()
        place.do(what)
        assert place.etc == expected
        assert place.names == ["etc"]


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: errno.errorcode[code])
def test_merge_fails_at_every_change(disk: Disk, tmp_path: Path, code: int) -> None:
    count = steps(disk, Place(tmp_path / "trial").merge)
    for at in range(count):
        place = Place(tmp_path / str(at))
        disk.plan(at, code)
        with pytest.raises(
            EXPECTED[code], match=r"^cannot (merge /etc|take back the merge of /etc): "
        ) as caught:
            place.merge()
        disk.plan(-1, 0)
        assert ".etc-" not in caught.value.message
        assert place.etc == NEW, at
        assert place.names == ["etc"], at
        place.merge()
        assert place.etc == MERGED


READS = ("read", "pread", "preadv", "listxattr", "getxattr", "readlink", "listdir")


@pytest.mark.parametrize("call", READS)
def test_merge_fails_at_every_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A file of the running /etc that cannot be read must not become one that was removed."""
    place = Place(tmp_path)
    at = 0
    while True:
        calls = Counting(getattr(os, call), at)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, calls)
            try:
                place.merge()
            except StorageError as error:
                assert "Input/output error" in error.message  # noqa: PT017
            else:
                assert calls.count <= at, f"{call} number {at} failed and nobody was told"
                break
        assert place.etc == NEW
        assert place.names == ["etc"]
        at += 1
    assert at > 0
    assert place.etc == MERGED


class Counting:
    """Calls ``real``, and fails the call number ``at``."""

    def __init__(self, real: Callable[..., Any], at: int) -> None:
        self._real = real
        self._at = at
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self._at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(*args, **kwargs)


class At(Silent):
    """Raises when the work stands at a named step."""

    def __init__(self, point: str, error: type[BaseException]) -> None:
        self._point = point
        self._error = error
        self.seen: set[str] = set()

    def at(self, point: str) -> None:
        self.seen.add(point)
        if point == self._point:
            raise self._error


def test_the_named_steps(tmp_path: Path) -> None:
    reporter = At("", Crash)
    Place(tmp_path).merge(reporter)
    assert reporter.seen == set(MERGE_POINTS)


@pytest.mark.parametrize("point", MERGE_POINTS)
@pytest.mark.parametrize("how", [0, 1, 2])
def test_merge_crashes_at_each_named_step(tmp_path: Path, point: str, how: int) -> None:
    place = Place(tmp_path)
    with pytest.raises(Crash):
        place.merge(At(point, Crash))
    place.check_sound()
    assert place.etc == (MERGED if point == "etc-merge.exchanged" else NEW)
    place.check_goes_on(how)


@pytest.mark.parametrize("point", MERGE_POINTS)
def test_merge_is_stopped_at_each_named_step(tmp_path: Path, point: str) -> None:
    place = Place(tmp_path)
    with pytest.raises(HostimageError):
        place.merge(At(point, HostimageError))
    if point != "etc-merge.exchanged":
        assert place.etc == NEW
        assert place.names == ["etc"]
    place.check_goes_on(0)


# --- an /etc that changes meanwhile ------------------------------------------------------------------------


class Meddling(Silent):
    """Does something to the running /etc at a named step, the first time or every time."""

    def __init__(self, point: str, act: Callable[[], None], times: int = 1) -> None:
        self._point, self._act, self._times = point, act, times

    def at(self, point: str) -> None:
        if point == self._point and self._times:
            self._times -= 1
            self._act()


def _replaced(path: Path, item: etctrees.Item) -> None:
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            below.unlink()
        path.rmdir()
    else:
        path.unlink()
    other = path.parent.parent / "other"
    make({os.fsencode(path.name): item}, other)
    (other / path.name).rename(path)
    other.rmdir()


@pytest.mark.parametrize("path", ["conf", "d", "d/z", "l", "n"])
@pytest.mark.parametrize(
    "item", [None, etctrees.fifo(), etctrees.file("other"), etctrees.link("/etc/passwd")]
)
def test_a_name_changes_between_comparing_and_copying(
    tmp_path: Path, path: str, item: etctrees.Item | None
) -> None:
    """What comes of it is as if it had been so from the beginning."""
    place = Place(tmp_path)
    target = place.current / path

    def meddle() -> None:
        if item is not None:
            _replaced(target, item)
        elif target.is_dir():
            subprocess.run(["rm", "-r", target], check=True)
        else:
            target.unlink()

    if path == "n":
        (place.current / "n/e/w").unlink()
        (place.current / "n/e").rmdir()
    before = place.etc
    try:
        place.merge(Meddling("etc-merge.planned", meddle))
    except PreconditionFailed:
        # What was a directory there is one in the new image.
        assert path == "d"
        assert item is not None
        assert place.etc == before
        return
    expected = etctrees.model(PRISTINE, snapshot(place.current), _without_stamp(NEW))
    assert place.etc == expected.result


def _without_stamp(tree: Tree) -> Tree:
    return {path: item for path, item in tree.items() if path != b".updated"}


def test_an_etc_that_never_rests(tmp_path: Path) -> None:
    place = Place(tmp_path)
    numbers = iter(range(1000))

    def meddle() -> None:
        for found in place.current.glob("restless-*"):
            found.unlink()
        (place.current / f"restless-{next(numbers)}").touch()

    meddle()
    with pytest.raises(PreconditionFailed, match="other programs keep changing it"):
        place.merge(Meddling("etc-merge.planned", meddle, times=1000))
    assert place.etc == NEW
    assert place.names == ["etc"]


def test_current_changes_between_two_merges(tmp_path: Path) -> None:
    """The second merge knows nothing of the first."""
    place = Place(tmp_path)
    place.merge()
    (place.current / "n/e/w").unlink()
    (place.current / "gone").write_text("g")
    os.chmod(place.current / "gone", 0o644)
    place.merge()
    expected = etctrees.model(PRISTINE, snapshot(place.current), _without_stamp(NEW))
    assert place.etc == expected.result
    assert b"gone" in expected.result
    assert b"n/e" in expected.result
    assert b"n/e/w" not in expected.result


def test_another_tool_merged_in_place(tmp_path: Path) -> None:
    """After a merge that was killed before its exchange; what it left is only to be removed."""
    place = Place(tmp_path)
    with pytest.raises(Crash):
        place.merge(At("etc-merge.synced", Crash))
    (place.state / "etc/conf").write_text("merged by another")
    place.do(etcmerge.discard)
    assert place.etc[b"conf"].content == b"merged by another"
    assert place.names == ["etc"]


def test_a_merge_half_discarded_is_not_taken_back(disk: Disk, tmp_path: Path) -> None:
    """Of the unmerged tree either all comes back or nothing."""
    trial = Place(tmp_path / "trial")
    trial.merge()
    count = steps(disk, lambda: trial.do(etcmerge.discard))
    found = []
    for at in range(count):
        place = Place(tmp_path / str(at))
        place.merge()
        assert crashed(disk, at, lambda place=place: place.do(etcmerge.discard))  # type: ignore[misc]
        place.do(etcmerge.undo)
        assert place.etc in (NEW, MERGED)
        assert place.names == ["etc"]
        found.append(place.etc == MERGED)
    assert found == sorted(found)
    assert True in found
    assert False in found


def test_all_is_synced_before_it_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the exchange after it, in the directory of the two names."""
    place = Place(tmp_path)
    done: list[str] = []

    def recorded(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in ((syscalls, "syncfs"), (syscalls, "rename_exchange"), (os, "fsync"), (os, "mkdir"),
                         (os, "symlink"), (os, "setxattr"), (os, "utime")):  # fmt: skip
        recorded(module, name)
    place.merge()
    assert done[-3:] == ["syncfs", "rename_exchange", "fsync"]
    assert "utime" in done[:-3]


# --- the seed ----------------------------------------------------------------------------------------------


SEEDED = {path: NEW[path] for path in NEW if path != b".updated"}


def root_of(etc: Tree) -> Directory:
    own = (os.geteuid(), os.getegid())
    return Directory(Stat(0o755, *own, 0, 0, {}), {b"etc": image(etc), b"var": image(etc)})


@contextmanager
def repository_with(path: Path, etc: Tree) -> Iterator[Repository]:
    repository, _ = Repository.init(path, verity=Verity.OPPORTUNISTIC)
    with repository:
        for item in etc.values():
            repository.store_object(item.content)
        yield repository


@pytest.mark.parametrize("there", [False, True])
def test_seed_crashes_and_fails_at_every_change(disk: Disk, tmp_path: Path, there: bool) -> None:
    """Where there was none, and where one is replaced."""
    with repository_with(tmp_path / "repository", NEW) as repository:

        def seed(state: Path, reporter: Silent | None = None) -> None:
            with opened(state) as deployment:
                etcseed.seed_etc(root_of(NEW), repository, deployment, MountMode.BIND, reporter or Silent())

        def fresh(name: str) -> Path:
            state = tmp_path / name
            state.mkdir()
            if there:
                make(CURRENT, state / "etc")
            return state

        trial = fresh("trial")
        count = steps(disk, lambda: seed(trial))
        assert count > 30
        for at in range(count):
            for code in (0, errno.ENOSPC):
                state = fresh(f"{at}-{code}")
                disk.plan(at, code)
                if code:
                    with pytest.raises(EXPECTED[code], match=r"^cannot write /etc of the deployment: "):
                        seed(state)
                else:
                    with pytest.raises(Crash):
                        seed(state)
                disk.plan(-1, 0)
                if (state / "etc").exists():
                    assert snapshot(state / "etc") in (SEEDED, CURRENT)
                else:
                    assert not there
                seed(state)
                assert snapshot(state / "etc") == SEEDED
                assert os.listdir(state) == ["etc"]


@pytest.mark.parametrize("point", SEED_POINTS)
def test_seed_crashes_at_each_named_step(tmp_path: Path, point: str) -> None:
    (tmp_path / "deploy").mkdir()
    with (
        repository_with(tmp_path / "repository", NEW) as repository,
        opened(tmp_path / "deploy") as deployment,
    ):
        with pytest.raises(Crash):
            etcseed.seed_etc(root_of(NEW), repository, deployment, MountMode.BIND, At(point, Crash))
        etc = tmp_path / "deploy/etc"
        assert etc.exists() == (point == "etc-seed.named")
        etcseed.seed_etc(root_of(NEW), repository, deployment, MountMode.BIND, Silent())
        assert snapshot(etc) == SEEDED
        assert os.listdir(deployment) == ["etc"]
