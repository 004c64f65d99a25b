"""Collections of ours, of bootc and of composefs-rs in turn: nobody removes what another keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bootc_collect import Removed
from bootc_model import Bootc

from hostimage_testing.collecting import DAY, age, collected, objects
from hostimage_testing.hosts import KINDS, Era, Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, Records, installed, locked, staged, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import Recipe
from hostimaged.host import reorder
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.stage import StageRequest, stage
from hostimaged.ids import DeploymentId, ManifestDigest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_era = pytest.mark.parametrize("era", list(Era), ids=str)
LIVES = (installed, upgraded, staged, locked)
REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
NEXT = Recipe(version="9", kernel=b"kernel nine ", etc={"new.conf": b"new\n"})

Recorded = Callable[..., Life]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Records:
    return Records(tmp_path_factory.mktemp("records"), cfsctl)


@pytest.fixture
def recorded(tmp_path: Path, records: Records) -> Recorded:
    def copied(make: Any, kind: Kind, era: Era = Era.CURRENT) -> Life:
        return records.copy(make, tmp_path / "host", kind, era)

    return copied


def garbage(host: RecordedHost) -> None:
    """What somebody pulled and did not deploy, with bootc's tag, long ago; and what nothing refers to."""
    age(host.write_tag(host.image(Recipe(version="50"))), 3 * DAY)
    host.image(Recipe(version="51"))


def bootc(host: RecordedHost, cfsctl: str) -> Bootc:
    return Bootc(host.root, cfsctl, host.images)


def whole(life: Life, cfsctl: str) -> None:
    """Every deployment has all that it needs, to composefs-rs and to the boot loader."""
    Judge(cfsctl, life.host.repository).check()
    for each in (life.booted, life.rollback, life.staged):
        if each is not None:
            assert (life.host.repository / "images" / each.id).exists()
    for line in life.host.menu():
        life.host.startable(line)


@every_kind
@pytest.mark.parametrize("make", LIVES)
def test_a3_after_ours_neither_bootc_nor_composefs_rs_finds_anything(
    recorded: Recorded, kind: Kind, make: Any, cfsctl: str
) -> None:
    life = recorded(make, kind)
    garbage(life.host)
    assert collected(life.host)["objects-removed"] > 0
    left = objects(life.host.repository)
    Judge(cfsctl, life.host.repository)("gc")
    assert objects(life.host.repository) == left
    assert bootc(life.host, cfsctl).gc(dry_run=True) == Removed()
    assert bootc(life.host, cfsctl).gc() == Removed()
    assert objects(life.host.repository) == left
    whole(life, cfsctl)


@every_kind
@pytest.mark.parametrize("make", LIVES)
def test_a3_after_bootcs_ours_finds_nothing(recorded: Recorded, kind: Kind, make: Any, cfsctl: str) -> None:
    """All the gaps of bootc's that are documented are about other hosts than these."""
    life = recorded(make, kind)
    garbage(life.host)
    assert not bootc(life.host, cfsctl).gc().nothing
    done = collected(life.host)
    assert (done["result"], done["objects-removed"]) == ("nothing", 0)
    whole(life, cfsctl)


@every_kind
@pytest.mark.parametrize("make", LIVES)
def test_a3_after_composefs_rs_ours_finds_only_what_its_tags_kept(
    recorded: Recorded, kind: Kind, make: Any, cfsctl: str
) -> None:
    life = recorded(make, kind)
    life.host.image(Recipe(version="51"))
    Judge(cfsctl, life.host.repository)("gc")
    assert collected(life.host)["result"] == "nothing"
    garbage(life.host)
    Judge(cfsctl, life.host.repository)("gc")
    done = collected(life.host)
    assert len(done["tags"]) == 1
    whole(life, cfsctl)


@every_kind
@every_era
@pytest.mark.parametrize("make", [upgraded, staged])
def test_a1_a_host_of_any_era_is_collected_without_loss(
    recorded: Recorded, kind: Kind, era: Era, make: Any, cfsctl: str
) -> None:
    """The dry run, too, names no live object: it removes what the real one does."""
    life = recorded(make, kind, era)
    life.host.image(Recipe(version="51"))
    done = collected(life.host)
    assert done["result"] == "collected"
    assert done["deployments-kept"] == 2 + (make is staged)
    assert "states" not in done
    Judge(cfsctl, life.host.repository)("gc")
    whole(life, cfsctl)
    assert collected(life.host)["result"] == "nothing"
    life.host.reboot()


@every_kind
def test_a_whole_life_is_collected_by_all_in_turn(recorded: Recorded, kind: Kind, cfsctl: str) -> None:
    """Update, shutdown, reboot, delete: after each of our operations an administrator's gc harms nothing."""
    life = recorded(installed, kind)
    host, judge = life.host, Judge(cfsctl, life.host.repository)
    image = host.image(NEXT)

    def everybody() -> None:
        judge("gc")
        judge.check()
        collected(host)
        assert bootc(host, cfsctl).gc() == Removed()
        assert bootc(host, cfsctl).accepts() == []

    with session(host) as opened:
        stage(opened, StageRequest(ManifestDigest(image.manifest_digest), REFERENCE))
    everybody()
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id
    everybody()
    assert (host.repository / "images" / life.booted.id).exists()
    with session(host) as opened:
        reorder.delete(opened, DeploymentId(life.booted.id))
    age(host.tag(life.booted.image), 2 * DAY)
    everybody()
    assert not (host.repository / "images" / life.booted.id).exists()
    assert host.reboot() == image.id


def test_bootcs_tag_without_a_deployment_outlives_ours_and_its_update_goes_on(
    recorded: Recorded, cfsctl: str
) -> None:
    """It tags before it deploys; between the two our collection comes."""
    life = recorded(installed, Kind(Loader.SYSTEMD))
    host, model = life.host, bootc(life.host, cfsctl)
    image = host.image(NEXT)
    model._pull(image)
    collected(host)
    assert host.tag(image).is_symlink()
    Judge(cfsctl, host.repository).check()
    assert model.upgrade(image) == "staged"
    collected(host)
    assert model.finalize() == "activated"
    assert host.reboot() == image.id
