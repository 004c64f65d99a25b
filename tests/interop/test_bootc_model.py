"""The model of bootc itself: it agrees with recorded hosts, goes through a life of its own, and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bootc_formats import compare_versions
from bootc_model import Bootc, Panicked, Refused

from hostimage_testing.firmware import uapi_compare
from hostimage_testing.hosts import KINDS, Deployment, Era, Kind, Loader, RecordedHost
from hostimage_testing.lives import Life, installed, staged, upgraded
from hostimage_testing.os_images import Recipe

pytestmark = pytest.mark.interop

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
SYSTEMD, GRUB = Kind(Loader.SYSTEMD), Kind(Loader.GRUB)
NEXT = Recipe(version="9", kernel=b"kernel nine ", etc={"new.conf": b"new\n"})

MakeHost = Callable[..., RecordedHost]


@pytest.fixture
def make(tmp_path: Path, cfsctl: str) -> MakeHost:
    def made(kind: Kind = SYSTEMD, **options: object) -> RecordedHost:
        return RecordedHost(tmp_path / "host", cfsctl, kind=kind, **options)  # type: ignore[arg-type]

    return made


def bootc(host: RecordedHost, cfsctl: str, **options: int) -> Bootc:
    return Bootc(host.root, cfsctl, host.images, **options)


@every_kind
def test_a_life_under_bootc(make: MakeHost, cfsctl: str, kind: Kind) -> None:
    life = installed(make(kind))
    host, model = life.host, bootc(life.host, cfsctl)
    assert model.accepts() == []
    (host.root / "etc/hostname").write_text("mine\n")
    fresh = host.image(replace(NEXT, os_version="1"))

    assert model.upgrade(fresh) == "staged"
    status = model.status()["status"]
    assert status["staged"]["composefs"]["verity"] == fresh.id
    assert status["staged"]["image"]["imageDigest"] == fresh.manifest_digest
    assert model.accepts() == []
    assert model.upgrade(fresh) == "skip"

    assert model.finalize() == "activated"
    assert host.reboot() == fresh.id
    assert (host.root / "etc/hostname").read_text() == "mine\n"
    assert (host.root / "etc/new.conf").read_text() == "new\n"
    assert model.accepts() == []
    assert model.finalize() == "nothing"

    model.rollback()
    assert host.reboot() == life.booted.id
    assert model.accepts() == []
    assert model.gc().tags == ()
    assert host.tag(fresh).is_symlink()


@pytest.mark.parametrize("kind", [GRUB, Kind(Loader.GRUB_CC)], ids=str)
def test_rollback_to_a_lower_version_is_without_effect_on_grub(
    make: MakeHost, cfsctl: str, kind: Kind
) -> None:
    """GRUB compares the version in a file name before bootc's digit, which is all that rollback exchanges."""
    life = upgraded(make(kind))
    bootc(life.host, cfsctl).rollback()
    assert life.host.reboot() == life.booted.id


@every_kind
def test_the_third_deployment_is_dropped(make: MakeHost, cfsctl: str, kind: Kind) -> None:
    life = upgraded(make(kind))
    host, model = life.host, bootc(life.host, cfsctl)
    assert life.rollback
    model.upgrade(host.image(NEXT))
    model.finalize()
    host.reboot()
    removed = model.gc()
    assert removed.state_dirs == (life.rollback.id,)
    assert removed.tags == (f"localhost/bootc-{life.rollback.image.manifest_digest}",)
    assert removed.objects > 0
    assert not host.artifact(life.rollback).exists()
    assert model.gc(dry_run=True).nothing
    assert model.accepts() == []


@pytest.mark.parametrize("era", [Era.SIDECAR, Era.CURRENT])
@every_kind
def test_recorded_hosts_are_accepted(make: MakeHost, cfsctl: str, kind: Kind, era: Era) -> None:
    life = staged(make(kind, era=era), locked=True)
    model = bootc(life.host, cfsctl)
    assert model.accepts() == []
    status = model.status()["status"]
    assert status["booted"]["composefs"]["verity"] == life.booted.id
    assert status["rollback"]["composefs"]["verity"] == life.rollback.id  # type: ignore[union-attr]
    assert status["staged"]["downloadOnly"] is True
    assert model.finalize() == "locked"
    assert model.from_downloaded() == "unlocked"
    assert model.finalize() == "activated"
    assert life.host.reboot() == life.staged.id  # type: ignore[union-attr]


