"""Staging on hosts as bootc leaves them: what is written, what is refused, and every interruption of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import KINDS, Era, Kind, Loader, RecordedHost
from hostimage_testing.lives import installed, staged, upgraded
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.composefs.repository import Repository
from hostimaged.errors import BootLoaderError, Cancelled, NoSpace, NothingStaged, PreconditionFailed
from hostimaged.host import space
from hostimaged.host import stage as module
from hostimaged.host.etcplan import EtcConflict
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.origin import Origin
from hostimaged.host.reorder import begin, rollback
from hostimaged.host.stage import StageRequest, stage, unlock, unstage
from hostimaged.ids import ManifestDigest
from hostimaged.oci import images
from hostimaged.oci.images import StoredImage

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
OTHER = OriginReference.parse("ostree-unverified-image:docker://registry.example/other:1")
NEXT = Recipe(version="2", kernel=b"kernel two ", etc={"new.conf": b"new\n"})


@pytest.fixture
def host(kind: Kind, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=kind)


def request(image: OsImage, **others: object) -> StageRequest:
    return replace(StageRequest(ManifestDigest(image.manifest_digest), REFERENCE), **others)  # type: ignore[arg-type]


def do(host: RecordedHost, image: OsImage, **others: object) -> str:
    with session(host) as opened:
        result = stage(opened, request(image, **others))
    assert result["manifest-digest"] == image.manifest_digest
    return str(result["result"])


def test_r1_r2_a_staged_deployment_names_its_manifest_and_has_no_sidecar(host: RecordedHost) -> None:
    installed(host)
    image = host.image(NEXT)
    assert do(host, image) == "staged"
    origin = Origin.parse(host.origin(image.id).read_bytes(), "origin")
    assert str(origin.manifest_digest) == image.manifest_digest
    assert origin.boot_digest is not None
    assert origin.boot_digest.hex == image.boot_digest
    assert str(origin.reference) == str(REFERENCE)
    assert not list((host.sysroot / "state/deploy").glob("*/*.imginfo"))


def test_r7_the_deployment_is_tagged_in_the_repository(host: RecordedHost) -> None:
    installed(host)
    image = host.image(NEXT)
    do(host, image)
    assert host.tag(image).is_symlink()
    assert host.tag(image).resolve().exists()


def test_the_next_shutdown_boots_it_and_bootc_takes_over(host: RecordedHost, cfsctl: str) -> None:
    life = installed(host)
    # bootc's rollback lets GRUB's order depend on the version: with the same one it works.
    image = host.image(replace(NEXT, os_version="1"))
    assert do(host, image) == "staged"
    model = Bootc(host.root, cfsctl, host.images)
    assert model.accepts() == []
    status = model.status()["status"]
    assert status["staged"]["composefs"]["verity"] == image.id
    assert status["staged"]["image"]["imageDigest"] == image.manifest_digest
    assert status["booted"]["composefs"]["verity"] == life.booted.id
    assert model.finalize() == "activated"
    assert host.reboot() == image.id
    assert (host.root / "etc/new.conf").read_text() == "new\n"
    assert model.accepts() == []
    assert model.rollback()
    assert host.reboot() == life.booted.id


def test_repeating_it_says_so(host: RecordedHost) -> None:
    life = upgraded(host)
    assert life.rollback is not None
    image = host.image(replace(NEXT, version="9", os_version="9"))
    before = host.marker.read_bytes() if host.marker.exists() else b""
    assert do(host, image) == "staged"
    assert do(host, image) == "already-staged"
    assert do(host, life.booted.image) == "already-current"
    assert do(host, life.rollback.image) == "same-as-rollback"
    assert host.marker.read_bytes() != before
    with session(host) as opened:
        assert str(opened.state().staged_deployment.id) == image.id  # type: ignore[union-attr]


def test_another_image_replaces_what_is_staged(host: RecordedHost, cfsctl: str) -> None:
    life = staged(host)
    assert life.staged is not None
    image = host.image(replace(NEXT, version="9", kernel=b"kernel nine "))
    assert do(host, image) == "staged"
    assert not host.state(life.staged).exists()
    assert not host.artifact(life.staged).exists()
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id


def test_a_staged_image_can_get_another_name(host: RecordedHost) -> None:
    installed(host)
    image = host.image(NEXT)
    do(host, image)
    assert do(host, image, reference=OTHER) == "already-staged"
    assert str(Origin.parse(host.origin(image.id).read_bytes(), "origin").reference) == str(OTHER)


def test_what_runs_can_get_another_name(host: RecordedHost) -> None:
    """The same image elsewhere, a mirror, is what updates follow from now on."""
    life = installed(host)
    image = life.booted.image
    before = host.origin(life.booted.id).read_bytes()
    assert do(host, image) == "already-current"
    assert host.origin(life.booted.id).read_bytes() == before
    assert do(host, image, reference=OTHER) == "already-current"
    after = Origin.parse(host.origin(life.booted.id).read_bytes(), "origin")
    assert str(after.reference) == str(OTHER)
    assert after == Origin.parse(before, "origin").with_reference(OTHER)


def test_a_download_waits_until_it_is_unlocked(host: RecordedHost) -> None:
    life = installed(host)
    image = host.image(NEXT)
    assert do(host, image, locked=True) == "staged"
    with session(host) as opened:
        assert finalize(opened)["result"] == "download-only"
        assert unlock(opened)["result"] == "staged"
        assert unlock(opened)["result"] == "already-staged"
        assert finalize(opened)["result"] == "finalized"
    assert host.reboot() == image.id
    with session(host) as opened:
        assert rollback(opened)["deployment"] == life.booted.id


@pytest.mark.parametrize("kind", [each for each in KINDS if not (each.classic and each.uki)], ids=str)
def test_what_the_shutdown_would_refuse_is_refused_now(host: RecordedHost) -> None:
    life = installed(host)
    image = host.image(NEXT)
    (host.entries / "copies").mkdir()
    before = _boot_files(host)
    with pytest.raises(BootLoaderError, match="copies is no file"):
        do(host, image)
    assert _boot_files(host) == before
    assert not host.state(image.id).exists()
    assert not (host.root / "run/composefs/staged-deployment").exists()
    (host.entries / "copies").rmdir()
    assert do(host, image) == "staged"
    assert host.reboot() == life.booted.id


def test_unstaging_leaves_nothing(host: RecordedHost) -> None:
    life = installed(host)
    image = host.image(NEXT)
    with session(host) as opened, pytest.raises(NothingStaged):
        unstage(opened)
    before = _boot_files(host)
    do(host, image)
    with session(host) as opened:
        assert unstage(opened) == {"result": "unstaged", "deployment": image.id}
        with pytest.raises(NothingStaged):
            unlock(opened)
    assert _boot_files(host) == before
    assert not host.state(image.id).exists()
    assert host.reboot() == life.booted.id


def _boot_files(host: RecordedHost) -> set[str]:
    return {str(path) for top in ("boot", "efi") for path in (host.root / top).rglob("*") if path.is_file()}


def test_a_conflict_in_etc_is_known_now(host: RecordedHost) -> None:
    installed(host)
    image = host.image(replace(NEXT, etc={"conflict": b"a file\n"}))
    (host.root / "etc/conflict").mkdir()
    with session(host) as opened, pytest.raises(EtcConflict, match="/etc/conflict"):
        stage(opened, request(image))
    assert not host.marker.exists()
    assert not host.entries_staged.exists()
    assert not host.state(image.id).exists()


def test_an_older_image_of_the_same_name_is_refused(
    host: RecordedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(host)
    image = host.image(NEXT)
    monkeypatch.setattr(module, "_created", lambda image: 1)
    with session(host) as opened, pytest.raises(PreconditionFailed, match="older"):
        stage(opened, request(image))
    assert do(host, image, reference=OTHER) == "staged"
    assert do(host, image, allow_downgrade=True) == "already-staged"


@pytest.mark.parametrize(
    "written",
    [
        "ostree-image-signed:docker://registry.example/os:latest",
        "ostree-unverified-registry:registry.example/os",
    ],
)
@pytest.mark.parametrize("kind", [KINDS[2]], ids=str)
def test_a_reference_to_the_same_image_stays_as_it_was_written(
    host: RecordedHost, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """With what it demands of signatures, too; and it is the same image where downgrades are refused."""
    life = installed(host)
    host.write_origin(life.booted, reference=written)
    image = host.image(NEXT)
    asked = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:latest")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_created", lambda image: 1)
        with session(host) as opened, pytest.raises(PreconditionFailed, match="older"):
            stage(opened, request(image, reference=asked))
    expected = OriginReference.parse(written)
    for result in ("staged", "already-staged"):
        assert do(host, image, reference=asked) == result
        assert Origin.parse(host.origin(image.id).read_bytes(), "origin").reference == expected


@pytest.mark.parametrize("kind", [KINDS[2]], ids=str)
def test_r12_the_image_is_opened_once(host: RecordedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handle that made the boot image is passed along."""
    installed(host)
    image = host.image(NEXT)
    opened: list[str] = []

    def counted(repository: Repository, digest: ManifestDigest) -> StoredImage:
        opened.append(str(digest))
        return real(repository, digest)

    real = images.open_image
    monkeypatch.setattr(images, "open_image", counted)
    assert do(host, image) == "staged"
    assert opened == [image.manifest_digest]


