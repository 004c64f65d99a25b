"""Images that did not start: nothing takes them again by itself, and somebody may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import Life, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import Recipe
from hostimaged.errors import PreconditionFailed
from hostimaged.host import bootcheck, failedboots, reorder
from hostimaged.host.failedboots import MAX_FAILED, FailedBoot
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.stage import StageRequest, stage
from hostimaged.ids import DeploymentId, ManifestDigest
from hostimaged.system.boot import read_boot_id
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]
REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
NOW = 1_767_225_600


def check(host: RecordedHost) -> str:
    paths = HostPaths.scratch(host.root)
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    return str(bootcheck.check(paths, read_boot_id(paths.boot_id), NOW, lambda: "")["result"])


def put_on(host: RecordedHost, digest: str, *, retry_failed: bool = False) -> dict[str, Any]:
    with session(host) as opened:
        request = StageRequest(ManifestDigest(digest), REFERENCE, retry_failed=retry_failed)
        return stage(opened, request)


def finalized(host: RecordedHost) -> None:
    with session(host) as opened:
        assert finalize(opened)["result"] == "finalized"


@pytest.fixture(params=KINDS, ids=str)
def failed(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> tuple[Life, FailedBoot]:
    """A host that runs what it ran before, and on which nothing is left of what did not start."""
    host = RecordedHost(tmp_path / "host", cfsctl, kind=request.param)
    life = upgraded(host)
    image = host.image(Recipe(version="3", kernel=b"kernel three "))
    assert put_on(host, image.manifest_digest)["result"] == "staged"
    finalized(host)
    assert host.reboot() == image.id
    host.booted(life.booted)
    assert check(host) == "not-booted"
    (row,) = failedboots.read(HostPaths.scratch(host.root))
    assert row == FailedBoot(DeploymentId(image.id), ManifestDigest(image.manifest_digest), NOW)
    # As long as it is there it can be chosen again, and is not staged.
    assert put_on(host, image.manifest_digest)["result"] == "same-as-rollback"
    with session(host) as opened:
        reorder.make_default(opened, DeploymentId(life.booted.id))
        reorder.delete(opened, row.deployment)
    return life, row


def test_an_image_that_did_not_start_is_not_taken_again_by_itself(failed: tuple[Life, FailedBoot]) -> None:
    life, row = failed
    digest = str(row.manifest_digest)
    with pytest.raises(PreconditionFailed, match=f"{digest} did not start.*retry-failed"):
        put_on(life.host, digest)
    assert not life.host.entries_staged.exists()
    other = life.host.image(Recipe(version="4", kernel=b"kernel four "))
    assert put_on(life.host, other.manifest_digest)["result"] == "staged", "others are"


def test_somebody_may_want_it_and_it_is_forgotten_once_it_runs(failed: tuple[Life, FailedBoot]) -> None:
    life, row = failed
    paths = HostPaths.scratch(life.host.root)
    assert put_on(life.host, str(row.manifest_digest), retry_failed=True)["result"] == "staged"
    finalized(life.host)
    assert failedboots.read(paths) == (row,)
    assert life.host.reboot() == row.deployment.value
    assert check(life.host) == "as-expected"
    assert failedboots.read(paths) == ()


def test_the_newest_are_remembered_each_once(tmp_path: Path) -> None:
    paths = HostPaths.scratch(tmp_path)
    runs = DeploymentId("f" * 128)
    rows = [FailedBoot(DeploymentId(f"{n:0128x}"), None, n) for n in range(MAX_FAILED + 3)]
    for row in [*rows, rows[-1]]:
        failedboots.remember(paths, failedboots.read(paths), row, runs)
    assert failedboots.read(paths) == tuple(rows[-MAX_FAILED:])
    assert paths.failed_boots.stat().st_size < failedboots.MAX_SIZE / 4
    before = paths.failed_boots.stat()
    failedboots.remember(paths, failedboots.read(paths), None, runs)
    assert paths.failed_boots.stat() == before, "what stays as it is is not written"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[" * 4000,
        '{"version": 1}',
        '{"version": 2, "deployments": []}',
        '{"version": 1, "deployments": {"a": 1}}',
        '{"version": 1, "deployments": ["x"]}',
        '{"version": 1, "deployments": [{"deployment": "x", "time": 1}]}',
        json.dumps({"version": 1, "deployments": [{"deployment": "a" * 128, "time": -1}]}),
        json.dumps(
            {"version": 1, "deployments": [{"deployment": "a" * 128, "time": 1, "manifest-digest": 5}]}
        ),
        json.dumps({"version": 1, "deployments": []}) + " " * failedboots.MAX_SIZE,
    ],
)
def test_a_damaged_memory_is_none(tmp_path: Path, content: str) -> None:
    paths = HostPaths.scratch(tmp_path)
    paths.failed_boots.parent.mkdir(parents=True)
    paths.failed_boots.write_text(content)
    assert failedboots.read(paths) == ()
    failed = FailedBoot(DeploymentId("a" * 128), ManifestDigest("sha256:" + "b" * 64), 7)
    failedboots.remember(paths, failedboots.read(paths), failed, DeploymentId("c" * 128))
    assert failedboots.read(paths) == (failed,)
