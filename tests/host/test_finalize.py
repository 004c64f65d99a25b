"""Finalizing at shutdown: once, whoever does it, and whenever it is interrupted."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import Life, staged, upgraded
from hostimage_testing.operating import At, session
from hostimaged.errors import Cancelled, HostimageError
from hostimaged.host import finalize as module
from hostimaged.host import reorder
from hostimaged.host.commands import finalize_main
from hostimaged.host.finalize import finalize
from hostimaged.system.locks import FileLock
from hostimaged.system.paths import HostPaths

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]


@pytest.fixture(params=KINDS, ids=str)
def host(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=request.param)


def test_a_staged_deployment_boots_after_the_shutdown(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    (host.root / "etc/hostname").write_text("mine\n")
    (host.root / "etc/local.conf").write_text("local\n")
    with session(host) as opened:
        result = finalize(opened)
        assert result["result"] == "finalized"
        assert result["deployment"] == life.staged.id
        assert finalize(opened) == {"result": "nothing-staged"}
    assert not host.marker.exists()
    assert not host.entries_staged.exists()
    assert host.reboot() == life.staged.id
    assert (host.root / "etc/hostname").read_text() == "mine\n"
    assert (host.root / "etc/local.conf").read_text() == "local\n"
    assert (host.root / "etc/os.conf").read_text() == "version = 3\n"


def test_a_download_is_not_activated(host: RecordedHost) -> None:
    life = staged(host, locked=True)
    with session(host) as opened:
        assert finalize(opened)["result"] == "download-only"
    assert host.marker.exists()
    assert host.reboot() == life.booted.id


def test_nothing_staged_is_success(host: RecordedHost, capsys: pytest.CaptureFixture[str]) -> None:
    life = upgraded(host)
    with session(host) as opened:
        assert finalize(opened) == {"result": "nothing-staged"}
    assert finalize_main(["--root", str(host.root)]) == 0
    assert capsys.readouterr().out == "nothing-staged\n"
    assert host.reboot() == life.booted.id


def test_with_nothing_staged_nobody_is_waited_for(
    tmp_path: Path, cfsctl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory of the mark is always there; a shutdown with nothing to do must not fail for others."""
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    upgraded(host)
    paths = HostPaths.scratch(host.root)
    host.marker.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with session(host) as opened:
        opened.exclusive()
        assert finalize_main(["--root", str(host.root), "--lock-timeout", "60"]) == 0
    assert time.monotonic() - begin < 30
    assert capsys.readouterr().out == "nothing-staged\n"
    assert not paths.job_lock.exists()


def test_others_are_waited_for_no_longer_than_told(tmp_path: Path, cfsctl: str) -> None:
    """Three locks are taken one after the other, and the unit has but five minutes."""
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    life = staged(host)
    paths = HostPaths.scratch(host.root)
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with session(host) as opened:
        opened.exclusive()
        with ThreadPoolExecutor(1) as pool:
            with FileLock(paths.job_lock, timeout=0, what="the lock"):
                done = pool.submit(finalize_main, ["--root", str(host.root), "--lock-timeout", "3"])
                time.sleep(2)
            assert done.result() != 0
    assert 2.5 < time.monotonic() - begin < 4.5
    assert host.reboot() == life.booted.id


def test_the_command_says_what_it_did(host: RecordedHost, capsys: pytest.CaptureFixture[str]) -> None:
    life = staged(host)
    assert life.staged is not None
    assert finalize_main(["--root", str(host.root)]) == 0
    assert capsys.readouterr().out == f"finalized {life.staged.id}\n"
    assert host.reboot() == life.staged.id


def test_a_conflict_in_etc_leaves_the_old_order(
    host: RecordedHost, capsys: pytest.CaptureFixture[str]
) -> None:
    life = staged(host)
    assert life.staged is not None
    (host.root / "etc/os.conf").unlink()
    (host.root / "etc/os.conf").mkdir()
    assert finalize_main(["--root", str(host.root)]) != 0
    assert "/etc/os.conf" in capsys.readouterr().err
    assert host.marker.exists()
    with session(host) as opened:
        assert opened.state().staged_deployment is not None
    assert host.reboot() == life.booted.id


