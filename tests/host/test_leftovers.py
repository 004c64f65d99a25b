"""What interrupted operations leave (operations.md 12), row by row: recognised, then finished or removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bootc_model import Bootc

from hostimage_testing.collecting import collected, everything, objects
from hostimage_testing.disk import Crash
from hostimage_testing.hosts import Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, installed, staged, upgraded
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import Recipe
from hostimaged.composefs.repository import OldRepository, Repository
from hostimaged.host import journal, status
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.recover import settle
from hostimaged.host.stage import StageRequest, stage
from hostimaged.host.upgrade import FAULT_POINTS, upgrade
from hostimaged.ids import ManifestDigest
from hostimaged.oci import images
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

Recorded = Callable[..., Life]
SYSTEMD = Kind(Loader.SYSTEMD)
NEXT = Recipe(version="9", kernel=b"kernel nine ", etc={"new.conf": b"new\n"})
REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")


class _AtPoint(At):
    """Crashes where a point is first reached."""

    def __init__(self, point: str) -> None:
        super().__init__(-1)
        self._point = point

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point == self._point:
            raise Crash


def settled(host: RecordedHost) -> None:
    """What a daemon does when it starts."""
    with session(host) as opened:
        settle(opened)


def crashed_while_staging(life: Life, point: str) -> str:
    """Staging killed at a point; gives the id."""
    image = life.host.image(NEXT)
    request = StageRequest(ManifestDigest(image.manifest_digest), REFERENCE)
    with pytest.raises(Crash), session(life.host, _AtPoint(point)) as opened:
        stage(opened, request)
    return image.id


def as_before(life: Life, cfsctl: str) -> None:
    host = life.host
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    assert not (host.sysroot / "state/hostimaged/transaction.json").exists()
    assert not list(host.root.rglob(".hostimaged-*"))
    assert host.reboot() == life.booted.id


def test_row_layers_partly_pulled(recorded: Recorded, cfsctl: str) -> None:
    """Objects, streams and temporary names of a pull that nobody resumes go with the next collection."""
    life = recorded(installed)
    host = life.host
    image = host.image(NEXT)
    host.stream("manifest", image.manifest_digest).unlink()
    host.stream("config", image.config_digest).unlink()
    (host.repository / ".symlink-abcDEF123456").symlink_to("nowhere")
    (host.repository / "objects/.tmp-object-abcDEF123456").write_bytes(b"half")
    (host.repository / "objects/.mine").write_bytes(b"somebody's")
    collected(host)
    assert not (host.repository / ".symlink-abcDEF123456").is_symlink()
    assert [path.name for path in (host.repository / "objects").glob(".*")] == [".mine"]
    assert not (host.repository / "images" / image.id).exists()
    as_before(life, cfsctl)


@pytest.mark.parametrize("point", ["stage.image", "stage.tagged"])
def test_rows_tag_written_and_boot_image_made(recorded: Recorded, point: str, cfsctl: str) -> None:
    """The data is not lost if a collection comes before the update is tried again: it has a tag of a pull."""
    life = recorded(installed)
    host = life.host
    identifier = crashed_while_staging(life, point)
    digest = host.images[identifier].manifest_digest
    host.write_tag(host.images[identifier], "localhost/hostimaged-pull-")
    settled(host)
    collected(host)
    assert (host.repository / "images" / identifier).exists()
    with session(host) as opened:
        assert stage(opened, StageRequest(ManifestDigest(digest), REFERENCE))["result"] == "staged"
    Judge(cfsctl, host.repository).check()


def test_row_kernel_half_written(recorded: Recorded, cfsctl: str) -> None:
    """By bootc, whose scan then fails for ever; ours have a temporary name until they are whole."""
    life = recorded(installed)
    directory = life.host.bin_dir / ("bootc_composefs-" + "0" * 128)
    directory.mkdir()
    (directory / "vmlinuz").write_bytes(b"half")
    (life.host.bin_dir / ".hostimaged-abcdefgh").mkdir()
    settled(life.host)
    assert not directory.exists()
    as_before(life, cfsctl)


@pytest.mark.parametrize("point", ["stage.journal", "stage.kernel", "stage.state", "stage.entries"])
def test_rows_staged_but_not_marked(recorded: Recorded, point: str, cfsctl: str) -> None:
    life = recorded(installed)
    identifier = crashed_while_staging(life, point)
    settled(life.host)
    assert not life.host.entries_staged.exists()
    assert not life.host.state(identifier).exists()
    as_before(life, cfsctl)


def test_row_bootc_was_killed_before_its_marker(recorded: Recorded, cfsctl: str) -> None:
    """Nothing of ours is written down; the scan sees it, so that the daemon has it settled when it starts."""
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    paths = HostPaths.scratch(host.root)
    assert status.scan(paths)["unsettled"] is False
    host.marker.unlink()
    assert status.scan(paths)["unsettled"] is True
    settled(host)
    assert status.scan(paths)["unsettled"] is False
    assert not host.state(life.staged).exists()
    as_before(life, cfsctl)


def test_row_marker_written_and_nothing_collected(recorded: Recorded) -> None:
    """There is a note for the daemon, and whoever collects takes it away."""
    life = recorded(installed)
    crashed_while_staging(life, "stage.done")
    due = HostPaths.scratch(life.host.root).collection_due
    assert due.exists()
    assert life.host.marker.exists()
    settled(life.host)
    assert due.exists()
    collected(life.host)
    assert not due.exists()
    assert life.host.marker.exists()


def test_row_power_lost_instead_of_a_clean_shutdown(recorded: Recorded, cfsctl: str) -> None:
    """It is noticed, taken back, and staged again without a source."""
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    image = life.staged.image
    host.write_tag(image, "localhost/hostimaged-pull-")
    assert host.reboot() == life.booted.id
    assert status.scan(HostPaths.scratch(host.root))["unsettled"] is True
    settled(host)
    collected(host)
    with session(host) as opened:
        request = StageRequest(ManifestDigest(image.manifest_digest), REFERENCE)
        assert stage(opened, request)["result"] == "staged"
        finalize(opened)
    assert host.reboot() == image.id
    Judge(cfsctl, host.repository).check()


@pytest.mark.parametrize(
    ("point", "boots_new"),
    [
        ("etc-merge.built", False),
        ("etc-merge.exchanged", False),
        ("finalize.merged", False),
        ("finalize.activated", True),
        ("finalize.marker", True),
    ],
)
def test_rows_of_the_shutdown(recorded: Recorded, point: str, boots_new: bool, cfsctl: str) -> None:
    """Before the exchange the old order boots, after it the new one; nothing is exchanged twice."""
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    (host.root / "etc/hostname").write_text("mine\n")
    with pytest.raises(Crash), session(host, _AtPoint(point)) as opened:
        finalize(opened)
    expected = life.staged.id if boots_new else life.booted.id
    assert host.reboot() == expected
    settled(host)
    assert not host.entries_staged.exists()
    assert host.reboot() == expected
    collected(host)
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


def old_host(recorded: Recorded) -> RecordedHost:
    """As bootc up to 1.15 left hosts: a repository without meta.json."""
    host = recorded(upgraded).host
    (host.repository / "meta.json").unlink()
    with pytest.raises(OldRepository):
        Repository.open(host.repository)
    return host


def test_an_old_repository_is_upgraded_and_everything_in_it_kept(recorded: Recorded, cfsctl: str) -> None:
    host = old_host(recorded)
    before = objects(host.repository)
    paths = HostPaths.scratch(host.root)
    result = upgrade(paths, Silent(), lock_timeout=5)
    assert result["images-damaged"] == 0
    assert before.keys() <= objects(host.repository).keys()
    assert not paths.transaction.exists()
    assert collected(host)["deployments-kept"] == 2
    Judge(cfsctl, host.repository).check()
    host.reboot()


@pytest.mark.parametrize("point", [*FAULT_POINTS, "image.built", "config.stored", "manifest.stored"])
def test_an_upgrade_of_the_repository_ends_whenever_it_was_killed(
    recorded: Recorded, point: str, cfsctl: str
) -> None:
    host = old_host(recorded)
    paths = HostPaths.scratch(host.root)
    try:
        upgrade(paths, _AtPoint(point), lock_timeout=5)
    except Crash:
        # The journal says so, up to its last step.
        assert paths.transaction.exists() is (point != "upgrade.done")
    if (host.repository / "meta.json").exists():
        settled(host)
    else:
        upgrade(paths, Silent(), lock_timeout=5)
    assert journal.read(paths.transaction) is None
    with Repository.open(host.repository) as repository:
        for digest in images.tags(repository).values():
            assert images.open_image(repository, digest).image_ids.keys() >= {repository.formats.default}
    before = everything(host.repository / "streams")
    settled(host)
    assert everything(host.repository / "streams") == before
    Judge(cfsctl, host.repository).check()
    host.reboot()
