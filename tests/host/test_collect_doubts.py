"""Collecting garbage where it is not certain what is needed: nothing goes, and the reason is told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing.collecting import DAY, age, collected, everything
from hostimage_testing.hosts import RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, upgraded
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.system.paths import HostPaths

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]
OTHER = Recipe(version="8", files={"usr/share/other": b"only here\n" * 50})


def present(host: RecordedHost, image: OsImage) -> bool:
    return (host.repository / "images" / image.id).exists()


def _damage_entry(life: Life) -> None:
    (life.host.entries / "bootc_testos-9-1.conf").write_text("title no kernel\n")


def _stale_boot_directory(life: Life) -> None:
    assert life.rollback is not None
    life.host.live(life.rollback)


def _unmounted(life: Life) -> None:
    shutil.rmtree(life.host.boot_dir / "loader")


def _unknown_booted(life: Life) -> None:
    facts = life.host.root / "proc/self/mountinfo"
    facts.write_text(facts.read_text().replace(f"composefs:{life.booted.id}", "/dev/vda1"))


def _booted_elsewhere(life: Life) -> None:
    facts = life.host.root / "proc/self/mountinfo"
    facts.write_text(facts.read_text().replace(f"composefs:{life.booted.id}", "composefs:" + "a" * 128))


def _damaged_marker(life: Life) -> None:
    life.host.marker.parent.mkdir(parents=True, exist_ok=True)
    life.host.marker.write_text("{")


def _damaged_stream(life: Life) -> None:
    assert life.rollback is not None
    target = life.host.stream("config", life.rollback.image.config_digest).resolve()
    target.write_bytes(target.read_bytes()[:-7] + b"garbage")


def _truncated_image(life: Life) -> None:
    assert life.rollback is not None
    target = (life.host.repository / "images" / life.rollback.id).resolve()
    os.truncate(target, 100)


def _foreign_damage(life: Life) -> None:
    image = life.host.image(Recipe(version="77"))
    life.host.write_tag(image, "localhost/app-")
    life.host.stream("config", image.config_digest).resolve().write_bytes(b"nothing")


def _damaged_journal(life: Life) -> None:
    path = HostPaths.scratch(life.host.root).transaction
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")


def _linked_repository(life: Life) -> None:
    aside = life.host.sysroot.with_name("elsewhere")
    life.host.repository.rename(aside)
    life.host.repository.symlink_to(aside)


def _guest(life: Life) -> None:
    image = life.host.image(Recipe(version="78"))
    life.host.write_tag(image, "localhost/hostimaged-guest-")


DOUBTS: dict[str, tuple[Callable[[Life], None], str]] = {
    "an entry that makes no sense": (_damage_entry, "bootc_testos-9-1.conf"),
    "a stale boot directory": (_stale_boot_directory, "another boot directory"),
    "an unmounted boot directory": (_unmounted, "no boot directory with entries"),
    "nobody knows what runs": (_unknown_booted, "not mounted from one"),
    "what runs has no entry": (_booted_elsewhere, "another boot directory"),
    "a marker that makes no sense": (_damaged_marker, "staged-deployment"),
    "a damaged stream": (_damaged_stream, "streams/oci-config-sha256"),
    "a damaged image": (_truncated_image, "images/"),
    "a damaged image of others": (_foreign_damage, "streams/oci-config-sha256"),
    "a damaged journal": (_damaged_journal, "journal"),
    "a repository that is elsewhere": (_linked_repository, "has its place elsewhere"),
    "a repository with a guest": (_guest, "another host"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_in_doubt_nothing_is_deleted_and_the_reason_is_told(recorded: Recorded, name: str) -> None:
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    garbage = host.image(OTHER)
    age(host.write_tag(garbage), 9 * DAY)
    host.deploy(host.image(Recipe(version="7", kernel=b"kernel seven ")))
    host.tag(life.rollback.image).unlink()
    doubt, reason = DOUBTS[name]
    doubt(life)
    before = everything(host.root)
    done = collected(host)
    assert done["result"] == "kept"
    assert reason in " ".join(done["reasons"])
    after = everything(host.root)
    # Tags that were missing may have been made; nothing else is different.
    assert {path: after.get(path) for path in before} == before
    added = {path for path in after.keys() - before.keys() if not path.startswith("sysroot/state/hostimaged")}
    assert all("/refs" in path for path in added), added


def test_two_hosts_that_share_a_repository_keep_each_others_deployments(
    recorded: Recorded, tmp_path: Path, cfsctl: str
) -> None:
    life = recorded(upgraded)
    owner = life.host
    guest = RecordedHost(tmp_path / "guest", cfsctl, kind=owner.kind)
    image = owner.image(OTHER)
    guest.images[image.id] = image
    shutil.rmtree(guest.repository)
    guest.repository.symlink_to(owner.repository)
    deployment = guest.deploy(image, tagged=False)
    guest.live(deployment)
    guest.booted(deployment)
    done = collected(guest)
    assert done["result"] == "kept"
    assert "has its place elsewhere" in done["reasons"][0]
    age(owner.tag(image), 9 * DAY)
    done = collected(owner)
    assert done["result"] == "kept"
    assert "another host" in done["reasons"][0]
    assert guest.startable(guest.menu()[0]).id == image.id
    # Whoever collects what is not referred to leaves it, too.
    Judge(cfsctl, owner.repository)("gc")
    assert present(owner, image)