def test_known_mistakes_about_a_queued_rollback(make: MakeHost, cfsctl: str, tmp_path: Path) -> None:
    said = {}
    for kind in KINDS:
        host = RecordedHost(tmp_path / str(kind), cfsctl, kind=kind)
        upgraded(host)
        said[str(kind)] = bootc(host, cfsctl).status()["status"]["rollbackQueued"]
    # Nothing is queued on any of them.
    assert said == {
        "grub-bls": True,
        "grub-uki": False,
        "systemd-bls": False,
        "systemd-uki": True,
        "grub-cc-bls": False,
    }


def test_soft_reboot_loses_the_question_mark(make: MakeHost, cfsctl: str) -> None:
    life = upgraded(make())
    assert life.rollback
    before = bootc(life.host, cfsctl).status()["status"]["booted"]["composefs"]
    assert before["missingVerityAllowed"] is True
    life.host.booted(life.booted, soft_from=life.rollback)
    after = bootc(life.host, cfsctl).status()["status"]["booted"]["composefs"]
    assert (after["verity"], after["missingVerityAllowed"]) == (life.booted.id, False)


def test_kernel_arguments_follow_the_image(make: MakeHost, cfsctl: str) -> None:
    host = make()
    first = host.deploy(host.image(Recipe(kargs=("gone=1", "stays"))))
    host.live(first)
    host.booted(first)
    fresh = host.image(Recipe(version="2", kargs=("stays", "comes")))
    bootc(host, cfsctl).upgrade(fresh)
    options = next(iter(host.entries_staged.glob("*-1.conf"))).read_text()
    assert f"composefs=?{fresh.id} stays comes\n" in options
    assert "gone=1" not in options


def test_the_same_kernel_is_shared(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    fresh = life.host.image(Recipe(version="2"))
    bootc(life.host, cfsctl).upgrade(fresh)
    assert sorted(p.name for p in life.host.bin_dir.iterdir()) == [f"bootc_composefs-{life.booted.id}"]
    assert bootc(life.host, cfsctl).status()["status"]["staged"]["softRebootCapable"] is True
    assert bootc(life.host, cfsctl).accepts() == []


@every_kind
def test_names_without_prefix_are_migrated(make: MakeHost, cfsctl: str, kind: Kind) -> None:
    host = make(kind)
    deployments = [
        host.deploy(host.image(Recipe(version=v, kernel=v.encode() * 9)), prefixed=False) for v in "21"
    ]
    host.live(*deployments)
    host.booted(deployments[0])
    assert any("no prefix" in what or "custom prefix" in what for what in bootc(host, cfsctl).accepts())
    bootc(host, cfsctl).status()
    assert bootc(host, cfsctl).accepts() == []
    assert host.reboot() == deployments[0].id


# Refusals of status: each is a host as a mistaken writer would leave it.


def _no_version(life: Life) -> None:
    path = next(iter(life.host.entries.iterdir()))
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if not line.startswith("version"))
    )


def _no_boot_type(life: Life) -> None:
    origin = life.host.origin(life.booted)
    origin.write_text(origin.read_text().replace("boot_type = bls\n", ""))


def _conflicting_types(life: Life) -> None:
    assert life.rollback
    life.host.write_origin(life.rollback, boot_type="uki")


def _manifest_gone(life: Life) -> None:
    assert life.rollback
    life.host.stream("manifest", life.rollback.image.manifest_digest).unlink()


def _neither_digest_nor_sidecar(life: Life) -> None:
    assert life.rollback
    life.host.write_origin(life.rollback, manifest_digest=False)


def _plain_marker(life: Life) -> None:
    assert life.rollback
    life.host.mark(life.rollback, plain=True)


def _booted_without_entry(life: Life) -> None:
    assert life.rollback
    life.host.live(life.rollback)


def _foreign_reference(life: Life) -> None:
    life.host.write_origin(life.booted, reference="docker://registry.example/os:stable")