@pytest.mark.parametrize("kind", [Kind(Loader.GRUB, uki=True)], ids=str)
def test_what_others_wrote_into_the_menu_of_grub_stays(host: RecordedHost, cfsctl: str) -> None:
    installed(host)
    image = host.image(NEXT)
    plain = host.entries.read_text()
    head, _, entry = plain.partition("menuentry")
    password, comment = "set superusers=root\npassword_pbkdf2 root grub.x\n", "# mine\n"
    host.entries.write_text(f"{head}{password}menuentry{entry}{comment}")
    assert do(host, image) == "staged"
    # It may change until the shutdown.
    password = password.replace("grub.x", "grub.y")
    host.entries.write_text(f"{head}{password}menuentry{entry}{comment}")
    with session(host) as opened:
        assert finalize(opened)["result"] == "finalized"
    assert host.reboot() == image.id
    with session(host) as opened:
        assert rollback(opened)["result"] == "queued"
    text = host.entries.read_text()
    assert text.startswith(head + password + "menuentry")
    assert text.endswith("}\n" + comment)
    assert len(host.menu()) == 2
    assert Bootc(host.root, cfsctl, host.images).accepts() == []
    host.entries.write_text(text.replace("}\nmenuentry", "}\nset timeout=3\nmenuentry"))
    third = host.image(replace(NEXT, version="3"))
    with session(host) as opened, pytest.raises(BootLoaderError, match="between its entries"):
        stage(opened, request(third))


