"""Which actions a call needs: the table of the API, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from hostimage_dbus.introspection import load
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE
from hostimaged.bus.authorization import Action, Facts, LogindAction, Member, required

A = Action
REBOOT = LogindAction.REBOOT
MULTIPLE = LogindAction.REBOOT_MULTIPLE_SESSIONS
#: The host as most are: the tracked image is trusted, and nobody else is logged in.
USUAL = Facts(source_trusted=True, other_sessions=False)
UNTRUSTED = Facts(other_sessions=False)
NEWEST = Facts(source_trusted=True, newest_of_tracked=True, other_sessions=False)
NEWEST_UNTRUSTED = Facts(newest_of_tracked=True, other_sessions=False)
OTHER_SESSIONS = Facts(source_trusted=True)
JOINED = Facts(source_trusted=True, joined=True, other_sessions=False)
IMAGE = "docker://registry.example/other:1"


def needs(member: str, facts: Facts = USUAL, image: str = "", **options: object) -> tuple[str, ...]:
    given = {key.replace("_", "-"): value for key, value in options.items()}
    return required(Member(member), given, facts, image=image)


#: Every method without options, the tracked image trusted; what is open to all needs nothing.
PLAIN: Mapping[str, tuple[str, ...]] = {
    "GetStatus": (),
    "GetDeployment": (),
    "ListImages": (),
    "ListJobs": (),
    "Check": (A.CHECK,),
    "Upgrade": (A.UPDATE,),
    "Pull": (A.UPDATE,),
    "Stage": (A.SWITCH_IMAGE,),
    "Switch": (A.SWITCH_IMAGE,),
    "Rollback": (A.ROLLBACK,),
    "Unstage": (A.ROLLBACK,),
    "CancelRollback": (A.ROLLBACK,),
    "CollectGarbage": (A.CLEANUP,),
    "VerifyRepository": (A.CLEANUP,),
    "Repair": (A.CLEANUP,),
    "Explain": (A.CHECK,),
    "SetKernelArguments": (A.SWITCH_IMAGE,),
    "SetUnified": (A.CONFIGURE,),
    "SetUpdatePolicy": (A.CONFIGURE,),
    "HoldUpdates": (A.CONFIGURE,),
    "Reload": (A.CONFIGURE,),
    "SetPinned": (A.CONFIGURE,),
    "Delete": (A.CLEANUP,),
    "MakeDefault": (A.ROLLBACK,),
    "Diff": (A.CHECK,),
    "Cancel": (A.CANCEL,),
}


@pytest.mark.parametrize("member", list(Member))
def test_every_method_has_its_action(member: str) -> None:
    assert needs(member) == PLAIN[member]


def test_methods_of_the_interfaces_have_a_rule() -> None:
    for interface in (MANAGER_INTERFACE, JOB_INTERFACE):
        methods = load(f"{interface}.xml")[interface].methods
        assert methods.keys() <= set(Member)


@pytest.mark.parametrize(
    ("member", "facts", "image", "options", "expected"),
    [
        # The tracked image, or one that the caller chooses.
        ("Check", USUAL, IMAGE, {}, (A.SWITCH_IMAGE,)),
        ("Pull", USUAL, IMAGE, {}, (A.SWITCH_IMAGE,)),
        ("Switch", USUAL, IMAGE, {}, (A.SWITCH_IMAGE,)),
        ("Stage", NEWEST, IMAGE, {}, (A.UPDATE,)),
        # A source that somebody else may have changed: looking is as before, following is not.
        ("Check", UNTRUSTED, "", {}, (A.CHECK,)),
        ("Pull", UNTRUSTED, "", {}, (A.SWITCH_IMAGE,)),
        ("Upgrade", UNTRUSTED, "", {}, (A.SWITCH_IMAGE,)),
        ("Stage", NEWEST_UNTRUSTED, IMAGE, {}, (A.SWITCH_IMAGE,)),
        ("Rollback", UNTRUSTED, "", {}, (A.ROLLBACK,)),
        ("CollectGarbage", UNTRUSTED, "", {}, (A.CLEANUP,)),
        # Not the newest, or again what failed.
        ("Upgrade", USUAL, "", {"allow-downgrade": True}, (A.SWITCH_IMAGE,)),
        ("Upgrade", USUAL, "", {"allow-downgrade": False}, (A.UPDATE,)),
        ("Upgrade", USUAL, "", {"retry-failed": True}, (A.SWITCH_IMAGE,)),
        ("Pull", USUAL, "", {"retry-failed": True}, (A.SWITCH_IMAGE,)),
        ("Pull", USUAL, "", {"retry-failed": False}, (A.UPDATE,)),
        ("Stage", NEWEST, IMAGE, {"allow-downgrade": True}, (A.SWITCH_IMAGE,)),
        # A reboot is logind's to allow, as well.
        ("Upgrade", USUAL, "", {"apply": "none"}, (A.UPDATE,)),
        ("Upgrade", USUAL, "", {"apply": "reboot"}, (A.UPDATE, REBOOT)),
        ("Upgrade", USUAL, "", {"apply": "soft-reboot"}, (A.UPDATE, REBOOT)),
        ("Upgrade", OTHER_SESSIONS, "", {"apply": "reboot"}, (A.UPDATE, MULTIPLE)),
        ("Upgrade", UNTRUSTED, "", {"apply": "reboot"}, (A.SWITCH_IMAGE, REBOOT)),
        ("Stage", NEWEST, IMAGE, {"apply": "reboot"}, (A.UPDATE, REBOOT)),
        ("Switch", USUAL, IMAGE, {"apply": "reboot"}, (A.SWITCH_IMAGE, REBOOT)),
        ("Rollback", USUAL, "", {"apply": "reboot"}, (A.ROLLBACK, REBOOT)),
        ("Rollback", OTHER_SESSIONS, "", {"apply": "soft-reboot"}, (A.ROLLBACK, MULTIPLE)),
        ("MakeDefault", USUAL, "", {"apply": "reboot"}, (A.ROLLBACK, REBOOT)),
        ("SetKernelArguments", USUAL, "", {"apply": "reboot"}, (A.SWITCH_IMAGE, REBOOT)),
        ("Upgrade", USUAL, "", {"apply": "unheard-of"}, (A.UPDATE, REBOOT)),
        # What would be done is not what is done.
        ("CollectGarbage", USUAL, "", {"dry-run": True}, (A.CHECK,)),
        ("CollectGarbage", USUAL, "", {"dry-run": False}, (A.CLEANUP,)),
        ("Repair", USUAL, "", {"dry-run": True}, (A.CLEANUP,)),
        # One's own jobs.
        ("Cancel", JOINED, "", {}, ()),
        ("Cancel", USUAL, "", {}, (A.CANCEL,)),
    ],
)
def test_arguments_options_and_facts_count(
    member: str, facts: Facts, image: str, options: dict[str, object], expected: tuple[str, ...]
) -> None:
    assert required(Member(member), options, facts, image=image) == expected


@pytest.mark.parametrize("member", list(Member))
@pytest.mark.parametrize(
    "option",
    [
        "client-id",
        "background",
        "allow-metered",
        "allow-on-battery",
        "download-only",
        "from-downloaded",
        "expect-digest",
        "queue",
        "no-join",
        "sharing",
        "unified",
    ],
)
def test_other_options_change_nothing(member: str, option: str) -> None:
    assert required(Member(member), {option: True}, USUAL) == PLAIN[member]


def test_not_knowing_asks_for_more() -> None:
    """The facts' defaults never need less than any known facts do."""
    strength = {A.CHECK: 0, A.CANCEL: 0, A.UPDATE: 1, A.ROLLBACK: 2, A.CLEANUP: 2, A.CONFIGURE: 2}
    strength |= {A.SWITCH_IMAGE: 3, REBOOT: 4, MULTIPLE: 5}  # type: ignore[dict-item]
    for member, apply, *flags in itertools.product(Member, ["none", "reboot"], *[[False, True]] * 4):
        known = required(member, {"apply": apply}, Facts(*flags))
        unknown = required(member, {"apply": apply}, Facts())
        assert len(unknown) >= len(known)
        for less, more in zip(known, unknown, strict=False):
            assert strength[less] <= strength[more]  # type: ignore[index]
