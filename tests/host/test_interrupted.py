"""Operations interrupted at every step, or by a disk that fails at every write: what boots is whole."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from bootc_model import Bootc

from hostimage_testing.disk import EXPECTED, Crash, Disk
from hostimage_testing.explained import unexplained
from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.lives import Life, staged
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.errors import Cancelled, HostimageError, StorageError
from hostimaged.host import reorder
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.pins import set_pinned
from hostimaged.host.session import Session
from hostimaged.host.stage import StageRequest, stage, unstage
from hostimaged.ids import DeploymentId, ManifestDigest

# Many hosts, one after the other, each with its syncs.
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
NEXT = Recipe(version="9", kernel=b"kernel nine ", etc={"new.conf": b"new\n"})


@dataclass(frozen=True)
class Stood:
    """A host with a staged deployment, and an image that is not staged yet."""

    life: Life
    image: OsImage

    @property
    def booted(self) -> str:
        return self.life.booted.id

    @property
    def rollback(self) -> str:
        assert self.life.rollback is not None
        return self.life.rollback.id


Operation = Callable[[Session, Stood], Any]

OPERATIONS: dict[str, Operation] = {
    "rollback": lambda opened, _: reorder.rollback(opened),
    "default": lambda opened, stood: reorder.make_default(opened, DeploymentId(stood.rollback)),
    "delete": lambda opened, stood: reorder.delete(opened, DeploymentId(stood.rollback)),
    "unstage": lambda opened, _: unstage(opened),
    "pin": lambda opened, stood: set_pinned(opened, DeploymentId(stood.rollback), pinned=True),
    "stage": lambda opened, stood: stage(
        opened, StageRequest(ManifestDigest(stood.image.manifest_digest), REFERENCE)
    ),
    "finalize": lambda opened, _: finalize(opened),
}


def stand(tmp_path: Path, cfsctl: str, kind: Kind, name: str) -> Stood:
    host = RecordedHost(tmp_path / name, cfsctl, kind=kind)
    life = staged(host)
    image = host.image(replace(NEXT))
    (host.root / "etc/hostname").write_text("mine\n")
    return Stood(life, image)


def check(stood: Stood, cfsctl: str, operation: Operation, *, lost: bool) -> None:
    """What was left boots; recovery settles it; then the same can be done, or says why not."""
    host = stood.life.host
    before = _status(host)
    assert before.booted_deployment is not None
    assert str(before.booted_deployment.id) == stood.booted
    for row in before.visible:
        if row.live is not None and str(row.id) in (stood.booted, stood.rollback):
            assert row.bootable, row.problems
    for line in host.menu():
        host.startable(line)
    if lost:
        assert host.reboot() in host.images
    with session(host) as opened:
        reorder.begin(opened)
    # The collector removes what went out of the menu when the staged one came in.
    assert unexplained(host, kept={stood.rollback} if operation is OPERATIONS["finalize"] else ()) == []
    with session(host) as opened:
        failure = _failure(operation, opened, stood)
    # It was done the first time, or what it was about is gone with the power.
    assert not isinstance(failure, StorageError), failure
    for line in host.menu():
        host.startable(line)
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


def _failure(operation: Operation, opened: Session, stood: Stood) -> HostimageError | None:
    try:
        operation(opened, stood)
    except HostimageError as error:
        return error
    return None


def _menu(host: RecordedHost) -> list[tuple[str, str, bool]]:
    return [(str(row.id), str(row.role), row.pinned) for row in _status(host).visible]


def _status(host: RecordedHost) -> Any:
    with session(host) as opened:
        return opened.state()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("stage", "finalize")])
@pytest.mark.parametrize(("kind", "endings"), [(KINDS[1], (Crash,)), (KINDS[2], (Crash, Cancelled))], ids=str)
def test_interrupted_at_every_step(
    name: str, kind: Kind, endings: tuple[type[BaseException], ...], tmp_path: Path, cfsctl: str
) -> None:
    operation = OPERATIONS[name]
    for ending in endings:
        number = 0
        while True:
            stood = stand(tmp_path, cfsctl, kind, f"{ending.__name__}{number}")
            before = _menu(stood.life.host)
            try:
                with session(stood.life.host, At(number, ending)) as opened:
                    operation(opened, stood)
            except ending:
                # Who is told to stop stops in time, or not at all.
                assert ending is Crash or _menu(stood.life.host) == before
                check(stood, cfsctl, operation, lost=number % 2 == 0)
                number += 1
                continue
            break
        assert _menu(stood.life.host) != before
        assert number > (2 if ending is Crash else 0)


#: Writes between two that fail, for each error: all in a long run would take an hour.
STRIDES = {errno.ENOSPC: 5, errno.EIO: 7}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("code", STRIDES, ids=lambda code: errno.errorcode[code])
def test_a_disk_that_fails(
    name: str, code: int, tmp_path: Path, cfsctl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    at = 0
    while True:
        stood = stand(tmp_path, cfsctl, KINDS[2], f"host{at}")
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            disk.install()
            disk.plan(at, code)
            try:
                with session(stood.life.host) as opened:
                    failure = _failure(operation, opened, stood)
            except HostimageError as error:
                failure = error
        if disk.count <= at:
            break
        if failure is not None:
            assert isinstance(failure, EXPECTED[code]), failure
            check(stood, cfsctl, operation, lost=at % 2 == 0)
        at += STRIDES[code]
    assert at >= STRIDES[code]
