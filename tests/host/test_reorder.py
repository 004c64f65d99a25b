"""Rolling back, choosing, deleting, pinning and setting kernel arguments, on hosts as bootc leaves them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.lives import Life, installed, staged, upgraded
from hostimage_testing.operating import session
from hostimaged.errors import (
    AlreadyBooted,
    BootLoaderError,
    InvalidArgs,
    NoRollback,
    NoSuchDeployment,
    PreconditionFailed,
)
from hostimaged.host import reorder
from hostimaged.host.pins import set_pinned
from hostimaged.ids import DeploymentId
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

BLS = [kind for kind in KINDS if not kind.uki]


@pytest.fixture(params=KINDS, ids=str)
def host(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=request.param)


def ids(host: RecordedHost) -> list[str]:
    """The live menu, first entry first, as the boot loader's own rules order it."""
    known = list(host.images)
    return [next(id_ for id_ in known if id_ in line.text) for line in host.menu()]


def test_rollback_is_queued_and_taken_back(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    with session(host) as opened:
        assert reorder.rollback(opened) == {"result": "queued", "deployment": life.rollback.id}
    assert ids(host) == [life.rollback.id, life.booted.id]
    with session(host) as opened:
        assert opened.state().rollback_queued
        assert reorder.rollback(opened)["result"] == "already-queued"
    with session(host) as opened:
        assert reorder.cancel_rollback(opened)["result"] == "cancelled"
    assert ids(host) == [life.booted.id, life.rollback.id]
    with session(host) as opened:
        assert reorder.cancel_rollback(opened)["result"] == "not-queued"
    assert host.reboot() == life.booted.id


def test_rollback_drops_what_is_staged_and_boots(host: RecordedHost) -> None:
    life = staged(host)
    assert life.rollback is not None
    assert life.staged is not None
    with session(host) as opened:
        assert reorder.rollback(opened)["result"] == "queued"
        assert opened.state().staged_deployment is None
    assert not host.marker.exists()
    assert not host.entries_staged.exists()
    assert not host.state(life.staged).exists()
    assert not host.artifact(life.staged).exists()
    assert host.reboot() == life.rollback.id
    with session(host) as opened:
        state = opened.state()
        assert state.rollback_deployment is not None
        assert str(state.rollback_deployment.id) == life.booted.id
        assert not state.rollback_queued


def test_there_must_be_something_to_roll_back_to(host: RecordedHost) -> None:
    installed(host)
    with session(host) as opened, pytest.raises(NoRollback):
        reorder.rollback(opened)


def test_the_rollback_deployment_is_deleted_with_all_it_has(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    with session(host) as opened:
        assert reorder.delete(opened, DeploymentId(life.rollback.id))["result"] == "deleted"
    assert ids(host) == [life.booted.id]
    assert not host.state(life.rollback).exists()
    assert not host.artifact(life.rollback).exists()
    assert host.artifact(life.booted).exists()
    assert host.reboot() == life.booted.id


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="chattr needs root")
def test_what_chattr_protects_goes_with_its_deployment(tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    life = upgraded(host)
    assert life.rollback is not None
    etc = host.state(life.rollback) / "etc"
    (etc / "protected").mkdir()
    (etc / "protected/file").write_text("mine\n")
    (etc / "protected/link").symlink_to("/proc/self/mem")
    os.mkfifo(etc / "protected/pipe")
    (etc / "log").write_text("one\n")
    protected = [["+i", etc / "protected/file"], ["+i", etc / "protected"], ["+a", etc / "log"]]
    for how, path in protected:
        if subprocess.run(["chattr", how, path], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no such attributes")
    with session(host) as opened:
        assert reorder.delete(opened, DeploymentId(life.rollback.id))["result"] == "deleted"
    assert not host.state(life.rollback).exists()
    assert list(HostPaths.scratch(host.root).temporary.iterdir()) == []
    assert host.reboot() == life.booted.id


def test_what_runs_cannot_be_deleted(host: RecordedHost) -> None:
    life = upgraded(host)
    before = ids(host)
    with session(host) as opened, pytest.raises(AlreadyBooted):
        reorder.delete(opened, DeploymentId(life.booted.id))
    with session(host) as opened, pytest.raises(NoSuchDeployment):
        reorder.delete(opened, DeploymentId("0" * 128))
    assert ids(host) == before


def test_a_staged_deployment_is_deleted_by_unstaging(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    before = ids(host)
    with session(host) as opened:
        assert reorder.delete(opened, DeploymentId(life.staged.id))["result"] == "unstaged"
    assert ids(host) == before
    assert not host.marker.exists()
    assert not host.state(life.staged).exists()


def test_a_pinned_deployment_stays_until_it_is_let_go(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    rollback = DeploymentId(life.rollback.id)
    with session(host) as opened:
        assert set_pinned(opened, rollback, pinned=True)["result"] == "pinned"
        assert set_pinned(opened, rollback, pinned=True)["result"] == "unchanged"
        assert opened.state().get(rollback).pinned
        with pytest.raises(PreconditionFailed, match="pinned"):
            reorder.delete(opened, rollback)
        assert set_pinned(opened, rollback, pinned=False)["result"] == "unpinned"
        assert reorder.delete(opened, rollback)["result"] == "deleted"


def test_the_default_is_chosen(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    with session(host) as opened:
        chosen = DeploymentId(life.rollback.id)
        assert reorder.make_default(opened, chosen)["result"] == "default"
        assert reorder.make_default(opened, chosen)["result"] == "already-default"
    assert host.reboot() == life.rollback.id


@pytest.mark.parametrize("kind", BLS, ids=str)
def test_kernel_arguments_of_what_boots_next_change(kind: Kind, tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=kind)
    life = upgraded(host)
    with session(host) as opened:
        result = reorder.set_kernel_arguments(opened, ["quiet", 'x="a b"'], ["console=ttyS0"])
        assert result["result"] == "changed"
        assert reorder.set_kernel_arguments(opened, ["quiet"], [])["result"] == "unchanged"
        with pytest.raises(PreconditionFailed, match="console"):
            reorder.set_kernel_arguments(opened, [], ["console=ttyS0"])
        with pytest.raises(InvalidArgs):
            reorder.set_kernel_arguments(opened, ["composefs=x"], [])
    assert ids(host)[0] == life.booted.id
    assert host.reboot() == life.booted.id
    cmdline = (host.root / "proc/cmdline").read_text()
    assert "quiet" in cmdline
    assert 'x="a b"' in cmdline
    assert "console=ttyS0" not in cmdline
    assert cmdline.count("composefs=") == 1


def test_kernel_arguments_of_a_uki_cannot_be_changed(tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=Kind(KINDS[3].loader, uki=True))
    upgraded(host)
    with session(host) as opened, pytest.raises(BootLoaderError, match="unified kernel image"):
        reorder.set_kernel_arguments(opened, ["quiet"], [])


def test_entries_of_others_stay(tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl)
    life: Life = upgraded(host)
    (host.entries / "windows.conf").write_text("title Other\nefi /EFI/other.efi\n")
    (host.entries / "README").write_text("not an entry\n")
    with session(host) as opened:
        reorder.rollback(opened)
    assert (host.entries / "windows.conf").read_text() == "title Other\nefi /EFI/other.efi\n"
    assert (host.entries / "README").exists()
    assert life.rollback is not None
    assert host.reboot() == life.rollback.id
