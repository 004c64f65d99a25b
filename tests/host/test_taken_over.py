"""Hosts of bootc: upgraded and rolled back by us, then bootc goes on (A2; R-1, R-2, R-16, R-33)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bootc_formats import parse_ini
from bootc_model import Bootc

from hostimage_testing.hosts import Era, Kind, RecordedHost
from hostimage_testing.lives import Life, upgraded
from hostimage_testing.os_images import OsImage, Recipe
from hostimage_testing.recorded import paths_of, problems_of, state_of
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.reorder import cancel_rollback, rollback
from hostimaged.host.session import Session, open_session
from hostimaged.host.stage import StageRequest, stage
from hostimaged.ids import ManifestDigest
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]
REFERENCE = OriginReference.of(ImageReference.parse("docker://registry.example/os:stable"))


#: Of two upgrades in a row.
VERSIONS = [("9.9", "9.10"), ("9.10", "9.9"), ("44", "44"), ("2", "1~rc1"), ("b", "")]


def run(host: RecordedHost, operation: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
    with open_session(paths_of(host), Silent()) as session:
        return operation(session)


def pulled(host: RecordedHost, version: str, **more: Any) -> OsImage:
    """An image as our pull leaves it: in the repository, whatever the era of the host, and tagged."""
    era, host.era = host.era, Era.CURRENT
    image = host.image(Recipe(version=version, kernel=version.encode() * 9, **more))
    host.write_tag(image, "localhost/hostimaged-pull-")
    host.era = era
    return image


def stage_image(host: RecordedHost, image: OsImage, **more: Any) -> dict[str, Any]:
    request = StageRequest(ManifestDigest(image.manifest_digest), REFERENCE, **more)
    return run(host, lambda session: stage(session, request))


def upgrade(host: RecordedHost, image: OsImage) -> None:
    """Stage, shut down, boot."""
    assert stage_image(host, image)["result"] == "staged"
    assert run(host, finalize)["result"] == "finalized"
    assert host.reboot() == image.id


def without_prefix(host: RecordedHost) -> Life:
    """As ``upgraded``, by a bootc that had no prefix for its kernels."""
    old = host.deploy(host.image(Recipe(version="1")), prefixed=False)
    new = host.deploy(host.image(Recipe(version="2", kernel=b"kernel two ")), prefixed=False)
    host.live(new, old)
    host.booted(new)
    return Life(host, new, rollback=old)


@pytest.mark.parametrize("era", [Era.SIDECAR, Era.CURRENT], ids=str)
def test_a2_names_without_prefix_do_not_cost_our_entry(
    recorded: Recorded, cfsctl: str, kind: Kind, era: Era
) -> None:
    """bootc gives all entries the prefix, and drops from the menu those that have it already."""
    host = recorded(without_prefix, kind, era=era).host
    fresh = pulled(host, "3")
    upgrade(host, fresh)
    bootc = Bootc(host.root, cfsctl, host.images)
    assert bootc.status()["status"]["booted"]["composefs"]["verity"] == fresh.id
    assert bootc.accepts() == []
    assert host.reboot() == fresh.id


def test_a2_bootc_goes_on_after_our_upgrade(recorded: Recorded, cfsctl: str, kind: Kind, era: Era) -> None:
    host = recorded(upgraded, kind, era=era).host
    upgrade(host, pulled(host, "3"))
    if era is Era.BARE:
        # What runs of that era bootc itself cannot read; with the next upgrade the last of it is gone.
        assert len(Bootc(host.root, cfsctl, host.images).accepts()) == 1
        upgrade(host, pulled(host, "4"))
    bootc = Bootc(host.root, cfsctl, host.images)
    assert bootc.accepts() == []
    bootc.gc()
    state = state_of(host)
    assert len(state.visible) == 2
    assert all(problems_of(row) == set() and row.image and row.image.proven for row in state.visible)
    fresh = pulled(host, "5")
    assert bootc.upgrade(fresh) == "staged"
    assert bootc.finalize() == "activated"
    assert host.reboot() == fresh.id
    assert bootc.accepts() == []


def test_r16_roll_back_and_forth(recorded: Recorded, kind: Kind, era: Era) -> None:
    life = recorded(upgraded, kind, era=era)
    assert life.rollback
    assert run(life.host, rollback)["result"] == "queued"
    assert state_of(life.host).rollback_queued
    assert run(life.host, cancel_rollback)["result"] == "cancelled"
    assert not state_of(life.host).rollback_queued
    run(life.host, rollback)
    assert life.host.reboot() == life.rollback.id
    state = state_of(life.host)
    assert not state.rollback_queued
    assert str(state.rollback_deployment.id) == life.booted.id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "versions", [("9.9", "9.10"), ("9.10", "9.9"), ("44", "44"), ("2", "1~rc1"), ("b", "")]
)
@pytest.mark.parametrize("os_id", ["testos", "a-different-os", "zz"])
def test_r33_the_menu_is_in_our_order_whatever_the_versions(
    recorded: Recorded, cfsctl: str, kind: Kind, versions: tuple[str, str], os_id: str
) -> None:
    """bootc's own names put a lower version, or an earlier os id, behind on GRUB; ours do not."""
    if kind.loader == "systemd":
        versions = versions[::-1]
    host = recorded(upgraded, kind).host
    for number, version in enumerate(versions):
        upgrade(host, pulled(host, f"n{number}", os_version=version, os_id=os_id if number else "testos"))
    before = state_of(host)
    run(host, rollback)
    assert host.reboot() == str(before.rollback_deployment.id)  # type: ignore[union-attr]
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


def test_r1_r2_a_new_deployment_has_its_digest_and_no_sidecar(
    recorded: Recorded, kind: Kind, era: Era
) -> None:
    host = recorded(upgraded, kind, era=era).host
    image = pulled(host, "3")
    stage_image(host, image)
    origin = host.origin(image.id)
    assert parse_ini(origin.read_text(), "origin")["image"]["manifest_digest"] == image.manifest_digest
    assert not origin.read_bytes().endswith(b"\n")
    assert not host.imginfo(image.id).exists()
    assert parse_ini(origin.read_text(), "origin")["boot"] == {
        "boot_type": kind.boot_type,
        "digest": image.boot_digest,
    }


def test_the_question_mark_survives_a_soft_reboot(recorded: Recorded) -> None:
    """bootc loses it, and with it the next boot."""
    life = recorded(upgraded)
    assert life.rollback
    life.host.booted(life.booted, soft_from=life.rollback)
    image = pulled(life.host, "3")
    stage_image(life.host, image)
    entry = next(path for path in life.host.entries_staged.iterdir() if image.id in path.read_text())
    assert f"composefs=?{image.id}" in entry.read_text()


def test_r12_the_repository_is_opened_once(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    from hostimaged.composefs.repository import Repository

    opened: list[object] = []
    plain = Repository.open.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Repository], *arguments: Any, **options: Any) -> Repository:
        opened.append(arguments)
        found: Repository = plain(cls, *arguments, **options)
        return found

    host = recorded(upgraded).host
    image = pulled(host, "3")
    monkeypatch.setattr(Repository, "open", classmethod(counted))
    stage_image(host, image)
    assert len(opened) == 1
    run(host, finalize)
    assert len(opened) == 2
