"""Deployments that follow an image as far as it is signed: with workers, skopeo, and a real key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.explained import listing
from hostimage_testing.forks import End, Forks, forking
from hostimage_testing.hosts import KINDS, RecordedHost
from hostimage_testing.lives import installed
from hostimage_testing.os_images import ImageMaker, OsImage, Recipe
from hostimage_testing.tools import run
from hostimaged.jobs.operations import Check, Operation, Order, Pull, Switch, Upgrade

pytestmark = pytest.mark.interop

IDENTITY = "registry.example/os:v1"


class Scene:
    """A host whose deployment follows the directory ``source``, and an image that is newer."""

    def __init__(self, place: Path, cfsctl: str, forks: Forks) -> None:
        self._forks = forks
        self.host = RecordedHost(place / "host", cfsctl, kind=KINDS[2])
        aside = ImageMaker(cfsctl, place / "aside", place / "aside-work")
        self.image: OsImage = aside.pull(Recipe(version="9"))
        self.host.images[self.image.id] = self.image
        self.source = place / "signed"
        self.tracked = f"dir:{self.source}"
        life = installed(self.host)
        self.host.write_origin(life.booted, reference=f"ostree-image-signed:{self.tracked}")
        (self.host.root / "run/hostimaged").mkdir()

    def publish(self, skopeo: str, *options: str) -> None:
        """Put the image where the host looks for it."""
        run(skopeo, "copy", "-q", "--insecure-policy", self.image.source, self.tracked, *options)

    def policy(self, *requirements: dict[str, Any]) -> None:
        """What policy.json demands of everything."""
        path = self.host.root / "etc/containers/policy.json"
        path.write_text(json.dumps({"default": list(requirements)}))

    def do(self, operation: Operation) -> End:
        """Do it in workers."""
        order = Order(root=str(self.host.root), operation=operation)
        end = self._forks.work(order.model_dump_json(), str(operation.profile))
        following = None if end.result is None else operation.then(end.result)
        return end if following is None else self.do(following)

    def origin(self) -> str:
        """The reference of what is staged."""
        return self.host.origin(self.image.id).read_text().splitlines()[1]


@pytest.fixture
def scene(tmp_path: Path, cfsctl: str) -> Iterator[Scene]:
    with forking() as forks:
        yield Scene(tmp_path, cfsctl, forks)


def test_a_policy_that_accepts_anything_is_refused(scene: Scene, skopeo: str) -> None:
    scene.publish(skopeo)
    scene.policy({"type": "insecureAcceptAnything"})
    before = listing(scene.host.repository)
    options: dict[str, Any] = {"reference": scene.tracked, "verity": "opportunistic"}
    # By whatever name the caller means it: the daemon fills in the tracked image where none is given.
    for operation in (Check(reference=scene.tracked), Pull(**options), Upgrade(**options), Switch(**options)):
        end = scene.do(operation)
        assert end.error == "SignatureRejected", end
        assert end.message.startswith(f"what follows {scene.tracked} demands signatures")
    assert listing(scene.host.repository) == before
    # Nobody demands anything of another image, and it is followed as bootc would write it.
    end = scene.do(Switch(reference=scene.image.source, verity="opportunistic"))
    assert end.result is not None
    assert end.result["result"] == "staged"
    assert scene.origin().endswith(f"= ostree-unverified-image:{scene.image.source}")


def test_a_signed_image_is_staged_and_the_next_has_to_be_signed(
    scene: Scene, skopeo: str, signing_key: tuple[str, Path]
) -> None:
    fingerprint, public = signing_key
    scene.policy(
        {
            "type": "signedBy",
            "keyType": "GPGKeys",
            "keyPath": str(public),
            "signedIdentity": {"type": "exactReference", "dockerReference": IDENTITY},
        }
    )
    upgrade = Upgrade(reference=scene.tracked, verity="opportunistic")
    scene.publish(skopeo)
    assert scene.do(upgrade).error == "SignatureRejected"
    scene.publish(skopeo, "--sign-by", fingerprint, "--sign-identity", IDENTITY)
    end = scene.do(upgrade)
    assert end.result is not None, end
    assert end.result["result"] == "staged"
    assert scene.origin().endswith(f"= ostree-image-signed:{scene.tracked}")
