"""Orders to workers and the privileges that go with them."""

from __future__ import annotations

import importlib
import typing
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.errors import InvalidArgs, UnsupportedImage
from hostimaged.jobs.operations import (
    Delete,
    Import,
    Operation,
    Order,
    Pin,
    Pull,
    Rollback,
    Scan,
    Stage,
    Switch,
    Upgrade,
    parse_order,
)
from hostimaged.jobs.privileges import CAPABILITIES, Profile
from hostimaged.jobs.worker import WORK
from hostimaged.system.syscalls import Capability

DIGEST = "sha256:" + "0" * 64


def test_orders_survive_the_wire() -> None:
    for operation in (Pull(reference="oci:/x", expect_digest="sha256:1", lock_timeout=3), Scan()):
        order = Order(root="/somewhere", operation=operation)
        parsed = parse_order(order.model_dump_json().encode())
        assert parsed == order
        assert type(parsed.operation) is type(operation)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"root": null, "operation": {"kind": "format-disk"}}',
        b'{"root": null, "operation": {"kind": "pull"}}',
        b'{"root": null, "operation": {"kind": "pull", "reference": "x", "more": 1}}',
        b'{"root": null, "operation": {"kind": "pull", "reference": "x", "lock_timeout": -1}}',
        b'{"root": null, "operation": {"kind": "pull", "reference": "x", "verity": "off"}}',
    ],
)
def test_other_orders_are_refused(line: bytes) -> None:
    with pytest.raises(InvalidArgs, match="order of a worker"):
        parse_order(line)


def test_equal_pulls_are_equal() -> None:
    assert Pull(reference="oci:/x") == Pull(reference="oci:/x")
    assert Pull(reference="oci:/x") != Pull(reference="oci:/x", expect_digest="sha256:1")


@pytest.mark.parametrize(
    ("reference", "profile"),
    [
        ("docker://r.example/os", Profile.PULL),
        ("oci:/x", Profile.PULL),
        ("oci-archive:/x", Profile.PULL),
        ("dir:/x", Profile.PULL),
        ("containers-storage:localhost/os", Profile.PULL_STORAGE),
    ],
)
def test_only_containers_storage_has_privileges(reference: str, profile: Profile) -> None:
    assert Pull(reference=reference).profile is profile


def test_profiles_are_small() -> None:
    assert CAPABILITIES.keys() == set(Profile)
    for profile in (Profile.SCAN, Profile.PULL):
        assert CAPABILITIES[profile] <= {Capability.DAC_READ_SEARCH}


def test_every_operation_has_its_work() -> None:
    union = typing.get_args(Operation)[0]
    kinds = {typing.get_args(kind.model_fields["kind"].annotation)[0] for kind in typing.get_args(union)}
    assert WORK.keys() == kinds
    for place in WORK.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_update_fetches_without_privileges_and_then_stages() -> None:
    update = Switch(reference="docker://r.example/os:2", download_only=True, lock_timeout=3, max_entries=3)
    assert update.profile is Profile.PULL
    following = update.then({"manifest-digest": DIGEST, "artifact": False})
    assert following == Stage(
        manifest_digest=DIGEST,
        reference="docker://r.example/os:2",
        download_only=True,
        lock_timeout=3,
        max_entries=3,
    )
    assert following.profile is Profile.HOST
    assert following.then({}) is None
    assert Pull(reference="docker://r.example/os:2").then({"manifest-digest": DIGEST}) is None
    with pytest.raises(UnsupportedImage, match="artifact"):
        update.then({"manifest-digest": DIGEST, "artifact": True})


def test_what_is_downloaded_is_unlocked_without_fetching() -> None:
    update = Upgrade(reference="docker://r.example/os:2", from_downloaded=True)
    assert update.profile is Profile.HOST
    assert update.then({"result": "staged"}) is None
    assert update.identity != Upgrade(reference="docker://r.example/os:2").identity
    assert (
        update.identity
        == Upgrade(reference="docker://r.example/os:2", from_downloaded=True, lock_timeout=1).identity
    )


def test_equal_changes_of_deployments_are_equal() -> None:
    one, other = "a" * 128, "b" * 128
    assert Delete(deployment=one).identity == Delete(deployment=one, lock_timeout=1).identity
    assert Delete(deployment=one).identity != Delete(deployment=other).identity
    assert Rollback().identity != Rollback(action="cancel").identity
    assert Pin(deployment=one, pinned=True).identity != Pin(deployment=one, pinned=False).identity
    assert Delete(deployment=one).target == one


def test_the_unit_grants_what_workers_need_and_no_more() -> None:
    unit = Path(REPOSITORY_ROOT / "systemd/hostimaged.service").read_text()
    granted = {
        name.removeprefix("CAP_")
        for line in unit.splitlines()
        if line.startswith("CapabilityBoundingSet=")
        for name in line.partition("=")[2].split()
    }
    needed = {capability.name for keep in CAPABILITIES.values() for capability in keep}
    # What a worker needs before it gives them up: to take capabilities out of its bounding set, and to open
    # the mount namespace of the host.
    assert granted == needed | {"SETPCAP", "SYS_PTRACE"}


def test_unified_pulls_go_through_three_workers_with_privileges_of_their_own() -> None:
    update = Upgrade(reference="docker://r.example/os", unified=True, download_only=True, sharing="require")
    assert update.profile is Profile.STORE
    fetched = {"unified": True, "image-id": "1" * 64, "source-digest": DIGEST, "bytes-fetched": 7}
    importing = update.then(fetched)
    assert importing == Import(
        reference=update.reference, image_id="1" * 64, source_digest=DIGEST, fetched=True,
        sharing="require", stages=True, download_only=True,
    )  # fmt: skip
    assert importing.profile is Profile.PULL_STORAGE
    staging = importing.then({"manifest-digest": DIGEST})
    assert isinstance(staging, Stage)
    assert (staging.profile, staging.download_only, staging.reference) == (
        Profile.HOST, True, update.reference,
    )  # fmt: skip
    pull = Pull(reference=update.reference, unified=True)
    importing = pull.then(fetched | {"bytes-fetched": 0})
    assert isinstance(importing, Import)
    assert not importing.fetched
    assert importing.then({"manifest-digest": DIGEST}) is None


def test_what_cannot_be_shared_is_pulled_plainly_with_fewer_privileges() -> None:
    update = Switch(reference="docker://r.example/os", unified=True)
    plain = update.then({"unified": False, "not-unified": "why"})
    assert plain == Switch(reference=update.reference)
    assert plain.profile is Profile.PULL
    assert isinstance(plain.then({"manifest-digest": DIGEST}), Stage)
