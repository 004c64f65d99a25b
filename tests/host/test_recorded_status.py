"""Status of hosts as bootc left them: each era, boot loader and boot type (A1, A8; R-3 to R-5, R-28)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bootc_model import Bootc

from hostimage_testing.hosts import Era, Kind, RecordedHost
from hostimage_testing.lives import Life, MakeLife, installed, staged, upgraded
from hostimage_testing.recorded import (
    document_of,
    fingerprint,
    paths_of,
    problems_of,
    row_of,
    state_of,
)
from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.host import status
from hostimaged.host.model import ProblemId, Role

pytestmark = pytest.mark.interop

MakeHost = Callable[..., RecordedHost]
Recorded = Callable[..., Life]
SCHEMA = json.loads((REPOSITORY_ROOT / "tests/data/bootc/host-v1.schema.json").read_text())
NATIVE_SCHEMA = REPOSITORY_ROOT / "dbus/hostimage_dbus/status.schema.json"


def test_a1_roles_and_order(recorded: Recorded, kind: Kind, era: Era) -> None:
    life = recorded(staged, kind, era=era)
    assert life.staged
    assert life.rollback
    state = state_of(life.host)
    assert [(str(row.id), row.role) for row in state.visible] == [
        (life.staged.id, Role.STAGED),
        (life.booted.id, Role.BOOTED),
        (life.rollback.id, Role.ROLLBACK),
    ]
    assert str(state.loader) == kind.loader
    assert [str(row.boot_type) for row in state.visible] == [kind.boot_type] * 3
    assert [row.default for row in state.visible] == [False, True, False]
    assert not state.rollback_queued
    assert str(state.next_deployment.id) == life.staged.id  # type: ignore[union-attr]
    assert not state.problems
    assert all(row.bootable for row in state.visible)
    assert state.booted is not None
    assert state.booted.optional


def test_a1_reading_changes_nothing(recorded: Recorded, kind: Kind, era: Era) -> None:
    host = recorded(staged, kind, era=era).host
    before = fingerprint(host.root)
    state_of(host)
    assert fingerprint(host.root) == before


def test_r3_a_new_deployment_is_described_by_the_repository(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind)
    assert not life.host.imginfo(life.booted).exists()
    row = row_of(state_of(life.host), life.booted)
    assert row.image is not None
    assert row.image.proven
    assert str(row.image.manifest_digest) == life.booted.image.manifest_digest
    assert str(row.image.config_digest) == life.booted.image.config_digest
    assert (row.image.version, row.image.created) == ("2", "2026-11-01T08:00:00Z")
    assert problems_of(row) == set()


def test_r4_a_legacy_deployment_is_described_by_its_sidecar(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind, era=Era.SIDECAR)
    for deployment in (life.booted, life.rollback):
        assert deployment
        # Only the sidecar is left to tell.
        life.host.stream("manifest", deployment.image.manifest_digest).unlink()
        life.host.stream("config", deployment.image.config_digest).unlink()
    for deployment, version in ((life.booted, "2"), (life.rollback, "1")):
        assert deployment
        row = row_of(state_of(life.host), deployment)
        assert row.image is not None
        assert (row.image.version, row.image.architecture) == (version, "amd64")
        assert not row.image.proven
        assert row.bootable


def test_r5_without_digest_and_sidecar_nothing_is_fetched(
    recorded: Recorded, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("status used the network")

    life = recorded(upgraded, kind, era=Era.BARE)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.setattr("subprocess.Popen.__init__", forbidden)
    state = state_of(life.host)
    for deployment in (life.booted, life.rollback):
        assert deployment
        row = row_of(state, deployment)
        assert problems_of(row) == {ProblemId.METADATA_MISSING}
        assert row.bootable
        assert row.origin is not None
        assert row.origin.reference is not None
        assert row.origin.reference.image_text == "docker://registry.example/os:stable"


def test_the_repository_proves_what_the_sidecar_says(recorded: Recorded, kind: Kind) -> None:
    life = recorded(upgraded, kind, era=Era.SIDECAR)
    life.host.write_tag(life.booted.image)
    row = row_of(state_of(life.host), life.booted)
    assert row.image is not None
    assert str(row.manifest_digest) == life.booted.image.manifest_digest


def test_r28_digests_have_their_algorithm(recorded: Recorded, kind: Kind, era: Era) -> None:
    host = recorded(staged, kind, era=era).host
    rows = status.deployments(state_of(host))["deployments"]
    for row in rows:
        for key in ("image-digest", "config-digest", "boot-digest"):
            assert row[key] == "" or row[key].startswith("sha256:"), key
    images = [entry["image"] for entry in _entries(document_of(host)) if entry["image"]]
    assert len(images) == (0 if era is Era.BARE else 3)
    assert all(image["imageDigest"].startswith("sha256:") for image in images)


def test_a8_the_kinds_of_digest_are_kept_apart(recorded: Recorded) -> None:
    life = recorded(upgraded)
    row = status.deployments(state_of(life.host))["deployments"][0]
    image = life.booted.image
    assert row["id"] == image.id
    assert row["image-digest"] == image.manifest_digest
    assert row["config-digest"] == image.config_digest
    assert row["boot-digest"] == f"sha256:{image.boot_digest}"


@pytest.mark.parametrize("make_life", [installed, upgraded, staged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("era", [Era.SIDECAR, Era.CURRENT], ids=str)
def test_a1_the_host_document_is_bootcs(
    recorded: Recorded, cfsctl: str, kind: Kind, era: Era, make_life: MakeLife
) -> None:
    host = recorded(make_life, kind, era=era).host
    ours = document_of(host)
    theirs = Bootc(host.root, cfsctl, host.images).status()
    jsonschema.validate(ours, SCHEMA)
    _forgive(theirs, kind)
    if era is Era.SIDECAR:
        # The repository proves which manifests they are; bootc hashes its own writing of them.
        for entry in _entries(ours):
            image = host.images[entry["composefs"]["verity"]]
            assert entry["image"].pop("imageDigest") == image.manifest_digest
        for entry in _entries(theirs):
            del entry["image"]["imageDigest"]
    assert ours == theirs


def test_an_unproven_sidecar_has_the_digest_that_bootc_shows(
    recorded: Recorded, cfsctl: str, kind: Kind
) -> None:
    """R-28: but with its algorithm."""
    host = recorded(staged, kind, era=Era.SIDECAR).host
    for image in host.images.values():
        host.stream("manifest", image.manifest_digest).unlink()
    ours = document_of(host)
    theirs = Bootc(host.root, cfsctl, host.images).status()
    _forgive(theirs, kind)
    for entry in _entries(theirs):
        entry["image"]["imageDigest"] = "sha256:" + entry["image"]["imageDigest"]
    assert ours == theirs


def test_the_document_of_a_damaged_host_is_valid(recorded: Recorded, kind: Kind) -> None:
    life = recorded(staged, kind)
    shutil.rmtree(life.host.repository)
    life.host.origin(life.booted).write_bytes(b"\xff\xfe[")
    jsonschema.validate(json.loads(json.dumps(status_document(life.host))), SCHEMA)


def status_document(host: RecordedHost) -> dict[str, Any]:
    found: dict[str, Any] = status.scan(paths_of(host))["bootc"]
    return found


def _entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = document["status"]
    rows = [found["staged"], found["booted"], found["rollback"], *found.get("otherDeployments", ())]
    return [row for row in rows if row]


def _forgive(document: dict[str, Any], kind: Kind) -> None:
    """Put right what bootc is known to have wrong: nothing is queued in these lives."""
    rows = _entries(document)
    if str(kind) == "systemd-uki" or (str(kind) == "grub-bls" and len(rows) > 1):
        assert document["status"]["rollbackQueued"]
        document["status"]["rollbackQueued"] = False
        document["spec"]["bootOrder"] = "default"


def test_a_root_that_is_no_host_has_the_empty_document(tmp_path: Path, make: MakeHost) -> None:
    host = make()
    document = document_of(host)
    jsonschema.validate(document, SCHEMA)
    assert _entries(document) == []
