"""Old deployments are taken over when something is changed, and only then (R-10, R-16)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.hosts import Era, Kind, Loader, RecordedHost
from hostimage_testing.lives import staged, upgraded
from hostimage_testing.recorded import fingerprint, paths_of, row_of, state_of
from hostimaged.composefs.repository import Repository
from hostimaged.host.adopt import Adopted, adopt
from hostimaged.host.read import read_host
from hostimaged.oci.images import tags
from hostimaged.system import durable

pytestmark = pytest.mark.interop

MakeHost = Callable[..., RecordedHost]


def adopted(host: RecordedHost) -> list[Adopted]:
    paths = paths_of(host)
    with Repository.open(paths.repository) as repository:
        return adopt(paths, repository, read_host(paths, repository))


def tags_of(host: RecordedHost) -> set[str]:
    with Repository.open_unlocked(paths_of(host).repository) as repository:
        return set(tags(repository))


def test_r16_what_the_repository_proves_is_written_into_the_origin(
    make: MakeHost, kind: Kind, cfsctl: str
) -> None:
    life = staged(make(kind, era=Era.SIDECAR))
    before = {d.id: life.host.origin(d).read_bytes() for d in (life.booted, life.staged, life.rollback) if d}
    found = adopted(life.host)
    assert {str(each.id) for each in found} == set(before)
    assert all(each.tagged and each.named and not each.problem for each in found)
    for deployment in (life.booted, life.staged, life.rollback):
        assert deployment
        digest = deployment.image.manifest_digest
        added = f"\n\n[image]\nmanifest_digest = {digest}".encode()
        assert life.host.origin(deployment).read_bytes() == before[deployment.id] + added
        assert f"localhost/bootc-{digest}" in tags_of(life.host)
        assert life.host.imginfo(deployment).exists()
    assert not list(life.host.sysroot.rglob(".*.origin*"))
    Bootc(life.host.root, cfsctl, life.host.images).accepts()


def test_again_it_does_nothing(make: MakeHost) -> None:
    host = upgraded(make(era=Era.SIDECAR)).host
    adopted(host)
    before = fingerprint(host.root)
    assert adopted(host) == []
    assert fingerprint(host.root) == before


def test_r10_a_missing_tag_is_made_again(make: MakeHost, kind: Kind) -> None:
    life = upgraded(make(kind))
    life.host.tag(life.booted.image).unlink()
    (found,) = adopted(life.host)
    assert (str(found.id), found.tagged, found.named) == (life.booted.id, True, False)
    assert life.host.tag(life.booted.image).exists()


def test_a_uki_of_old_gets_its_boot_digest(make: MakeHost) -> None:
    life = upgraded(make(Kind(Loader.SYSTEMD, uki=True), era=Era.BARE))
    before = life.host.origin(life.booted).read_bytes()
    found = adopted(life.host)
    assert [(each.tagged, each.named, each.digested) for each in found] == [(False, False, True)] * 2
    added = f"\ndigest = {life.booted.image.boot_digest}".encode()
    assert life.host.origin(life.booted).read_bytes() == before + added
    assert adopted(life.host) == []


def test_what_makes_no_sense_is_not_replaced(make: MakeHost) -> None:
    life = upgraded(make(era=Era.SIDECAR))
    origin = life.host.origin(life.booted)
    origin.write_text(origin.read_text() + "\n\n[image]\nmanifest_digest = md5:1")
    before = origin.read_bytes()
    assert not any(each.named for each in adopted(life.host) if str(each.id) == life.booted.id)
    assert origin.read_bytes() == before


def test_nothing_is_claimed_that_is_not_proved(make: MakeHost) -> None:
    for era in (Era.BARE, Era.SIDECAR):
        life = upgraded(make(era=era, name=str(era)))
        assert life.rollback
        for deployment in (life.booted, life.rollback):
            life.host.stream("manifest", deployment.image.manifest_digest).unlink(missing_ok=True)
        before = fingerprint(life.host.sysroot)
        assert adopted(life.host) == []
        assert fingerprint(life.host.sysroot) == before
        assert not tags_of(life.host)


def test_what_is_left_over_is_not_adopted(make: MakeHost) -> None:
    life = staged(make(era=Era.SIDECAR))
    assert life.staged
    life.host.marker.unlink()
    assert life.staged.id not in {str(each.id) for each in adopted(life.host)}


def test_one_that_fails_keeps_no_other_from_it(make: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    life = upgraded(make(era=Era.SIDECAR))
    assert life.rollback
    write = durable.replace_file

    def replace_file(path: Path, data: bytes) -> None:
        if life.booted.id in str(path):
            raise OSError(5, "Input/output error")
        write(path, data)

    monkeypatch.setattr(durable, "replace_file", replace_file)
    found = {str(each.id): each for each in adopted(life.host)}
    assert "Input/output error" in found[life.booted.id].problem
    assert found[life.rollback.id].named
    row = row_of(state_of(life.host), life.booted)
    assert row.origin is not None
    assert row.origin.manifest_digest is None