def test_no_room_is_told_before_anything_is_written(
    host: RecordedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(host)
    image = host.image(NEXT)
    before = _boot_files(host)

    def full(path: Path, needed: int, what: str) -> None:
        if "kernel" in what:
            raise NoSpace(f"{what} needs {needed} bytes")

    monkeypatch.setattr(space, "require", full)
    with session(host) as opened, pytest.raises(NoSpace, match="kernel"):
        stage(opened, request(image))
    assert _boot_files(host) == before
    assert not host.state(image.id).exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.uki], ids=str)
def test_the_same_kernel_is_shared(host: RecordedHost) -> None:
    life = installed(host)
    image = host.image(replace(NEXT, kernel=life.booted.image.recipe.kernel))
    do(host, image)
    assert not (host.bin_dir / f"bootc_composefs-{image.id}").exists()
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.uki], ids=str)
def test_arguments_of_the_images_and_local_edits_are_carried_over(host: RecordedHost) -> None:
    old = host.deploy(host.image(Recipe(version="1", kargs=("shared=1", "gone=1"))))
    old = replace(old, options=(*old.options, "local=1"))
    host.live(old)
    host.booted(old)
    image = host.image(replace(NEXT, kargs=("shared=1", "fresh=1")))
    do(host, image)
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id
    words = (host.root / "proc/cmdline").read_text().split()
    assert {"shared=1", "fresh=1", "local=1", "rw", f"composefs=?{image.id}"} <= set(words)
    assert "gone=1" not in words
    assert sum(word.startswith("composefs") for word in words) == 1


