"""What calls ask for: arguments that are refused, and what is made of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from hostimage_dbus.transport import Variant
from hostimaged.bus.authorization import Member
from hostimaged.bus.findings import ImageRow
from hostimaged.bus.guarded import operation_of
from hostimaged.bus.requests import OPERATIONS, Request, make_request, newest_of
from hostimaged.config import Settings
from hostimaged.errors import ImageNotFound, Internal, InvalidArgs, InvalidReference
from hostimaged.jobs.operations import Check, Pull, Unify

DIGEST = {name: "sha256:" + name * 64 for name in "abcde"}
TRACKED = "docker://registry.example/os:latest"


@dataclass
class World:
    tracked_image: str = "docker://registry.example/os"
    images: list[ImageRow] = field(default_factory=list)
    deployments: Sequence[str] = ("/org/hostimage1/deployments/_1",)

    def deployment_at(self, path: str) -> str:
        return "1" * 128 if path in self.deployments else ""


def row(tag: str, digest: str, reference: str | None = TRACKED, pulled: int = 0, **more: Any) -> ImageRow:
    return ImageRow(tag=tag, manifest_digest=DIGEST[digest], reference=reference, pulled=pulled, **more)


IMAGES = [
    row("old", "a", pulled=1),
    row("new", "b", pulled=2, source_digest=DIGEST["c"]),
    row("artifact", "d", pulled=9, artifact=True),
    row("other", "e", "oci:/x", 3),
    ImageRow(tag="broken", problem="gone"),
]


def ask(member: Member, *body: Any, world: World | None = None, **options: Any) -> Request:
    given = {key.replace("_", "-"): Variant("s", value) for key, value in options.items()}
    return make_request(member, [*body, given], world or World(images=IMAGES))


def test_images_in_their_normal_form() -> None:
    assert ask(Member.PULL, "").reference == TRACKED
    assert ask(Member.PULL, "docker://registry.example/x").reference == "docker://registry.example/x:latest"
    assert ask(Member.CHECK, "oci:/a").image == "oci:/a"
    assert ask(Member.UPGRADE).reference == TRACKED
    assert ask(Member.PULL, "", expect_digest=DIGEST["a"]).digest == DIGEST["a"]


@pytest.mark.parametrize("member", [Member.PULL, Member.CHECK])
def test_without_a_tracked_image_one_is_named(member: Member) -> None:
    with pytest.raises(InvalidArgs, match="tracked-image is not set"):
        ask(member, "", world=World(tracked_image=""))
    with pytest.raises(InvalidReference):
        ask(member, "", world=World(tracked_image="nonsense"))
    with pytest.raises(InvalidReference):
        ask(member, "nonsense")


def test_switching_names_an_image() -> None:
    with pytest.raises(InvalidReference):
        ask(Member.SWITCH, "")


@pytest.mark.parametrize(
    ("image", "digest", "newest"),
    [
        (DIGEST["b"], "b", True),
        ("new", "b", True),
        (TRACKED, "b", True),
        ("docker://registry.example/os", "b", True),
        (DIGEST["a"], "a", False),
        ("old", "a", False),
        ("artifact", "d", False),
        ("oci:/x", "e", False),
    ],
)
def test_what_is_staged_is_here(image: str, digest: str, newest: bool) -> None:
    request = ask(Member.STAGE, image)
    assert (request.digest, request.newest) == (DIGEST[digest], newest)


@pytest.mark.parametrize("image", ["sha256:" + "0" * 64, "oci:/y", "broken"])
def test_what_is_not_here_is_not_staged(image: str) -> None:
    with pytest.raises((ImageNotFound, InvalidReference)):
        ask(Member.STAGE, image)


def test_staging_with_an_expected_digest() -> None:
    assert ask(Member.STAGE, "new", expect_digest=DIGEST["c"]).digest == DIGEST["b"]
    with pytest.raises(InvalidArgs, match="not the expected"):
        ask(Member.STAGE, "new", expect_digest=DIGEST["a"])


def test_the_newest_is_not_known_without_a_tracked_image() -> None:
    assert newest_of("", IMAGES) is None
    for tracked in ("", "nonsense"):
        assert not ask(Member.STAGE, "new", world=World(tracked_image=tracked, images=IMAGES)).newest


@pytest.mark.parametrize(
    ("member", "body"),
    [
        (Member.EXPLAIN, [""]),
        (Member.EXPLAIN, ["x" * 5000]),
        (Member.EXPLAIN, ["a\x00"]),
        (Member.SET_KERNEL_ARGUMENTS, [[], []]),
        (Member.SET_KERNEL_ARGUMENTS, [["x"] * 40, ["y"] * 40]),
        (Member.SET_KERNEL_ARGUMENTS, [["a\nb"], []]),
        (Member.SET_KERNEL_ARGUMENTS, [[], [" "]]),
        (Member.SET_KERNEL_ARGUMENTS, [["x" * 2049], []]),
        (Member.SET_UPDATE_POLICY, ["always"]),
        (Member.HOLD_UPDATES, [0, "x" * 257]),
        (Member.DIFF, ["/org/hostimage1/deployments/_2"]),
        (Member.STAGE, ["x" * 5000]),
        (Member.STAGE, [""]),
    ],
)
def test_arguments_that_are_refused(member: Member, body: list[Any]) -> None:
    with pytest.raises((InvalidArgs, InvalidReference)):
        ask(member, *body)


@pytest.mark.parametrize(
    ("member", "body"),
    [
        (Member.EXPLAIN, ["anything"]),
        (Member.SET_KERNEL_ARGUMENTS, [["a=b"], ["c"]]),
        (Member.SET_UPDATE_POLICY, ["none"]),
        (Member.HOLD_UPDATES, [5, "why"]),
        (Member.DIFF, ["/org/hostimage1/deployments/_1"]),
        (Member.ROLLBACK, []),
    ],
)
def test_arguments_that_are_taken_can_be_compared(member: Member, body: list[Any]) -> None:
    assert ask(member, *body) == ask(member, *body)
    assert hash(ask(member, *body).arguments) is not None


def test_details_say_what_is_known() -> None:
    assert ask(Member.ROLLBACK).details == {"operation": "rollback"}
    assert make_request(Member.DELETE, [{}], World(), "12").details == {
        "operation": "delete",
        "deployment": "12",
    }


def test_every_guarded_member_has_a_name_for_rules() -> None:
    open_members = {Member.GET_STATUS, Member.GET_DEPLOYMENT, Member.LIST_IMAGES, Member.LIST_JOBS}
    assert OPERATIONS.keys() == set(Member) - open_members


def test_requests_become_operations() -> None:
    settings = Settings()
    pull = operation_of(ask(Member.PULL, "", expect_digest=DIGEST["a"]), settings)
    assert pull == Pull(reference=TRACKED, expect_digest=DIGEST["a"])
    assert operation_of(ask(Member.CHECK, "oci:/x"), settings) == Check(reference="oci:/x")
    unified = operation_of(ask(Member.PULL, ""), settings, unified=True)
    assert unified == Pull(reference=TRACKED, unified=True)
    assert unified.identity != operation_of(ask(Member.PULL, ""), settings).identity
    begin = operation_of(ask(Member.SET_UNIFIED, True), settings)
    assert begin == Unify(reference=TRACKED, unified=True)
    assert operation_of(ask(Member.SET_UNIFIED, False), settings) == Unify(reference=TRACKED, unified=False)
    with pytest.raises(Internal):
        operation_of(Request(Member.GET_STATUS), settings)