def _other_root(life: Life) -> None:
    mounts = life.host.root / "proc/self/mountinfo"
    mounts.write_text(mounts.read_text().replace("overlay composefs:", "overlay other:"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_no_version, "Missing 'version'"),
        (_no_boot_type, "boot not found"),
        (_conflicting_types, "Conflicting boot types"),
        (_manifest_gone, "Opening oci-manifest-"),
        (_neither_digest_nor_sidecar, "no legacy .imginfo"),
        (_plain_marker, "staged marker"),
        (_booted_without_entry, "Could not find booted"),
        (_foreign_reference, "scheme docker"),
        (_other_root, "Root not mounted"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[1:],
)
def test_status_refuses(make: MakeHost, cfsctl: str, spoil: Callable[[Life], None], why: str) -> None:
    life = upgraded(make())
    spoil(life)
    model = bootc(life.host, cfsctl)
    with pytest.raises(Refused, match=why):
        model.status()
    assert len(model.accepts()) == 1
    assert why in model.accepts()[0]


def test_a_foreign_entry_stops_bootc(make: MakeHost, cfsctl: str) -> None:
    """The migration looks for its kernel, and status for its deployment."""
    life = upgraded(make())
    (life.host.entries / "memtest.conf").write_text(
        "title Memory test\nversion 7\nlinux /memtest/memtest.bin\n"
    )
    with pytest.raises(Refused, match="Directory for entry memtest not found"):
        bootc(life.host, cfsctl).status()
    assert bootc(life.host, cfsctl).accepts() == ["status: No options"]
    assert not life.host.entries_staged.exists()


def _tag_gone(life: Life) -> None:
    life.host.tag(life.booted.image).unlink()


def _etc_gone(life: Life) -> None:
    assert life.rollback
    (life.host.state(life.rollback) / "etc").rename(life.host.root / "elsewhere")


def _absolute_var(life: Life) -> None:
    var = life.host.state(life.booted) / "var"
    var.unlink()
    var.symlink_to("/var")


def _image_gone(life: Life) -> None:
    (life.host.repository / "images" / life.booted.id).unlink()


def _kernel_gone(life: Life) -> None:
    (life.host.artifact(life.booted) / "initrd").unlink()


def _marker_alone(life: Life) -> None:
    life.host.mark(life.host.deploy(life.host.image(NEXT)))


def _three_entries(life: Life) -> None:
    assert life.rollback
    life.host.live(life.booted, life.rollback, life.host.deploy(life.host.image(NEXT)))


def _origin_gone(life: Life) -> None:
    assert life.rollback
    life.host.origin(life.rollback).unlink()


def _two_arguments(life: Life) -> None:
    path = next(iter(life.host.entries.iterdir()))
    path.write_text(
        path.read_text().replace("rw console", f"composefs.digest=v1-sha512-12:{'0' * 128} rw console")
    )


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_tag_gone, "no tag for its manifest"),
        (_etc_gone, "no etc"),
        (_absolute_var, "var is not the link"),
        (_image_gone, "no image in the repository"),
        (_kernel_gone, "initrd is not there"),
        (_marker_alone, "a marker without"),
        (_three_entries, "3 live entries"),
        (_origin_gone, "no origin"),
        (_two_arguments, "not exactly one composefs argument"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[1:],
)
def test_the_checklist_refuses(make: MakeHost, cfsctl: str, spoil: Callable[[Life], None], why: str) -> None:
    life = upgraded(make())
    spoil(life)
    assert any(why in what for what in bootc(life.host, cfsctl).accepts())