@pytest.mark.parametrize("era", [Era.BARE, Era.SIDECAR], ids=str)
def test_r16_a_host_of_an_older_bootc_is_upgraded_and_rolled_back(
    kind: Kind, era: Era, tmp_path: Path, cfsctl: str
) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=kind, era=era)
    life = upgraded(host)
    # What is pulled now has its manifest in the repository.
    host.era = Era.CURRENT
    image = host.image(replace(NEXT, version="9"))
    assert do(host, image) == "staged"
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id
    with session(host) as opened:
        assert rollback(opened)["deployment"] == life.booted.id
    assert host.reboot() == life.booted.id


# --- interruptions -----------------------------------------------------------------------------------------


INTERRUPTED = (KINDS[0], KINDS[1], KINDS[2])


@pytest.mark.parametrize(
    ("kind", "ending"), [*((kind, Crash) for kind in INTERRUPTED), (KINDS[2], Cancelled)], ids=str
)
def test_a6_interrupted_anywhere_nothing_of_the_host_changes(
    kind: Kind, ending: type[BaseException], tmp_path: Path, cfsctl: str
) -> None:
    number = 0
    while True:
        host = RecordedHost(tmp_path / f"host{number}", cfsctl, kind=kind)
        life = staged(host)
        assert life.staged is not None
        assert life.rollback is not None
        image = host.image(replace(NEXT, version="9", kernel=b"kernel nine "))
        reporter = At(number, ending)
        try:
            with session(host, reporter) as opened:
                stage(opened, request(image))
        except ending:
            pass
        else:
            assert set(module.FAULT_POINTS) <= set(reporter.points)
            break
        _check_interrupted(host, image, life.booted.id, number)
        number += 1


def _check_interrupted(host: RecordedHost, image: OsImage, booted: str, number: int) -> None:
    before = host.menu()[0].text
    with session(host) as opened:
        state = opened.state()
        assert str(state.booted_deployment.id) == booted  # type: ignore[union-attr]
        assert all(row.bootable for row in state.visible if row.live is not None)
    assert booted in before
    if number % 3 == 0:
        # The power fails: /run is gone.
        assert host.reboot() == booted
    if number % 3 != 1:
        with session(host) as opened:
            begin(opened)
        _nothing_leaks(host)
    result = do(host, image)
    assert result in ("staged", "already-staged")
    with session(host) as opened:
        finalize(opened)
    assert host.reboot() == image.id
    with session(host) as opened:
        begin(opened)
    _nothing_leaks(host)


def _nothing_leaks(host: RecordedHost) -> None:
    """Every state directory and every kernel belongs to an entry, and nothing temporary is left."""
    with session(host) as opened:
        state = opened.state()
    entries = state.sets.entries
    assert set(os.listdir(host.sysroot / "state/deploy")) - {str(entry.id) for entry in entries} <= {
        str(row.id) for row in state.deployments if row.live is None and row.staged is None
    }
    kernels = {path.name for top in (host.bin_dir, host.uki_dir) if top.is_dir() for path in top.iterdir()}
    for name in kernels:
        assert not name.startswith(".hostimaged-")
        if name.startswith("bootc_composefs-"):
            stem = name.removeprefix("bootc_composefs-").removesuffix(".efi")
            assert any(entry.artifact == stem for entry in entries)
    assert not list((host.sysroot / "state/hostimaged").glob("transaction*"))
