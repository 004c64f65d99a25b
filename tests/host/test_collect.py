"""Collecting garbage on whole hosts: what stays, and what goes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bootc_model import Bootc

from hostimage_testing.collecting import DAY, age, collected, objects, told
from hostimage_testing.hosts import Deployment, Era, Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, installed, staged, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.errors import LockTimeout
from hostimaged.host import reorder, tags
from hostimaged.host.collect import collect
from hostimaged.host.collectplan import Rules
from hostimaged.host.imgref import OriginReference
from hostimaged.host.pins import set_pinned
from hostimaged.host.session import open_session
from hostimaged.host.stage import StageRequest, stage, unstage
from hostimaged.ids import DeploymentId, ManifestDigest, SourceDigest
from hostimaged.oci import pulls
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]
SYSTEMD = Kind(Loader.SYSTEMD)
OTHER = Recipe(version="8", files={"usr/share/other": b"only here\n" * 50})
FOLLOWED = "docker://registry.example/os:stable"


def judged(host: RecordedHost, cfsctl: str) -> Judge:
    """The judge, who finds nothing wrong, and nothing left to collect."""
    judge = Judge(cfsctl, host.repository)
    judge.check()
    before = objects(host.repository)
    judge("gc")
    assert objects(host.repository) == before
    judge.check()
    return judge


def complete(host: RecordedHost, *deployments: Deployment | None) -> None:
    """Each has its image, with every object that it needs, and its manifest if that was kept."""
    for deployment in deployments:
        assert deployment is not None
        assert (host.repository / "images" / deployment.id).exists()
        assert host.state(deployment).is_dir()
        assert host.artifact(deployment).exists()


def present(host: RecordedHost, image: OsImage) -> bool:
    return (host.repository / "images" / image.id).exists()


# --- what stays and what goes ------------------------------------------------------------------------------


def test_r6_what_manifests_of_deployments_reach_stays_and_the_rest_goes(
    recorded: Recorded, kind: Kind, cfsctl: str
) -> None:
    life = recorded(staged, kind)
    host, other = life.host, life.host.image(OTHER)
    done = collected(host)
    assert done["result"] == "collected"
    assert done["deployments-kept"] == 3
    assert not present(host, other)
    assert not host.stream("manifest", other.manifest_digest).is_symlink()
    complete(host, life.booted, life.rollback, life.staged)
    judged(host, cfsctl)
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    assert collected(host)["result"] == "nothing"
    assert host.reboot() == life.booted.id


def test_r7_an_administrators_collector_harms_no_deployment(
    recorded: Recorded, kind: Kind, era: Era, cfsctl: str
) -> None:
    """Also of hosts of old, whose deployments nothing in the repository pointed to."""
    life = recorded(staged, kind, era=era)
    host = life.host
    collected(host)
    judge = Judge(cfsctl, host.repository)
    judge("gc")
    judge.check()
    complete(host, life.booted, life.rollback, life.staged)
    for line in host.menu():
        host.startable(line)


def test_r7_where_the_manifest_is_not_kept_the_image_is_referred_to(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(upgraded, SYSTEMD, era=Era.BARE)
    host = life.host
    assert collected(host)["deployments-kept"] == 2
    for deployment in (life.booted, life.rollback):
        assert deployment is not None
        link = host.repository / "images/refs/hostimaged" / deployment.id
        assert os.readlink(link) == f"../../{deployment.id}"
    with session(host) as opened:
        assert life.rollback is not None
        reorder.delete(opened, DeploymentId(life.rollback.id))
    assert collected(host)["tags"] == [f"hostimaged/{life.rollback.id}"]
    assert not present(host, life.rollback.image)
    judged(host, cfsctl)


def test_r8_what_tags_of_others_reach_stays(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(installed)
    host, app = life.host, life.host.image(OTHER)
    host.write_tag(app, "localhost/app-")
    collected(host)
    assert present(host, app)
    judged(host, cfsctl).check(images=2)


def test_r10_a_tag_that_is_missing_is_made_before_anything_goes(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    host.tag(life.rollback.image).unlink()
    host.image(OTHER)
    done = collected(host)
    assert done["tags-made"] == [f"localhost/bootc-{life.rollback.image.manifest_digest}"]
    assert host.tag(life.rollback.image).resolve().exists()
    complete(host, life.booted, life.rollback)
    judged(host, cfsctl)


def test_r11_what_two_deployments_share_outlives_one_of_them(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    with session(host) as opened:
        reorder.delete(opened, DeploymentId(life.rollback.id))
    age(host.tag(life.rollback.image), 2 * DAY)
    done = collected(host)
    assert done["tags"] == [f"localhost/bootc-{life.rollback.image.manifest_digest}"]
    assert done["objects-removed"] > 0
    assert not present(host, life.rollback.image)
    judged(host, cfsctl).check(images=1)
    assert host.reboot() == life.booted.id


def test_r14_a_deployment_without_an_origin_is_a_root(recorded: Recorded, kind: Kind, cfsctl: str) -> None:
    life = recorded(upgraded, kind)
    host = life.host
    assert life.rollback is not None
    host.origin(life.rollback).unlink()
    age(host.tag(life.rollback.image), 2 * DAY)
    assert collected(host)["deployments-kept"] == 2
    complete(host, life.booted, life.rollback)
    judged(host, cfsctl)


def test_r31_a_damaged_deployment_degrades_itself_alone(recorded: Recorded, cfsctl: str) -> None:
    """Its manifest is lost, its origin is none: its image stays, and what others left behind goes."""
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    host.origin(life.rollback).write_bytes(b"\xff no origin")
    host.tag(life.rollback.image).unlink()
    host.stream("manifest", life.rollback.image.manifest_digest).unlink()
    other = host.image(OTHER)
    done = collected(host)
    assert done["result"] == "collected"
    assert done["deployments-kept"] == 2
    assert not present(host, other)
    assert (host.repository / "images/refs/hostimaged" / life.rollback.id).is_symlink()
    judged(host, cfsctl)
    for line in host.menu():
        host.startable(line)


def test_r31_a_dangling_tag_is_pruned_and_told(recorded: Recorded, cfsctl: str) -> None:
    """It would stop composefs-rs's own collector."""
    life = recorded(installed)
    host = life.host
    host.tag(life.booted.image, "localhost/gone-").symlink_to("../../oci-manifest-sha256:" + "0" * 64)
    done = collected(host)
    assert [Path(each).name.partition("-")[0] for each in done["dangling"]] == ["localhost%2Fgone"]
    judged(host, cfsctl)