@pytest.mark.parametrize("ours_first", [True, False])
def test_two_finalizers_activate_once(host: RecordedHost, cfsctl: str, ours_first: bool) -> None:
    life = staged(host)
    assert life.staged is not None
    model = Bootc(host.root, cfsctl, host.images)
    if ours_first:
        with session(host) as opened:
            assert finalize(opened)["result"] == "finalized"
        assert model.finalize() == "nothing"
    else:
        assert model.finalize() == "activated"
        with session(host) as opened:
            finalize(opened)
    assert host.reboot() == life.staged.id


def _steps(tmp_path: Path, cfsctl: str, kind: object) -> int:
    host = RecordedHost(tmp_path / "count", cfsctl, kind=kind)  # type: ignore[arg-type]
    staged(host)
    counting = At(-1)
    with session(host, counting) as opened:
        finalize(opened)
    assert [point for point in module.FAULT_POINTS if point not in counting.points] in (
        [],
        # Nothing in /etc was changed.
        ["etc-merge.built", "etc-merge.synced", "etc-merge.exchanged"],
    )
    return len(counting.points)


@pytest.mark.parametrize(
    ("kind", "ending"), [*((kind, Crash) for kind in KINDS[:3]), (KINDS[2], Cancelled)], ids=str
)
def test_interrupted_anywhere_the_host_boots_the_old_or_the_new(
    tmp_path: Path, cfsctl: str, kind: object, ending: type[BaseException]
) -> None:
    for number in range(_steps(tmp_path, cfsctl, kind)):
        host = RecordedHost(tmp_path / f"host{number}", cfsctl, kind=kind)  # type: ignore[arg-type]
        life = staged(host)
        assert life.staged is not None
        (host.root / "etc/hostname").write_text("mine\n")
        with pytest.raises(ending), session(host, At(number, ending)) as opened:
            finalize(opened)
        _check(host, life, cfsctl, again=number % 2 == 0)


def _check(host: RecordedHost, life: Life, cfsctl: str, *, again: bool) -> None:
    """Whatever comes next - bootc's finalizer, ours again, or the power - what boots is whole."""
    assert life.staged is not None
    assert life.rollback is not None
    if again:
        with session(host) as opened:
            finalize(opened)
        assert host.reboot() == life.staged.id
        assert (host.root / "etc/hostname").read_text() == "mine\n"
    else:
        exchanged = life.staged.id in host.menu()[0].text
        Bootc(host.root, cfsctl, host.images).finalize()
        if exchanged:
            assert host.reboot() == life.staged.id
            assert (host.root / "etc/hostname").read_text() == "mine\n"
        else:
            assert host.reboot() in (life.booted.id, life.staged.id)
    with session(host) as opened:
        reorder.begin(opened)
        state = opened.state()
    assert state.staged_deployment is None
    assert not host.entries_staged.exists()
    assert state.booted_deployment is not None
    assert state.booted_deployment.bootable
    assert not list((host.root / "sysroot/state/hostimaged").glob("transaction*"))
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


@pytest.mark.parametrize("point", ["etc-merge.built", "etc-merge.exchanged", "finalize.merged"])
def test_a_merge_is_forgotten_when_bootc_rolls_back_in_its_middle(
    host: RecordedHost, cfsctl: str, point: str
) -> None:
    life = staged(host)
    assert life.staged is not None
    (host.root / "etc/hostname").write_text("mine\n")
    counting = At(-1)
    other = host.copy(host.root.with_name("other"))
    with session(other, counting) as opened:
        finalize(opened)
    with pytest.raises(Crash), session(host, At(counting.points.index(point))) as opened:
        finalize(opened)
    Bootc(host.root, cfsctl, host.images).rollback()
    first = host.menu()[0].text
    with session(host) as opened:
        reorder.begin(opened)
    assert host.menu()[0].text == first
    # Its state may be left to the collector, but as it was made.
    if host.state(life.staged).exists():
        assert not list(host.state(life.staged).glob(".etc*"))
        assert (host.state(life.staged) / "etc/hostname").read_text() == "image\n"


def test_a_deployment_that_would_not_start_is_not_activated(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    (host.repository / "images" / life.staged.id).unlink()
    with session(host) as opened, pytest.raises(HostimageError, match="would not start"):
        finalize(opened)
    assert host.reboot() == life.booted.id
