"""``hostimaged collect``: garbage on the disk of a host that does not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing.collecting import everything, told
from hostimage_testing.hosts import KINDS, Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, upgraded
from hostimage_testing.os_images import Recipe
from hostimaged.__main__ import main
from hostimaged.errors import PreconditionFailed
from hostimaged.host.offline import refuse_running
from hostimaged.system.paths import HostPaths

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]
OTHER = Recipe(version="8", files={"usr/share/other": b"only here\n" * 50})


def run(host: RecordedHost, *options: str) -> int:
    places = {"sysroot": host.sysroot, "boot": host.root / "boot", "esp": host.root / "efi"}
    return main(["collect", *(f"--{name}={path}" for name, path in places.items()), *options])


def numbers(text: str) -> tuple[str, dict[str, int]]:
    word, *fields = text.split()
    pairs = (field.split("=") for field in fields)
    return word, {key: int(value) for key, value in pairs}


def test_what_deployments_need_stays_and_the_rest_goes(
    recorded: Recorded, kind: Kind, cfsctl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    life = recorded(upgraded, kind)
    host, other = life.host, life.host.image(OTHER)
    expected = told(host)
    before = everything(host.root)
    assert run(host, "--dry-run") == 0
    assert everything(host.root) == before
    foretold = numbers(capsys.readouterr().out)
    assert foretold[0] == "collected"
    assert foretold[1] == {key: expected[key] for key in foretold[1]}
    assert foretold[1]["objects-removed"] > 0
    assert run(host) == 0
    assert numbers(capsys.readouterr().out) == foretold
    assert not (host.repository / "images" / other.id).exists()
    for deployment in (life.booted, life.rollback):
        assert deployment is not None
        assert (host.repository / "images" / deployment.id).exists()
        assert host.state(deployment).is_dir()
        assert host.artifact(deployment).exists()
    Judge(cfsctl, host.repository).check()
    assert life.booted is not None
    assert host.reboot() == life.booted.id
    assert run(host) == 0
    assert capsys.readouterr().out.startswith("nothing ")


def test_without_the_boot_entries_nothing_goes(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody forgot to mount, or to name, the EFI system partition."""
    host = recorded(upgraded, Kind(Loader.SYSTEMD)).host
    host.image(OTHER)
    before = everything(host.repository)
    (tmp_path / "empty").mkdir()
    assert main(["collect", f"--sysroot={host.sysroot}", f"--esp={tmp_path / 'empty'}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("kept ")
    assert "no boot directory with entries of deployments" in printed.err
    assert everything(host.repository) == before


def test_two_boot_loaders_with_entries(
    recorded: Recorded, tmp_path: Path, cfsctl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of them starts the host only whoever boots it can tell."""
    host = recorded(upgraded, Kind(Loader.SYSTEMD)).host
    stale = RecordedHost(tmp_path / "stale", cfsctl, kind=KINDS[0])
    image = stale.image(Recipe(version="0"))
    stale.live(stale.deploy(image))
    (stale.root / "boot").rename(host.root / "boot")
    before = everything(host.repository)
    assert run(host) != 0
    assert "name the boot loader" in capsys.readouterr().err
    assert everything(host.repository) == before
    assert run(host, "--bootloader=systemd") == 0


def test_what_is_no_physical_root_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", f"--sysroot={tmp_path}"]) != 0
    assert f"no composefs repository at {tmp_path}/composefs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_host_that_runs_is_refused(tmp_path: Path) -> None:
    running = HostPaths.scratch(tmp_path)
    running.physical_root.mkdir()
    (tmp_path / "link").symlink_to("sysroot")
    with pytest.raises(PreconditionFailed, match="hostimagectl gc"):
        refuse_running(tmp_path / "link", running)
    refuse_running(tmp_path, running)


@pytest.mark.parametrize("days", ["-1", "x", "36501"])
def test_wrong_usage(tmp_path: Path, days: str) -> None:
    with pytest.raises(SystemExit):
        main(["collect", f"--sysroot={tmp_path}", f"--keep-pulled={days}"])
