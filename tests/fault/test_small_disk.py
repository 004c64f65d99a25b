"""Every operation on real file systems of 64 MB that are full, or turn read-only, at each of its steps.

A clear error that names the file system, nothing half written, what boots is whole; and once there is room,
or the disk is writable again, the same operation does its work. Both disks: that of the physical root, and
that of the boot entries. Some steps of each operation by default, all with HOSTIMAGE_SOAK=1.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.disk import Crash
from hostimage_testing.explained import unexplained
from hostimage_testing.host import scratch_host
from hostimage_testing.hosts import KINDS, Kind
from hostimage_testing.judge import Judge
from hostimage_testing.operating import At, session
from hostimage_testing.small_disk import SmallDisk, small_disk
from hostimage_testing.standing import EDITED, REFERENCE, Standing, Stood
from hostimage_testing.steps import Steps, do
from hostimaged.composefs import fsck
from hostimaged.composefs.repository import Repository
from hostimaged.errors import HostimageError, NoSpace, ReadOnly
from hostimaged.host import commands, reorder
from hostimaged.host.finalize import finalize
from hostimaged.host.read import read_host
from hostimaged.host.session import open_session
from hostimaged.host.space import with_places
from hostimaged.host.stage import StageRequest, stage
from hostimaged.host.updatepolicy import UpdatePolicy, read
from hostimaged.ids import DeploymentId, ManifestDigest, SourceDigest
from hostimaged.jobs import operations as op
from hostimaged.oci import pulls
from hostimaged.oci.reference import ImageReference
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.root, pytest.mark.slow]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
MIB = 1 << 20
SIZES = {"sysroot": 64 * MIB, "boot": 16 * MIB}
#: systemd-boot with kernels, GRUB with kernels, systemd-boot with unified kernels.
HOSTS = (KINDS[2], KINDS[0], KINDS[3])
#: Steps of one operation on one disk that are tried, besides what is so from the beginning.
TRIED = {"sysroot": 2, "boot": 1}
#: What has no business on the boot file system; tried all the same in the long run.
ELSEWHERE = ("pull", "pin", "dry-run", "repair", "verify", "policy")


@dataclass(frozen=True)
class Trouble:
    """What happens to a disk, how it is undone, and what that is told as."""

    name: str
    strike: Callable[[SmallDisk], None]
    undo: Callable[[SmallDisk], None]
    error: type[HostimageError]

    def __str__(self) -> str:
        return self.name


TROUBLES = (
    Trouble("full", SmallDisk.fill, SmallDisk.make_room, NoSpace),
    Trouble("read-only", SmallDisk.turn_read_only, SmallDisk.turn_writable, ReadOnly),
)


@dataclass
class Machine:
    """A place for hosts of one kind whose physical root and boot file system are small disks."""

    kind: Kind
    root: Path
    disks: dict[str, SmallDisk]
    standing: Standing

    def host(self, prepare: Callable[[Stood], object]) -> Stood:
        """The host with a staged deployment, put there anew and prepared."""
        self.clear()
        stood = self.standing.copy(self.kind, self.root)
        prepare(stood)
        return stood

    def clear(self) -> None:
        """Leave nothing but two empty disks."""
        for disk in self.disks.values():
            disk.clear()
        for path in self.root.iterdir():
            if not path.is_mount():
                path.unlink() if path.is_symlink() else shutil.rmtree(path)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Iterator[Callable[[Kind], Machine]]:
    place = tmp_path_factory.mktemp("small")
    standing = Standing(place, cfsctl)
    made: dict[Kind, Machine] = {}
    with ExitStack() as stack:

        def machine(kind: Kind) -> Machine:
            if kind not in made:
                root = place / f"machine-{kind}"
                root.mkdir()
                images = place / f"images-{kind}"
                images.mkdir()
                paths = {"sysroot": root / "sysroot", "boot": root / ("boot" if kind.classic else "efi")}
                disks = {
                    name: stack.enter_context(small_disk(images, paths[name], size))
                    for name, size in SIZES.items()
                }
                made[kind] = Machine(kind, root, disks, standing)
            return made[kind]

        yield machine


# --- the operations ----------------------------------------------------------------------------------------


def nothing(_: Stood) -> None:
    """The host is as it is needed."""


def damaged(stood: Stood) -> None:
    """A content, a boot image and a configuration are damaged; the image came from a layout."""
    image = stood.life.booted.image
    content = image.recipe.usr_files["bin/tool"]
    objects = [path for path in (stood.host.repository / "objects").glob("??/*") if path.is_file()]
    chosen = [next(path for path in objects if path.read_bytes() == content)]
    chosen += [(stood.host.repository / "images" / image.id).resolve()]
    chosen += [stood.host.stream("config", image.config_digest).resolve()]
    for path in chosen:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
    # The layout that it was made of.
    paths = HostPaths.scratch(stood.host.root)
    digest = image.manifest_digest
    pulls.record(paths.pulls, pulls.PullRow(image.source, ManifestDigest(digest), SourceDigest(digest), 1))


def interrupted(stood: Stood) -> None:
    """Staging was killed when the state directory was there, and no entry."""
    stop = At(10_000)

    def at(point: str) -> None:
        stop.points.append(point)
        if point == "stage.etc":
            raise Crash

    stop.at = at  # type: ignore[method-assign]
    with suppress(Crash), session(stood.host, stop) as opened:
        stage(opened, StageRequest(ManifestDigest(stood.image.manifest_digest), REFERENCE))
    assert "stage.etc" in stop.points


def garbage(stood: Stood) -> None:
    """The rollback deployment is out of the menu, its state is left."""
    with session(stood.host) as opened:
        reorder.delete(opened, DeploymentId(stood.rollback))
    stood.host.images.pop(stood.rollback, None)


@dataclass(frozen=True)
class Case:
    """An operation: what comes before, what it is, and what must be so when it is done."""

    make: Callable[[Stood], op.Operation | Callable[[HostPaths, Steps], object]]
    prepare: Callable[[Stood], object] = nothing
    done: Callable[[Stood], bool] | None = None


def staging(stood: Stood, reference: str) -> op.Stage:
    return op.Stage(manifest_digest=stood.image.manifest_digest, reference=reference, lock_timeout=5.0)


def staged_is(stood: Stood, identifier: str) -> bool:
    return identifier in stood.host.marker.read_text()


def finalizing(paths: HostPaths, reporter: Steps) -> None:
    """As ``hostimaged finalize`` does it."""
    try:
        with open_session(paths, reporter, lock_timeout=5.0) as opened:
            finalize(opened)
    except (NoSpace, ReadOnly) as error:
        raise with_places(error, paths) from error


CASES: dict[str, Case] = {
    "pull": Case(lambda s: op.Pull(reference=s.remote[0].source, verity="opportunistic", lock_timeout=5.0)),
    "stage": Case(lambda s: staging(s, str(ImageReference.parse("docker://registry.example/os:stable"))),
                  done=lambda s: staged_is(s, s.image.id)),
    "switch": Case(lambda s: staging(s, str(ImageReference.parse("docker://registry.example/other:1"))),
                   done=lambda s: staged_is(s, s.image.id)),
    "unstage": Case(lambda _: op.Unstage(lock_timeout=5.0), done=lambda s: not s.host.marker.exists()),
    "rollback": Case(lambda _: op.Rollback(lock_timeout=5.0),
                     done=lambda s: s.host.startable(s.host.menu()[0]).id == s.rollback),
    "default": Case(lambda s: op.Rollback(action="default", deployment=s.rollback, lock_timeout=5.0),
                    done=lambda s: s.host.startable(s.host.menu()[0]).id == s.rollback),
    "delete": Case(lambda s: op.Delete(deployment=s.rollback, lock_timeout=5.0),
                   done=lambda s: all(s.rollback not in line.text for line in s.host.menu())),
    "pin": Case(lambda s: op.Pin(deployment=s.rollback, pinned=True, lock_timeout=5.0)),
    "kargs": Case(lambda _: op.KernelArguments(add=("quiet",), lock_timeout=5.0)),
    "finalize": Case(lambda _: finalizing,
                     done=lambda s: s.host.startable(s.host.menu()[0]).id not in (s.booted, s.rollback)),
    "collect": Case(lambda _: op.Collect(lock_timeout=5.0), garbage),
    "dry-run": Case(lambda _: op.Collect(dry_run=True, lock_timeout=5.0), garbage),
    "repair": Case(lambda _: op.Repair(lock_timeout=5.0), damaged),
    "verify": Case(lambda _: op.Verify(lock_timeout=5.0)),
    "recover": Case(lambda _: op.Recover(lock_timeout=5.0), interrupted),
    "policy": Case(lambda _: op.SetPolicy(policy=UpdatePolicy.STAGE),
                   done=lambda s: read(HostPaths.scratch(s.host.root)) is UpdatePolicy.STAGE),
}  # fmt: skip


# --- the test ----------------------------------------------------------------------------------------------


def attempt(
    stood: Stood, case: Case, hook: Callable[[int, str], object]
) -> tuple[Steps, HostimageError | None]:
    """Do it; an error that is not typed is raised."""
    channel = Steps(hook)
    paths = HostPaths.scratch(stood.host.root)
    made = case.make(stood)
    try:
        if callable(made):
            made(paths, channel)
        else:
            do(paths, made, channel)
    except HostimageError as error:
        # What frames of it hold open is closed when its process ends, in real life.
        failure = type(error)(error.message)
    else:
        return channel, None
    finally:
        channel.close()
    gc.collect()
    return channel, failure


def chosen(points: list[str], disk: str) -> list[int]:
    """Steps to be tried: the beginning, and from then on the first of each name, or some of them."""
    first = sorted({name: number for number, name in reversed(list(enumerate(points)))}.values())
    tried = TRIED[disk]
    if SOAK or len(first) <= tried:
        return [-1, *first]
    return [-1, *(first[len(first) * (2 * number + 1) // (2 * tried)] for number in range(tried))]


def check_booting(stood: Stood) -> None:
    """What the menu offers starts, and the host is understood, be its disk as it is."""
    for line in stood.host.menu():
        stood.host.startable(line)
    paths = HostPaths.scratch(stood.host.root)
    with Repository.open_unlocked(paths.repository) as repository:
        state = read_host(paths, repository)
        report = fsck.check(repository, metadata_only=True)
    assert state.booted_deployment is not None
    assert str(state.booted_deployment.id) == stood.booted
    assert report.ok, report.as_text()


@pytest.mark.timeout(1800 if SOAK else 600)
@pytest.mark.parametrize("trouble", TROUBLES, ids=str)
@pytest.mark.parametrize(
    ("name", "disk"),
    [(name, disk) for name in CASES for disk in SIZES if SOAK or disk != "boot" or name not in ELSEWHERE],
)
def test_each_step(
    name: str,
    disk: str,
    trouble: Trouble,
    machines: Callable[[Kind], Machine],
    cfsctl: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    kinds = [kind for kind in HOSTS if not (kind.uki and name == "kargs")]
    kind = kinds[(list(CASES).index(name) + list(SIZES).index(disk)) % len(kinds)]
    machine = machines(kind)
    whole, failure = attempt(machine.host(case.prepare), case, lambda *_: None)
    assert failure is None, failure
    told = 0
    for step in chosen(whole.points, disk):
        stood = machine.host(case.prepare)
        struck = machine.disks[disk]
        if step < 0:
            trouble.strike(struck)

        def strike(number: int, _point: str, step: int = step, struck: SmallDisk = struck) -> None:
            if number == step:
                trouble.strike(struck)

        _, failure = attempt(stood, case, strike)
        where = (step, whole.points[step] if step >= 0 else "before")
        if failure is not None:
            told += 1
            assert isinstance(failure, trouble.error), (where, failure)
            assert str(struck.path) in failure.message, (where, failure)
        if name != "repair":
            check_booting(stood)
        trouble.undo(struck)
        _, failure = attempt(stood, case, lambda *_: None)
        assert failure is None or not isinstance(failure, (NoSpace, ReadOnly)), (where, failure)
        check_done(stood, name, case, cfsctl)
    with capsys.disabled():
        print(f" [{len(chosen(whole.points, disk))} steps of {len(whole.points)}, {told} told]", end="")


def check_done(stood: Stood, name: str, case: Case, cfsctl: str) -> None:
    """It was done, nothing is left over, and others agree."""
    host = stood.host
    if case.done is not None:
        assert case.done(stood)
    with session(host) as opened:
        reorder.begin(opened)
    check_booting(stood)
    kept = {stood.rollback} & host.images.keys()
    left = unexplained(host, kept, etc=[Path(EDITED).name])
    assert [each for each in left if "hostimaged/policy.json" not in each] == []
    Judge(cfsctl, host.repository).check()
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


def test_a_full_disk_can_be_collected(
    machines: Callable[[Kind], Machine], cfsctl: str, tmp_path: Path
) -> None:
    """Garbage goes although there is no room left to collect it in good order; and only garbage."""
    machine = machines(HOSTS[0])
    stood = machine.host(garbage)
    paths = HostPaths.scratch(stood.host.root)
    with Repository.open(paths.repository) as repository:
        lost = repository.store_object(os.urandom(MIB)).id
    machine.disks["sysroot"].fill()
    case = CASES["collect"]
    channel, failure = attempt(stood, case, lambda *_: None)
    assert failure is None, failure
    assert any("the disk was full" in each for each in channel.messages)
    assert not (paths.repository / "objects" / lost.pathname).exists()
    assert not stood.host.state(stood.rollback).exists()
    machine.disks["sysroot"].make_room()
    check_done(stood, "collect", case, cfsctl)


@pytest.mark.parametrize("trouble", TROUBLES, ids=str)
@pytest.mark.parametrize("disk", SIZES)
def test_the_first_deployment(
    disk: str,
    trouble: Trouble,
    machines: Callable[[Kind], Machine],
    cfsctl: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An installer's disks."""
    machine = machines(HOSTS[0])
    image = machine.standing.original(HOSTS[0]).remote[0]
    points: list[str] = []
    strikes_at = ""
    struck = machine.disks[disk]

    def at(_: object, point: str) -> None:
        points.append(point)
        if point == strikes_at:
            trouble.strike(struck)

    monkeypatch.setattr(commands._Told, "at", at)

    def deployed() -> tuple[int, str]:
        argv = [image.source, "--root", str(machine.root), "--verity", "opportunistic"]
        return commands.deploy_main(argv), capsys.readouterr().err

    def empty() -> None:
        machine.clear()
        scratch_host(machine.root)

    empty()
    assert deployed()[0] == 0
    names = list(dict.fromkeys(points))
    chosen_names = names if SOAK else ["", "deploy.kernel", "deploy.state"]
    for name in chosen_names:
        empty()
        strikes_at = name
        if not name:
            trouble.strike(struck)
        code, told = deployed()
        if code:
            assert code == trouble.error("").exit_code, (name, told)
            assert str(struck.path) in told, (name, told)
        strikes_at = "-"
        trouble.undo(struck)
        code, told = deployed()
        assert code == 0 or "there is a deployment already" in told, (name, told)
        assert len(list((machine.root / "efi/loader/entries").iterdir())) == 1
        Judge(cfsctl, machine.root / "sysroot/composefs").check()