# --- leftovers of deployments ------------------------------------------------------------------------------


def test_r15_an_entry_without_state_goes_unless_it_runs(recorded: Recorded, kind: Kind, cfsctl: str) -> None:
    life = recorded(upgraded, kind)
    host = life.host
    assert life.rollback is not None
    shutil.rmtree(host.state(life.rollback))
    age(host.tag(life.rollback.image), 2 * DAY)
    done = collected(host)
    assert done["entries"] == [life.rollback.id]
    assert done["artifacts"] == [life.rollback.id]
    assert len(host.menu()) == 1
    assert not host.artifact(life.rollback).exists()
    assert not present(host, life.rollback.image)
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    assert host.reboot() == life.booted.id
    shutil.rmtree(host.state(life.booted))
    assert "no state directory" in collected(host)["reasons"][0]


def test_an_entry_of_somebody_elses_file_stays(recorded: Recorded) -> None:
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    shutil.rmtree(host.state(life.rollback))
    (entry,) = [path for path in host.entries.iterdir() if life.rollback.id in path.read_text()]
    entry.rename(entry.with_name("mine.conf"))
    assert "entries" not in collected(host)
    assert present(host, life.rollback.image)
    assert len(host.menu()) == 2


def test_a_state_directory_without_an_entry_goes_with_what_it_needed(recorded: Recorded, kind: Kind) -> None:
    life = recorded(installed, kind)
    host = life.host
    orphan = host.deploy(host.image(OTHER))
    age(host.tag(orphan.image), 2 * DAY)
    done = collected(host)
    assert done["states"] == [orphan.id]
    assert done["artifacts"] == [orphan.id]
    assert done["boot-bytes"] > 0
    assert not host.state(orphan).exists()
    assert not present(host, orphan.image)


def test_a_marker_that_names_nothing_goes_first(recorded: Recorded) -> None:
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    shutil.rmtree(host.entries_staged)
    age(host.tag(life.staged.image), 2 * DAY)
    assert collected(host)["states"] == [life.staged.id]
    assert not host.marker.exists()
    assert not present(host, life.staged.image)


