"""Soft reboots: the next root, really mounted, in a mount namespace that stands for the host's."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import Kind, RecordedHost
from hostimage_testing.machines import Machine, Namespace, kernel_messages
from hostimage_testing.os_images import Recipe
from hostimage_testing.processes import python_environment
from hostimage_testing.recorded import row_of
from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.errors import (
    AlreadyBooted,
    HostimageError,
    PreconditionFailed,
    StorageError,
    VerityMismatch,
)
from hostimaged.host import commands, reorder, softreboot
from hostimaged.host.nextroot import Failed, Plan
from hostimaged.host.session import open_session
from hostimaged.host.stage import unstage
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

MakeHost = Callable[..., RecordedHost]
CONFIG = "usr/lib/composefs/setup-root-conf.toml"
OLD, NEW = Recipe("1"), Recipe("2")


def configured(text: str, version: str = "2") -> Recipe:
    return Recipe(version, files={CONFIG: text.encode()})


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    command = ["unshare", "--mount", "sh", "-c", "echo; read end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdout.readline():
            pytest.skip("this machine allows no mount namespaces")
        yield Namespace(process.pid)
        process.stdin.close()


@pytest.fixture
def machine(make: MakeHost, namespace: Namespace) -> Callable[..., Machine]:
    def made(
        other: Recipe = OLD,
        *,
        kind: Kind | None = None,
        staged: bool = False,
        locked: bool = False,
        **host: object,
    ) -> Machine:
        recorded = make(kind, **host)
        booted = recorded.deploy(recorded.image(NEW if not staged else Recipe("0")))
        second = recorded.deploy(recorded.image(other))
        if staged:
            recorded.live(booted)
            recorded.staged(second, booted)
            recorded.mark(second, locked=locked)
        else:
            recorded.live(booted, second)
        recorded.booted(booted)
        return Machine(recorded, booted, second, namespace)

    return made


MakeMachine = Callable[..., Machine]


# --- the root ----------------------------------------------------------------------------------------------


def test_the_root_is_that_of_the_initramfs(machine: MakeMachine, kind: Kind) -> None:
    here = machine(kind=kind)
    (here.host.state(here.other) / "etc/mine").write_text("1")
    here.place()
    assert here.prepared == here.other.id
    mounts = here.mounts
    assert mounts.pop(".") == ("overlay", f"composefs:{here.other.id}", "ro")
    assert {place: row[2] for place, row in mounts.items()} == {"sysroot": "ro", "etc": "rw", "var": "rw"}
    assert (here.root / "usr/bin/tool").read_bytes() == here.other.image.recipe.usr_files["bin/tool"]
    assert (here.root / "etc/mine").read_text() == "1"
    (here.root / "var/new").touch()
    assert (here.host.sysroot / "state/os/default/var/new").exists()
    assert (here.root / "sysroot/composefs").is_dir()
    for place in ("usr/x", "sysroot/x"):
        with pytest.raises(OSError, match="Read-only file system"):
            (here.root / place).touch()
    # None of it is seen but there.
    assert str(here.target) not in Path("/proc/self/mountinfo").read_text()


def test_an_etc_that_is_the_images(machine: MakeMachine) -> None:
    here = machine(configured("[etc]\nmount = 'none'\n"))
    (here.host.state(here.other) / "etc/mine").write_text("1")
    here.place()
    assert here.mounts.keys() == {".", "sysroot", "var"}
    assert not (here.root / "etc/mine").exists()
    assert (here.root / "etc/os.conf").read_text() == "version = 2\n"


def test_an_etc_that_is_an_overlay(machine: MakeMachine) -> None:
    here = machine(configured("[etc]\nmount = 'overlay'\n"))
    upper = here.host.state(here.other) / "etc/upper"
    upper.mkdir()
    (upper / "mine").write_text("1")
    here.place()
    assert here.mounts["etc"] == ("overlay", "overlay", "rw")
    assert (here.root / "etc/mine").read_text() == "1"
    assert (here.root / "etc/os.conf").read_text() == "version = 2\n"
    (here.root / "etc/later").touch()
    assert (upper / "later").exists()


def test_an_overlay_that_is_prepared_again(machine: MakeMachine) -> None:
    """Of the two only one has its upper directory at a time: the kernel says nothing of a second one."""
    here = machine(configured("[etc]\nmount = 'overlay'\n"))
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        here.place()
        (here.root / "etc/mine").touch()
        here.place()
        assert (here.root / "etc/mine").exists()
        assert here.mounts["etc"] == ("overlay", "overlay", "rw")
        assert "in-use" not in kernel_messages(log)
    finally:
        os.close(log)


def test_an_etc_whose_changes_end(machine: MakeMachine) -> None:
    here = machine(configured("[etc]\nmount = 'transient'\n"))
    here.place()
    assert here.mounts["etc"] == ("overlay", "transient", "rw")
    (here.root / "etc/os.conf").write_text("changed\n")
    assert (here.root / "etc").stat().st_mode & 0o7777 == 0o755
    softreboot.cancel(here.paths)
    here.place()
    assert (here.root / "etc/os.conf").read_text() == "version = 2\n"


def test_a_root_whose_changes_end(machine: MakeMachine) -> None:
    here = machine(configured("[root]\ntransient = true\n"))
    here.place()
    assert here.prepared == here.other.id
    with_both = Path(f"/proc/{here.namespace.pid}/mountinfo").read_text()
    assert f" - overlay transient:composefs={here.other.id} rw," in with_both
    (here.root / "usr/new").touch()
    assert (here.root / "etc").is_dir()
    assert softreboot.cancel(here.paths)
    assert here.nothing_is_left()


@pytest.mark.parametrize(
    ("config", "arguments", "mounted"),
    [
        ("[var]\nmount = 'none'\n", "", False),
        ("", "systemd.volatile=state", False),
        ("", "systemd.volatile=overlay", False),
        ("", "systemd.volatile=yes", True),
        ("[var]\nmount = 'bind'\n", "systemd.volatile=state", True),
    ],
)
def test_a_var_that_is_not_the_one_on_disk(
    machine: MakeMachine, config: str, arguments: str, mounted: bool
) -> None:
    here = machine(configured(config))
    (here.host.root / "proc/cmdline").write_text(" ".join([*here.booted.options, arguments]))
    here.place()
    assert ("var" in here.mounts) is mounted


def test_a_var_that_two_would_write_to(machine: MakeMachine) -> None:
    here = machine(configured("[var]\nmount = 'overlay'\n"))
    with pytest.raises(PreconditionFailed, match="/var is an overlay"):
        here.place()
    assert here.nothing_is_left()


# A worker's way: the namespace is opened, then privileges are given up, then the root is prepared.
_WORKER = """
import os, sys
from dataclasses import replace
from pathlib import Path
from hostimaged.host import softreboot
from hostimaged.host.session import open_session
from hostimaged.ids import DeploymentId
from hostimaged.jobs.privileges import CAPABILITIES, Profile
from hostimaged.progress import Silent
from hostimaged.system import syscalls
from hostimaged.system.paths import HostPaths
root, process, id_ = sys.argv[1:]
fd = os.open(f"{process}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
paths = replace(HostPaths.scratch(Path(root)), host_mounts=Path(process, "mountinfo"))
paths = replace(paths, host_namespace=Path(f"/proc/self/fd/{fd}"))
syscalls.set_no_new_privs()
syscalls.drop_capabilities(CAPABILITIES[Profile.HOST])
with open_session(paths, Silent()) as session:
    state = session.exclusive()
    softreboot.place(session, state, state.get(DeploymentId(id_)))
    print(softreboot.prepared(paths))
    print(softreboot.cancel(paths), softreboot.prepared(paths))
"""


@pytest.mark.parametrize("config", ["", "root.transient = true", "etc.mount = 'overlay'"])
def test_a_worker_keeps_the_privileges_that_it_takes(machine: MakeMachine, config: str) -> None:
    here = machine(configured(config))
    process = f"/proc/{here.namespace.pid}"
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, here.host.root, process, here.other.id],
        check=False,
        capture_output=True,
        text=True,
        env=python_environment(),
    )
    assert (done.stdout, done.stderr) == (f"{here.other.id}\nTrue None\n", "")
    assert here.nothing_is_left()


# --- what is refused ---------------------------------------------------------------------------------------


def test_what_runs_is_refused(machine: MakeMachine) -> None:
    here = machine()
    with pytest.raises(AlreadyBooted):
        here.place(here.booted)
    assert here.nothing_is_left()


def test_what_cannot_be_reached_is_refused_with_the_reason(machine: MakeMachine) -> None:
    here = machine(Recipe("2", kernel=b"another kernel "))
    with pytest.raises(PreconditionFailed, match="it has another kernel or initrd"):
        here.place()
    assert here.nothing_is_left()


def test_a_systemd_that_knows_none(machine: MakeMachine) -> None:
    here = machine()
    (here.host.root / "usr/lib/systemd/system/soft-reboot.target").unlink()
    with pytest.raises(PreconditionFailed, match="254"):
        here.place()


def test_an_entry_that_demands_verity_which_is_not_there(machine: MakeMachine) -> None:
    here = machine(insecure=True)
    here.place()
    for file in (here.host.entries / name for name in os.listdir(here.host.entries)):
        file.write_text(file.read_text().replace("composefs=?", "composefs="))
    with here.session() as opened, pytest.raises(VerityMismatch, match="its entry demands it"):
        softreboot.place_activated(opened, DeploymentId(here.other.id))
    assert here.nothing_is_left()
    with pytest.raises(PreconditionFailed, match="it is not complete"):
        here.place()


def test_what_somebody_else_mounted_there_stays(machine: MakeMachine) -> None:
    here = machine()
    here.target.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "somebody", here.target]
    subprocess.run(["nsenter", f"--mount=/proc/{here.namespace.pid}/ns/mnt", *mount], check=True)
    with pytest.raises(PreconditionFailed, match="something else is mounted"):
        here.place()
    assert not softreboot.cancel(here.paths)
    assert here.mounts["."][1] == "somebody"


@pytest.mark.parametrize("missing", ["etc", "../../os/default/var"])
def test_a_failure_in_the_middle_leaves_nothing(machine: MakeMachine, missing: str) -> None:
    here = machine()
    before = Path("/proc/self/mountinfo").read_text()
    here.place()
    gone = here.host.state(here.other) / missing
    os.rename(gone, gone.with_name("away"))
    with here.session() as opened, pytest.raises(HostimageError, match=f"cannot mount /{gone.name} of"):
        softreboot.place_activated(opened, DeploymentId(here.other.id))
    assert here.nothing_is_left(), "what was prepared before is not what was wanted either"
    assert Path("/proc/self/mountinfo").read_text() == before
    os.rename(gone.with_name("away"), gone)
    here.place()
    assert here.prepared == here.other.id


def test_a_host_that_does_not_let_us_in(machine: MakeMachine) -> None:
    here = machine()
    paths = dataclasses.replace(here.paths, host_namespace=here.host.root / "missing")
    with open_session(paths, Silent()) as opened:
        state = opened.state()
        with pytest.raises(HostimageError, match="cannot reach the mounts of the host"):
            softreboot.place(opened, state, row_of(state, here.other))
    assert here.nothing_is_left()


def test_a_proc_that_hides_others(machine: MakeMachine) -> None:
    here = machine()
    hidden = dataclasses.replace(here.paths, host_mounts=here.host.root / "missing")
    here.place()
    assert softreboot.prepared(hidden) is None
    with here.session() as opened:
        opened.paths = hidden
        softreboot.cancel_outdated(opened)
    assert here.prepared == here.other.id


# --- what boots next ---------------------------------------------------------------------------------------


def test_what_boots_next_is_prepared(machine: MakeMachine) -> None:
    here = machine()
    with here.session() as opened:
        assert not softreboot.prepare(opened)
        assert here.nothing_is_left()
        reorder.rollback(opened)
    with here.session() as opened:
        assert softreboot.prepare(opened)
        softreboot.cancel_outdated(opened)
        assert here.prepared == here.other.id
        reorder.cancel_rollback(opened)
        softreboot.cancel_outdated(opened)
        assert here.nothing_is_left()
        softreboot.cancel_outdated(opened)


def test_other_arguments_make_it_one_that_cannot_be_reached(machine: MakeMachine) -> None:
    here = machine()
    with here.session() as opened:
        reorder.rollback(opened)
    with here.session() as opened:
        softreboot.prepare(opened)
        reorder.set_kernel_arguments(opened, ["new.argument=1"], [])
        softreboot.cancel_outdated(opened)
    assert here.nothing_is_left()


def test_what_is_staged_no_more(machine: MakeMachine) -> None:
    here = machine(staged=True)
    with here.session() as opened:
        assert softreboot.prepare(opened)
    with here.session() as opened:
        unstage(opened)
        softreboot.cancel_outdated(opened)
    assert here.nothing_is_left()


def test_a_root_that_bootc_prepared(machine: MakeMachine) -> None:
    """It has the name that ours has; the rest of it is not looked at."""
    here = machine()
    here.target.mkdir(parents=True)
    source = f"composefs:{here.other.id}"
    lower = f"lowerdir={here.host.root / 'usr'}:{here.host.root / 'proc'}"
    mount = ["mount", "-t", "overlay", "-o", lower, source, here.target]
    bind = ["mount", "--bind", here.host.state(here.other) / "etc", here.target / "lib"]
    for command in (mount, bind):
        subprocess.run(["nsenter", f"--mount=/proc/{here.namespace.pid}/ns/mnt", *command], check=True)
    assert here.prepared == here.other.id
    with here.session() as opened:
        softreboot.cancel_outdated(opened)
    assert here.nothing_is_left()
    assert not softreboot.cancel(here.paths)


# --- shutting down -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["", "[etc]\nmount = 'overlay'\n"], ids=["bind", "overlay"])
def test_the_merged_etc_is_that_of_the_next_root(
    machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    here = machine(configured(config), staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    (here.host.root / "etc/local.conf").write_text("local\n")
    assert not (here.root / "etc/local.conf").exists()
    assert here.finalize(monkeypatch) == 0
    assert here.prepared == here.other.id
    assert here.mounts.keys() == {".", "sysroot", "etc", "var"}
    assert (here.root / "etc/local.conf").read_text() == "local\n"
    # And it is the one that the next boot finds.
    (here.root / "etc/after").write_text("1")
    here.host.booted(here.other, soft_from=here.booted)
    state = here.host.state(here.other) / "etc"
    assert ((state / "upper" if config else state) / "after").exists()
    with here.session() as opened:
        now = opened.state()
        assert now.booted is not None
        assert now.booted.soft_rebooted
        assert now.next_deployment is now.booted_deployment
        assert not softreboot.prepare(opened)


# The finalizer's way: all of it with what its unit leaves it.
_FINALIZER = """
import sys
from dataclasses import replace
from pathlib import Path
from hostimaged.host import commands
from hostimaged.system import syscalls
from hostimaged.system.paths import HostPaths
root, process, *kept = sys.argv[1:]
paths = replace(
    HostPaths.scratch(Path(root)),
    host_mounts=Path(process, "mountinfo"),
    host_namespace=Path(process, "ns/mnt"),
)
commands.HostPaths.scratch = lambda _: paths
syscalls.set_no_new_privs()
syscalls.drop_capabilities(syscalls.Capability[name] for name in kept)
sys.exit(commands.finalize_main(["--root", root]))
"""


def test_a_finalizer_has_the_privileges_that_it_takes(machine: MakeMachine) -> None:
    here = machine(NEW, staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    (here.host.root / "etc/local.conf").write_text("local\n")
    unit = (REPOSITORY_ROOT / "systemd/hostimaged-finalize.service").read_text()
    kept = re.findall(
        r"\bCAP_([A-Z_]+)", "\n".join(re.findall("^CapabilityBoundingSet=.*", unit, re.MULTILINE))
    )
    done = subprocess.run(
        [sys.executable, "-c", _FINALIZER, here.host.root, f"/proc/{here.namespace.pid}", *kept],
        check=False,
        capture_output=True,
        text=True,
        env=python_environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert here.prepared == here.other.id
    assert (here.root / "etc/local.conf").read_text() == "local\n"


def test_a_shutdown_that_cannot_merge(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine(staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    (here.host.root / "etc/os.conf").unlink()
    (here.host.root / "etc/os.conf").mkdir()
    assert here.finalize(monkeypatch) != 0
    assert here.nothing_is_left(), "a soft reboot would start it with an /etc that is not merged"


def test_a_download_is_not_started(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine(staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    here.host.mark(here.other, locked=True)
    assert here.finalize(monkeypatch) == 0
    assert here.nothing_is_left()


def test_another_that_was_prepared_stays(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    here.place()
    assert here.finalize(monkeypatch) == 0
    assert here.prepared == here.other.id


@pytest.mark.parametrize(
    "point", ["etc-merge.exchanged", "finalize.activated", "finalize.marker", "finalize.entries"]
)
@pytest.mark.parametrize("killed", [False, True], ids=["fails", "killed"])
def test_what_fails_half_way_starts_nothing_old(
    machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, point: str, killed: bool
) -> None:
    """The next recovery removes the ``/etc`` that was prepared: nothing may run with it by then."""
    here = machine(staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    (here.host.root / "etc/local.conf").write_text("local\n")

    class Failing(Silent):
        def at(self, name: str) -> None:
            if name == point:
                raise KeyboardInterrupt if killed else StorageError("the disk is gone")

    monkeypatch.setattr(commands, "Silent", Failing)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            here.finalize(monkeypatch)
    else:
        assert here.finalize(monkeypatch) != 0
    assert here.nothing_is_left()


def test_a_renewal_that_fails_starts_nothing_old(
    machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(staged=True)
    with here.session() as opened:
        softreboot.prepare(opened)
    (here.host.sysroot / "state/os/default/var").rename(here.host.root / "away")
    assert here.finalize(monkeypatch) != 0
    assert here.nothing_is_left()
    with here.session() as opened:
        default = opened.state().default_deployment
        assert default is not None
        assert default.id == DeploymentId(here.other.id)


# --- the program -------------------------------------------------------------------------------------------


def test_a_plan_survives_its_way() -> None:
    plan = Plan(softreboot.Action.PLACE, "/x", 3, 4, verity=True, source="a", state="/y")
    assert Plan.parse(plan.render()) == plan
    failure = Failed.parse(Failed("cannot", 5, "why").render())
    assert failure is not None
    assert (failure.doing, failure.code, failure.text) == ("cannot", 5, "why")
    assert Failed.parse("Traceback") is None


def test_a_crash_before_anything_is_mounted(machine: MakeMachine) -> None:
    class Crashing(Silent):
        def at(self, point: str) -> None:
            if point == "soft-reboot.checked":
                raise Crash

    here = machine()
    with here.session() as opened:
        opened.reporter = Crashing()
        state = opened.state()
        with pytest.raises(Crash):
            softreboot.place(opened, state, row_of(state, here.other))
    assert here.nothing_is_left()