@pytest.mark.parametrize("kind", [SYSTEMD, Kind(Loader.GRUB, uki=True)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_rollback_panics_unless_there_are_two(make: MakeHost, cfsctl: str, kind: Kind, count: int) -> None:
    host = make(kind)
    deployments = [host.deploy(host.image(Recipe(version=str(n)))) for n in range(count)]
    host.live(*deployments)
    host.booted(deployments[0])
    with pytest.raises(Panicked if count == 3 else Refused):
        bootc(host, cfsctl).rollback()


def test_rollback_drops_what_is_staged(make: MakeHost, cfsctl: str) -> None:
    life = staged(make())
    bootc(life.host, cfsctl).rollback()
    assert not life.host.marker.exists()
    assert not life.host.entries_staged.exists()
    assert {p.name for p in life.host.entries.iterdir()} == {"bootc_bootc-1-1.conf", "bootc_bootc-2-0.conf"}


def test_a_second_finalizer_finds_nothing_to_exchange(make: MakeHost, cfsctl: str) -> None:
    life = staged(make())
    model = bootc(life.host, cfsctl)
    assert model.finalize() == "activated"
    # The marker is still there, and the entry of what was staged is live now.
    with pytest.raises(Refused, match="renameat"):
        model.finalize()
    assert life.host.reboot() == life.staged.id  # type: ignore[union-attr]


def test_an_incomplete_kernel_blocks_updates(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    (life.host.bin_dir / "bootc_composefs-half").mkdir()
    with pytest.raises(Refused, match="Opening vmlinuz"):
        bootc(life.host, cfsctl).upgrade(life.host.image(NEXT))


def test_a_conflict_in_etc_stops_the_update(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    (life.host.root / "etc/new.conf").mkdir()
    with pytest.raises(Refused, match="Merge conflicts"):
        bootc(life.host, cfsctl).upgrade(life.host.image(NEXT))


def test_a_leftover_that_was_not_pulled_stops_the_update(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    fresh = life.host.image(NEXT)
    life.host.write_state(Deployment(fresh, fresh.id, "", ()))
    life.host.stream("config", fresh.config_digest).unlink()
    with pytest.raises(Refused, match="symlink for /var"):
        bootc(life.host, cfsctl).upgrade(fresh)


def test_switch_to_what_is_there_is_an_error(make: MakeHost, cfsctl: str) -> None:
    life = upgraded(make())
    assert life.rollback
    with pytest.raises(Refused, match="same fs-verity digest"):
        bootc(life.host, cfsctl).switch(life.rollback.image)
    assert bootc(life.host, cfsctl).upgrade(life.rollback.image) == "skip"


def test_the_collector_leaves_other_peoples_tags(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    apart = life.host.image(NEXT)
    life.host.write_tag(apart, "localhost/app-")
    life.host.write_tag(apart)
    life.host.tag(life.booted.image).unlink()
    assert bootc(life.host, cfsctl).gc().tags == (f"localhost/bootc-{apart.manifest_digest}",)
    assert life.host.tag(apart, "localhost/app-").is_symlink()
    assert life.host.tag(life.booted.image).is_symlink()


def test_delete(make: MakeHost, cfsctl: str) -> None:
    life = staged(make())
    model = bootc(life.host, cfsctl)
    assert life.staged
    with pytest.raises(Refused, match="booted"):
        model.delete(life.booted.id)
    assert life.staged.id in model.delete(life.staged.id).state_dirs
    # Its collector no longer knows what was staged, and leaves the marker.
    assert life.host.marker.exists()
    assert model.accepts() == ["a marker without entry or origin"]
    model.delete(life.rollback.id)  # type: ignore[union-attr]
    assert [p.name for p in life.host.entries.iterdir()] == ["bootc_testos-2-1.conf"]


def test_the_marker_is_canonical(make: MakeHost, cfsctl: str) -> None:
    life = installed(make())
    fresh = life.host.image(NEXT)
    bootc(life.host, cfsctl).upgrade(fresh, download_only=True)
    assert life.host.marker.read_text() == json.dumps(
        {"depl_id": fresh.id, "finalization_locked": True}, separators=(",", ":"), sort_keys=True
    )


@pytest.mark.parametrize(
    ("left", "right", "order"),
    [
        ("123", "123", 0),
        ("9.10", "9.9", 1),
        ("bar-123", "foo-123", -1),
        ("123a", "123", 1),
        ("123.a", "123", 1),
        ("123a", "123.a", 1),
        ("B", "a", -1),
        ("0", "~", 1),
        ("", "~", 1),
        ("1_2_3", "1.3.3", 1),
        ("1_0", "10", -1),
        ("123-3", "123", 1),
        ("123^1", "123", 1),
        ("44~rc1", "44", -1),
    ],
)
def test_versions(left: str, right: str, order: int) -> None:
    for compare in (compare_versions, uapi_compare):
        assert compare(left, right) == order
        assert compare(right, left) == -order