def test_what_was_staged_before_the_power_went_goes(recorded: Recorded, kind: Kind, cfsctl: str) -> None:
    life = recorded(staged, kind)
    host = life.host
    assert life.staged is not None
    host.marker.unlink()
    age(host.tag(life.staged.image), 2 * DAY)
    assert collected(host)["states"] == [life.staged.id]
    assert not host.entries_staged.exists()
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    judged(host, cfsctl)


def test_a_pinned_deployment_without_an_entry_stays(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    pinned = life.staged
    with session(host) as opened:
        set_pinned(opened, DeploymentId(pinned.id), pinned=True)
        unstage(opened)
    host.tag(pinned.image).unlink()
    done = collected(host)
    assert "states" not in done
    complete_image = present(host, pinned.image) and host.state(pinned).is_dir()
    assert complete_image
    # Bootc and cfsctl keep it too, for its tag.
    judged(host, cfsctl)


def test_with_pins_a_state_directory_of_unknown_image_stays(recorded: Recorded) -> None:
    life = recorded(upgraded)
    host = life.host
    orphan = host.deploy(host.image(OTHER))
    host.origin(orphan).write_bytes(b"nothing")
    with session(host) as opened:
        set_pinned(opened, DeploymentId(life.booted.id), pinned=True)
    assert "states" not in collected(host)
    assert host.state(orphan).is_dir()


# --- tags --------------------------------------------------------------------------------------------------


def test_r9_a_young_tag_that_bootc_made_stays_for_a_day(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    link = host.write_tag(image)
    assert collected(host)["result"] in ("nothing", "collected")
    assert present(host, image)
    age(link, DAY - 600)
    assert "tags" not in collected(host)
    age(link, DAY + 600)
    assert collected(host)["tags"] == [f"localhost/bootc-{image.manifest_digest}"]
    assert not present(host, image)
    judged(host, cfsctl)


def test_a_tag_that_was_made_here_goes_at_once(recorded: Recorded) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    request = StageRequest(
        ManifestDigest(image.manifest_digest), OriginReference.parse(f"ostree-unverified-image:{FOLLOWED}")
    )
    with session(host) as opened:
        stage(opened, request)
        unstage(opened)
    assert collected(host)["tags"] == [f"localhost/bootc-{image.manifest_digest}"]
    assert not present(host, image)
    assert json.loads(HostPaths.scratch(host.root).made_tags.read_text())["tags"] == {}


def test_the_same_tag_made_anew_by_bootc_does_not(recorded: Recorded) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    with session(host) as opened:
        tags.tag_deployment(opened.paths, opened.repository, ManifestDigest(image.manifest_digest))
    host.tag(image).unlink()
    host.write_tag(image)
    assert "tags" not in collected(host)


def pulled(host: RecordedHost, image: OsImage, reference: str, days_ago: float) -> str:
    """The image as a pull of ours left it."""
    link = host.write_tag(image, "localhost/hostimaged-pull-")
    age(link, days_ago * DAY)
    digest = image.manifest_digest
    row = pulls.PullRow(
        reference, ManifestDigest(digest), SourceDigest(digest), int(time.time() - days_ago * DAY)
    )
    pulls.record(HostPaths.scratch(host.root).pulls, row)
    return f"localhost/hostimaged-pull-{digest}"


def test_pulled_images_go_when_they_are_superseded(recorded: Recorded) -> None:
    life = recorded(installed)
    host = life.host
    old, newest, elsewhere, long_ago, untold = (
        host.image(Recipe(version=str(number), kernel=b"kernel %d " % number)) for number in range(40, 45)
    )
    superseded = pulled(host, old, FOLLOWED, 3)
    pulled(host, newest, FOLLOWED, 200)
    pulls.record(
        HostPaths.scratch(host.root).pulls,
        pulls.PullRow(
            FOLLOWED,
            ManifestDigest(newest.manifest_digest),
            SourceDigest(newest.manifest_digest),
            int(time.time()),
        ),
    )
    pulled(host, elsewhere, "docker://registry.example/other:1", 29)
    forgotten = pulled(host, long_ago, "docker://registry.example/another:1", 31)
    link = host.write_tag(untold, "localhost/hostimaged-pull-")
    age(link, 29 * DAY)
    assert collected(host)["tags"] == sorted([superseded, forgotten])
    assert [present(host, image) for image in (old, newest, elsewhere, long_ago, untold)] == [
        False, True, True, False, True,
    ]  # fmt: skip
    assert len(collected(host, Rules(keep_pulled=28))["tags"]) == 2
    assert present(host, newest)


def test_the_tracked_image_of_the_settings_stays(recorded: Recorded) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    pulled(host, image, "docker://registry.example/wanted:1", 400)
    assert "tags" not in collected(host, Rules(tracked="docker://registry.example/wanted:1"))
    assert len(collected(host, Rules(tracked="docker://registry.example/wanted:2"))["tags"]) == 1


def test_where_space_is_short_pulled_images_go_before_their_time(recorded: Recorded) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    pulled(host, image, "docker://registry.example/other:1", 1)
    assert "tags" not in collected(host, Rules(minimum_free=1))
    assert len(collected(host, Rules(minimum_free=1 << 32))["tags"]) == 1


def test_without_a_list_of_pulls_no_pulled_image_goes(recorded: Recorded) -> None:
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    pulled(host, image, "docker://registry.example/other:1", 400)
    HostPaths.scratch(host.root).pulls.write_text("{")
    assert "tags" not in collected(host)


# --- locks -------------------------------------------------------------------------------------------------


def test_r13_the_exclusive_lock_is_never_asked_for_while_the_shared_one_is_held(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole update and its collection, with a second between asking and having as the watchdog."""
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    reference = OriginReference.parse(f"ostree-unverified-image:{FOLLOWED}")
    begin = time.monotonic()
    with open_session(HostPaths.scratch(host.root), Silent(), lock_timeout=1) as opened:
        stage(opened, StageRequest(ManifestDigest(image.manifest_digest), reference))
    with open_session(HostPaths.scratch(host.root), Silent(), lock_timeout=1) as opened:
        assert collect(opened)["result"] in ("collected", "nothing")
    assert time.monotonic() - begin < 60
    assert present(host, image)


def test_a_lock_of_others_is_waited_for_a_while_and_its_holder_named(recorded: Recorded) -> None:
    life = recorded(installed)
    host = life.host
    host.image(OTHER)
    before = objects(host.repository)
    holder = os.open(host.repository, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_SH)
        with (
            open_session(HostPaths.scratch(host.root), Silent(), lock_timeout=0.2) as opened,
            pytest.raises(LockTimeout, match=f"pid {os.getpid()} "),
        ):
            collect(opened)
    finally:
        os.close(holder)
    assert objects(host.repository) == before


class _Meanwhile(Silent):
    """Does something when the exclusive lock is there, and before it is asked for."""

    def __init__(self, point: str, act: Callable[[], Any]) -> None:
        self._point = point
        self._act = act

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point == self._point:
            self._point = ""
            self._act()


def test_the_mark_that_counts_is_made_with_the_exclusive_lock(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program tagged while the lock was waited for stays."""
    life = recorded(installed)
    host, image = life.host, life.host.image(OTHER)
    with session(host) as opened:
        relock = opened.repository.relock

        def late(**options: Any) -> None:
            host.write_tag(image, "localhost/late-")
            relock(**options)

        monkeypatch.setattr(type(opened.repository), "relock", lambda self, **options: late(**options))
        collect(opened)
    assert present(host, image)


def test_r30_all_is_read_before_the_first_tag_goes(recorded: Recorded) -> None:
    """After the last look at metadata nothing of it is read again: it may all be gone."""
    life = recorded(upgraded)
    host, image = life.host, life.host.image(OTHER)
    age(host.write_tag(image), 9 * DAY)
    expected = told(host)
    streams = host.repository / "streams"

    def gone() -> None:
        for path in streams.iterdir():
            if path.is_symlink() and image.manifest_digest in path.name:
                path.unlink()

    with session(host, _Meanwhile("collect.untagged", gone)) as opened:
        done = collect(opened)
    assert done["objects-removed"] == expected["objects-removed"]
    assert not present(host, image)


def test_of_two_manifests_that_say_the_same_the_tagged_one_is_the_deployments(recorded: Recorded) -> None:
    """They have one configuration; without an origin either could be meant."""
    life = recorded(installed)
    host = life.host
    twin = host.image(Recipe(version="1", annotated=False))
    assert twin.config_digest == life.booted.image.config_digest
    host.write_tag(twin, "localhost/app-")
    age(host.tag(life.booted.image), 9 * DAY)
    host.origin(life.booted).unlink()
    done = collected(host)
    assert "tags" not in done
    assert "tags-made" not in done
