"""Hosts in the middle of an update, for operations interrupted on them, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bootc_model import Bootc

from hostimage_testing.explained import unexplained
from hostimage_testing.hosts import KINDS, Kind, RecordedHost
from hostimage_testing.lives import Life, staged
from hostimage_testing.operating import session
from hostimage_testing.os_images import ImageMaker, OsImage, Recipe
from hostimaged.errors import HostimageError, StorageError
from hostimaged.host import reorder
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.model import HostState
from hostimaged.host.pins import set_pinned
from hostimaged.host.session import Session
from hostimaged.host.stage import StageRequest, stage, unstage
from hostimaged.ids import DeploymentId, ManifestDigest


@dataclass
class Stood:
    """A host with a staged deployment; an image that is not staged yet, and two that are not pulled yet."""

    life: Life
    image: OsImage
    remote: list[OsImage]

    @property
    def host(self) -> RecordedHost:
        """The host."""
        return self.life.host

    @property
    def booted(self) -> str:
        """Id of the deployment that runs."""
        return self.life.booted.id

    @property
    def rollback(self) -> str:
        """Id of the one before it."""
        assert self.life.rollback is not None
        return self.life.rollback.id

    def copy(self, root: Path) -> Stood:
        """The same at another place."""
        return replace(self, life=replace(self.life, host=self.host.copy(root)))


@dataclass
class Standing:
    """Makes such hosts below ``place``, each kind once, and hands out copies."""

    place: Path
    cfsctl: str

    def __post_init__(self) -> None:
        self._made: dict[Kind, Stood] = {}

    def copy(self, kind: Kind, root: Path) -> Stood:
        """One of ``kind`` at ``root``."""
        return self.original(kind).copy(root)

    def original(self, kind: Kind) -> Stood:
        """What is copied."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    def _make(self, kind: Kind) -> Stood:
        place = self.place / str(kind)
        place.mkdir()
        host = RecordedHost(place / "host", self.cfsctl, kind=kind)
        life = staged(host)
        image = host.image(Recipe(version="9", kernel=b"kernel nine ", etc={"new.conf": b"new\n"}))
        host.write_tag(image, "localhost/hostimaged-pull-")
        aside = ImageMaker(self.cfsctl, place / "aside", place / "aside-work")
        recipes = [Recipe(version=v, kernel=b"kernel ten ", uki=kind.uki) for v in ("10", "11")]
        remote = [aside.pull(recipe) for recipe in recipes]
        host.images |= {each.id: each for each in remote}
        (host.root / "etc/hostname").write_text("mine\n")
        (host.root / EDITED).write_text("local\n")
        return Stood(life, image, remote)


#: What the administrator added.
EDITED = "etc/local.conf"
REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
OTHER = OriginReference.parse("ostree-unverified-image:docker://registry.example/other:1")

Operation = Callable[[Session, Stood], Any]


def _stage(opened: Session, stood: Stood, reference: OriginReference) -> Any:
    return stage(opened, StageRequest(ManifestDigest(stood.image.manifest_digest), reference))


#: What can be done to such a host. Kernel arguments are not those of a unified kernel.
OPERATIONS: dict[str, Operation] = {
    "stage": lambda opened, stood: _stage(opened, stood, REFERENCE),
    "switch": lambda opened, stood: _stage(opened, stood, OTHER),
    "unstage": lambda opened, _: unstage(opened),
    "rollback": lambda opened, _: reorder.rollback(opened),
    "default": lambda opened, stood: reorder.make_default(opened, DeploymentId(stood.rollback)),
    "delete": lambda opened, stood: reorder.delete(opened, DeploymentId(stood.rollback)),
    "pin": lambda opened, stood: set_pinned(opened, DeploymentId(stood.rollback), pinned=True),
    "kargs": lambda opened, _: reorder.set_kernel_arguments(opened, ["quiet"], []),
    "finalize": lambda opened, _: finalize(opened),
}


def kinds_for(name: str) -> tuple[Kind, ...]:
    """The hosts that an operation can be done on."""
    return tuple(kind for kind in KINDS if not (kind.uki and name == "kargs"))


def waiting_after(name: str, stood: Stood) -> set[str]:
    """Deployments whose state an operation leaves to the collector: what goes out of the menu at shutdown."""
    return {stood.rollback} if name == "finalize" else set()


def check_after(stood: Stood, cfsctl: str, name: str, *, lost: bool) -> None:
    """What the operation left boots; recovery settles it; then it can be done again, or says why not.

    ``lost``: the machine is restarted before.
    """
    host = stood.host
    before = status_of(host)
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
    assert unexplained(host, waiting_after(name, stood), etc=[Path(EDITED).name]) == []
    with session(host) as opened:
        failure = failure_of(name, opened, stood)
    # It was done the first time, or what it was about is gone with the power.
    assert not isinstance(failure, StorageError), failure
    for line in host.menu():
        host.startable(line)
    assert Bootc(host.root, cfsctl, host.images).accepts() == []


def failure_of(name: str, opened: Session, stood: Stood) -> HostimageError | None:
    """Why an operation was not done, None if it was."""
    try:
        OPERATIONS[name](opened, stood)
    except HostimageError as error:
        return error
    return None


def status_of(host: RecordedHost) -> HostState:
    """The host as an operation sees it."""
    with session(host) as opened:
        return opened.state()
