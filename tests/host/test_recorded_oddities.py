"""Hosts out of the ordinary, or damaged: each oddity costs what it hits and no more (A9; R-14, R-27,
R-31, R-32)."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from bootc_model import Bootc

from hostimage_testing.hosts import KINDS, PREFIX, Deployment, Era, Kind, Loader, RecordedHost
from hostimage_testing.lives import Life, installed, locked, staged, upgraded
from hostimage_testing.os_images import Recipe
from hostimage_testing.recorded import document_of, problems_of, row_of, state_of
from hostimaged.host.model import HostState, ProblemId, Role

pytestmark = pytest.mark.interop

MakeHost = Callable[..., RecordedHost]
Recorded = Callable[..., Life]


def roles(state: HostState) -> dict[str, Role]:
    """Role of each visible deployment."""
    return {str(row.id): row.role for row in state.visible}


def others_are_whole(state: HostState, *hit: Deployment) -> None:
    """All rows but those hit are complete."""
    ids = {deployment.id for deployment in hit}
    rest = [row for row in state.visible if str(row.id) not in ids]
    assert rest
    for row in rest:
        assert problems_of(row) == set()
        assert row.image is not None
        assert row.image.proven


def damage_manifest_gone(host: RecordedHost, deployment: Deployment) -> None:
    host.stream("manifest", deployment.image.manifest_digest).unlink()


def damage_manifest_overwritten(host: RecordedHost, deployment: Deployment) -> None:
    stream = host.stream("manifest", deployment.image.manifest_digest).resolve()
    stream.chmod(0o600)
    stream.write_bytes(b"\0" * stream.stat().st_size)


def damage_config_object_gone(host: RecordedHost, deployment: Deployment) -> None:
    host.stream("config", deployment.image.config_digest).resolve().unlink()


def damage_origin_not_text(host: RecordedHost, deployment: Deployment) -> None:
    host.origin(deployment).write_bytes(bytes(range(256)))


def damage_origin_huge(host: RecordedHost, deployment: Deployment) -> None:
    with host.origin(deployment).open("r+b") as file:
        file.truncate(1 << 34)


def damage_origin_a_directory(host: RecordedHost, deployment: Deployment) -> None:
    host.origin(deployment).unlink()
    host.origin(deployment).mkdir()


def damage_origin_other_manifest(host: RecordedHost, deployment: Deployment) -> None:
    text = host.origin(deployment).read_text()
    host.origin(deployment).write_text(text.replace(deployment.image.manifest_digest, "sha256:" + "0" * 64))


def damage_image_gone(host: RecordedHost, deployment: Deployment) -> None:
    (host.repository / "images" / deployment.id).unlink()


def damage_kernel_gone(host: RecordedHost, deployment: Deployment) -> None:
    path = host.artifact(deployment)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def damage_etc_gone(host: RecordedHost, deployment: Deployment) -> None:
    (host.state(deployment) / "etc").rename(host.root / "etc-elsewhere")


Damage = Callable[[RecordedHost, Deployment], None]

DAMAGE: dict[Damage, ProblemId] = {
    damage_manifest_gone: ProblemId.METADATA_MISSING,
    damage_manifest_overwritten: ProblemId.METADATA_DAMAGED,
    damage_config_object_gone: ProblemId.METADATA_DAMAGED,
    damage_origin_not_text: ProblemId.ORIGIN_DAMAGED,
    damage_origin_huge: ProblemId.ORIGIN_DAMAGED,
    damage_origin_a_directory: ProblemId.ORIGIN_DAMAGED,
    damage_origin_other_manifest: ProblemId.METADATA_MISSING,
    damage_image_gone: ProblemId.IMAGE_MISSING,
    damage_kernel_gone: ProblemId.ARTIFACT_MISSING,
    damage_etc_gone: ProblemId.ETC_MISSING,
}


@pytest.mark.parametrize("which", ["booted", "rollback", "staged"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_r31_damage_costs_one_row(recorded: Recorded, which: str, damage: Damage) -> None:
    """A9: the entry is shown with a problem, the others are complete."""
    life = recorded(staged)
    hit = getattr(life, which)
    damage(life.host, hit)
    state = state_of(life.host)
    assert DAMAGE[damage] in problems_of(row_of(state, hit))
    others_are_whole(state, hit)
    # Without an origin that can be read nothing is staged, for bootc either.
    gone = which == "staged" and DAMAGE[damage] is ProblemId.ORIGIN_DAMAGED
    assert [str(row.id) for row in state.visible] == [
        deployment.id
        for deployment in (life.staged, life.booted, life.rollback)
        if deployment and not (gone and deployment is hit)
    ]
    assert not state.problems


def test_a9_a_damaged_manifest_stream_is_one_problem(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    assert life.rollback
    damage_manifest_overwritten(life.host, life.rollback)
    state = state_of(life.host)
    assert roles(state) == {life.booted.id: Role.BOOTED, life.rollback.id: Role.ROLLBACK}
    assert row_of(state, life.rollback).bootable
    others_are_whole(state, life.rollback)
    rows = document_of(life.host)["status"]
    assert rows["rollback"]["image"] is None
    assert rows["booted"]["image"]["imageDigest"] == life.booted.image.manifest_digest


def test_r31_no_repository_at_all(recorded: Recorded, kind: Kind) -> None:
    from hostimage_testing.recorded import paths_of
    from hostimaged.host.status import scan

    life = recorded(upgraded, kind)
    assert life.rollback
    shutil.rmtree(life.host.repository)
    rows = scan(paths_of(life.host))["deployments"]
    assert [row["id"] for row in rows] == [life.booted.id, life.rollback.id]


@pytest.mark.parametrize("which", ["booted", "rollback"])
def test_r14_an_entry_without_origin_is_tolerated(recorded: Recorded, kind: Kind, which: str) -> None:
    life = recorded(upgraded, kind)
    hit = getattr(life, which)
    life.host.origin(hit).unlink()
    state = state_of(life.host)
    assert problems_of(row_of(state, hit)) >= {ProblemId.ORIGIN_MISSING}
    assert roles(state)[hit.id] is Role(which)
    assert row_of(state, hit).bootable
    others_are_whole(state, hit)


def test_r27_names_without_prefix_are_read_as_they_are(make: MakeHost, kind: Kind) -> None:
    host = make(kind)
    plain = host.deploy(host.image(Recipe(version="1")), prefixed=False)
    named = host.deploy(host.image(Recipe(version="2", kernel=b"kernel two ")))
    host.live(named, plain)
    host.booted(named)
    state = state_of(host)
    assert roles(state) == {named.id: Role.BOOTED, plain.id: Role.ROLLBACK}
    for deployment in (plain, named):
        row = row_of(state, deployment)
        assert problems_of(row) == set()
        assert row.live is not None
        assert row.live.artifact == deployment.id
    assert (host.artifact(plain).exists(), host.artifact(named).exists()) == (True, True)
    assert not host.artifact(plain).name.startswith(PREFIX)


@pytest.mark.parametrize("queued", [False, True], ids=["as-it-is", "queued"])
def test_r32_a_queued_rollback(make: MakeHost, kind: Kind, queued: bool) -> None:
    host = make(kind)
    # With one version for both, the order in GRUB's menu is what the last digit says.
    old = host.deploy(host.image(Recipe(version="1", os_version="44")))
    new = host.deploy(host.image(Recipe(version="2", os_version="44", kernel=b"kernel two ")))
    host.live(*((old, new) if queued else (new, old)))
    host.booted(new)
    state = state_of(host)
    assert state.rollback_queued is queued
    assert document_of(host)["status"]["rollbackQueued"] is queued
    assert document_of(host)["spec"]["bootOrder"] == ("rollback" if queued else "default")
    assert roles(state) == {new.id: Role.BOOTED, old.id: Role.ROLLBACK}
    assert host.reboot() == (old.id if queued else new.id)
    assert state.next_deployment is row_of(state, old if queued else new)


def test_r32_bootcs_own_rollback_is_seen_for_what_the_menu_is(
    recorded: Recorded, cfsctl: str, kind: Kind
) -> None:
    """Whatever names bootc gives its entries, what is shown as default is what the loader starts."""
    life = recorded(upgraded, kind)
    Bootc(life.host.root, cfsctl, life.host.images).rollback()
    state = state_of(life.host)
    shown = state.default_deployment
    assert shown is not None
    assert state.rollback_queued is (str(shown.id) != life.booted.id)
    assert life.host.reboot() == str(shown.id)


def test_a_staged_deployment_is_no_queued_rollback(recorded: Recorded, kind: Kind) -> None:
    life = recorded(staged, kind)
    assert life.staged
    assert not state_of(life.host).rollback_queued
    assert document_of(life.host)["status"]["rollbackQueued"] is False


def test_a_locked_deployment_is_not_next(recorded: Recorded, kind: Kind) -> None:
    life = recorded(locked, kind)
    assert life.staged
    state = state_of(life.host)
    assert row_of(state, life.staged).locked
    assert str(state.next_deployment.id) == life.booted.id  # type: ignore[union-attr]
    assert document_of(life.host)["status"]["staged"]["downloadOnly"] is True


def test_a_soft_rebooted_host_keeps_its_question_mark(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    assert life.rollback
    life.host.booted(life.booted, soft_from=life.rollback)
    state = state_of(life.host)
    assert state.booted is not None
    assert (str(state.booted.id), state.booted.optional) == (life.booted.id, True)
    assert state.booted.soft_rebooted
    assert roles(state)[life.rollback.id] is Role.ROLLBACK
    assert document_of(life.host)["status"]["booted"]["composefs"]["missingVerityAllowed"] is True


def test_a_transient_root(recorded: Recorded, kind: Kind) -> None:
    life = recorded(installed, kind)
    life.host.booted(life.booted, transient=True)
    state = state_of(life.host)
    assert state.booted is not None
    assert state.booted.transient
    assert roles(state) == {life.booted.id: Role.BOOTED}


def test_a_host_with_verity_enforced(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind, insecure=False)
    state = state_of(life.host)
    assert state.booted is not None
    assert not state.booted.optional
    assert document_of(life.host)["status"]["booted"]["composefs"]["missingVerityAllowed"] is False


def test_a_boot_partition_of_its_own(recorded: Recorded) -> None:
    life = recorded(staged, Kind(Loader.GRUB), separate_boot=True)
    state = state_of(life.host)
    assert len(state.visible) == 3
    assert not state.problems
    assert all(problems_of(row) == set() for row in state.visible)


def test_what_an_interrupted_staging_leaves_is_hidden(recorded: Recorded, kind: Kind) -> None:
    life = recorded(staged, kind)
    assert life.staged
    life.host.marker.unlink()
    state = state_of(life.host)
    assert life.staged.id not in roles(state)
    assert row_of(state, life.staged).role is Role.HIDDEN
    others_are_whole(state)


def test_a_power_cut_instead_of_a_shutdown(recorded: Recorded, kind: Kind) -> None:
    """The marker is gone with /run, the staged set is not."""
    life = recorded(staged, kind)
    assert life.staged
    assert life.host.reboot() == life.booted.id
    state = state_of(life.host)
    assert life.staged.id not in roles(state)
    assert state.staged_deployment is None
    assert not state.rollback_queued


def test_a_marker_without_entry_is_not_staged(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    stray = life.host.deploy(life.host.image(Recipe(version="3")))
    life.host.mark(stray)
    state = state_of(life.host)
    assert state.staged_deployment is None
    assert stray.id not in roles(state)
    others_are_whole(state)


def test_a_marker_for_a_deployment_that_is_gone(recorded: Recorded, kind: Kind, cfsctl: str) -> None:
    """As bootc leaves it when what is staged is deleted."""
    life = recorded(staged, kind)
    assert life.staged
    Bootc(life.host.root, cfsctl, life.host.images).delete(life.staged.id)
    assert life.host.marker.exists()
    state = state_of(life.host)
    assert state.staged_deployment is None
    others_are_whole(state)
    assert not state.rollback_queued


def test_orphaned_state_directories_are_hidden(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    orphan = life.host.deploy(life.host.image(Recipe(version="3")))
    (life.host.sysroot / "state/deploy/.tmp").mkdir()
    (life.host.sysroot / "state/deploy/a file").write_text("")
    state = state_of(life.host)
    assert row_of(state, orphan).role is Role.HIDDEN
    assert len(state.visible) == 2


def test_an_entry_without_state_directory_is_shown(recorded: Recorded, kind: Kind) -> None:
    """bootc does not show it, and it boots to an emergency shell: people must know."""
    life = recorded(upgraded, kind)
    assert life.rollback
    shutil.rmtree(life.host.state(life.rollback))
    row = row_of(state_of(life.host), life.rollback)
    assert ProblemId.STATE_MISSING in problems_of(row)
    assert not row.bootable
    assert row.role is not Role.HIDDEN


def test_missing_tags_do_not_matter_to_status(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    shutil.rmtree(life.host.repository / "streams/refs/oci")
    others_are_whole(state_of(life.host))


def test_leftover_tags_do_not_matter_to_status(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    gone = life.host.image(Recipe(version="7"))
    life.host.write_tag(gone)
    life.host.stream("manifest", gone.manifest_digest).unlink()
    others_are_whole(state_of(life.host))


def test_origins_with_a_newline_and_with_other_peoples_sections(recorded: Recorded) -> None:
    life = recorded(upgraded)
    assert life.rollback
    life.host.write_origin(life.booted, newline=True)
    origin = life.host.origin(life.rollback)
    origin.write_text("# by hand\n" + origin.read_text() + "\n\n[other]\nkey = a = b\n")
    others_are_whole(state_of(life.host))


@pytest.mark.parametrize(
    "kind", [Kind(Loader.GRUB), Kind(Loader.SYSTEMD), Kind(Loader.SYSTEMD, uki=True)], ids=str
)
def test_foreign_entries_are_left_alone(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    (life.host.entries / "memtest.conf").write_text("title Memory test\nlinux /memtest/memtest.bin\n")
    (life.host.entries / "bootc_broken-1-1.conf").write_bytes(b"\xff\xfe\0\n")
    (life.host.entries / "README").write_text("no entry")
    state = state_of(life.host)
    assert roles(state) == {
        d.id: r for d, r in ((life.booted, Role.BOOTED), (life.rollback, Role.ROLLBACK)) if d
    }
    assert {problem.id for problem in state.problems} == {ProblemId.ENTRY_DAMAGED}
    others_are_whole(state)


def test_more_than_two_entries_are_said_to_stop_bootc(make: MakeHost, kind: Kind) -> None:
    host = make(kind)
    three = [host.deploy(host.image(Recipe(version=v, kernel=v.encode() * 9))) for v in "321"]
    host.live(*three)
    host.booted(three[0])
    state = state_of(host)
    assert [row.role for row in state.visible] == [Role.BOOTED, Role.ROLLBACK, Role.OTHER]
    assert ProblemId.TOO_MANY_ENTRIES in problems_of(state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.uki], ids=str)
def test_a_shared_kernel(make: MakeHost, kind: Kind) -> None:
    host = make(kind)
    old = host.deploy(host.image(Recipe(version="1")))
    new = host.deploy(host.image(Recipe(version="2")), share=old)
    host.live(new, old)
    host.booted(new)
    row = row_of(state_of(host), new)
    assert row.live is not None
    assert row.live.artifact == old.id
    assert problems_of(row) == set()
    assert row_of(state_of(host), old).soft_reboot.capable


def test_different_kernels_keep_a_soft_reboot_away(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    assert life.rollback
    found = row_of(state_of(life.host), life.rollback).soft_reboot
    assert not found.capable
    assert "kernel" in found.reason


def test_the_plain_text_marker_of_old(recorded: Recorded, kind: Kind) -> None:
    life = recorded(staged, kind, era=Era.SIDECAR)
    assert life.staged
    life.host.mark(life.staged, plain=True)
    assert roles(state_of(life.host))[life.staged.id] is Role.STAGED


def test_only_the_staged_set_has_the_booted_deployment(recorded: Recorded, kind: Kind) -> None:
    """Somebody removed its live entry: said aloud, and still shown as what runs."""
    life: Life = recorded(upgraded, kind)
    assert life.rollback
    life.host.live(life.rollback)
    state = state_of(life.host)
    assert roles(state)[life.booted.id] is Role.BOOTED
    assert ProblemId.BOOTED_NO_ENTRY in problems_of(state)
