"""Which polkit actions a call needs. A pure function of the call and of a few facts; nobody is asked here.

The rules are those of org.hostimage1(5), Security. Where a fact is not known its default is the one that asks
for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Action(StrEnum):
    """Our polkit actions, declared in org.hostimage1.policy."""

    CHECK = "org.hostimage1.check"
    UPDATE = "org.hostimage1.update"
    SWITCH_IMAGE = "org.hostimage1.switch-image"
    ROLLBACK = "org.hostimage1.rollback"
    CLEANUP = "org.hostimage1.cleanup"
    CONFIGURE = "org.hostimage1.configure"
    CANCEL = "org.hostimage1.cancel"


class LogindAction(StrEnum):
    """Actions of logind that stand between a user and a reboot."""

    REBOOT = "org.freedesktop.login1.reboot"
    REBOOT_MULTIPLE_SESSIONS = "org.freedesktop.login1.reboot-multiple-sessions"


class Member(StrEnum):
    """Every method of Manager, Deployment and Job, by its name on the bus."""

    GET_STATUS = "GetStatus"
    GET_DEPLOYMENT = "GetDeployment"
    LIST_IMAGES = "ListImages"
    LIST_JOBS = "ListJobs"
    CHECK = "Check"
    UPGRADE = "Upgrade"
    PULL = "Pull"
    STAGE = "Stage"
    SWITCH = "Switch"
    ROLLBACK = "Rollback"
    UNSTAGE = "Unstage"
    CANCEL_ROLLBACK = "CancelRollback"
    COLLECT_GARBAGE = "CollectGarbage"
    VERIFY_REPOSITORY = "VerifyRepository"
    REPAIR = "Repair"
    EXPLAIN = "Explain"
    SET_KERNEL_ARGUMENTS = "SetKernelArguments"
    SET_UNIFIED = "SetUnified"
    SET_UPDATE_POLICY = "SetUpdatePolicy"
    HOLD_UPDATES = "HoldUpdates"
    RELOAD = "Reload"
    SET_PINNED = "SetPinned"
    DELETE = "Delete"
    MAKE_DEFAULT = "MakeDefault"
    DIFF = "Diff"
    CANCEL = "Cancel"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision depends on besides the call itself.

    ``source_trusted``: the tracked reference may be followed without a password (``oci.trust``).
    ``newest_of_tracked``: what Stage names is the newest that was pulled of the tracked image.
    ``joined``: the caller of Cancel is one of those who asked for the job, and only withdraws.
    ``other_sessions``: users other than the caller are logged in, as logind counts them.
    """

    source_trusted: bool = False
    newest_of_tracked: bool = False
    joined: bool = False
    other_sessions: bool = True


#: Methods whose action never depends on their arguments; None: open to everybody.
_ALWAYS: Final[Mapping[Member, Action | None]] = {
    Member.GET_STATUS: None,
    Member.GET_DEPLOYMENT: None,
    Member.LIST_IMAGES: None,
    Member.LIST_JOBS: None,
    Member.UPGRADE: Action.UPDATE,
    Member.SWITCH: Action.SWITCH_IMAGE,
    Member.ROLLBACK: Action.ROLLBACK,
    Member.UNSTAGE: Action.ROLLBACK,
    Member.CANCEL_ROLLBACK: Action.ROLLBACK,
    Member.VERIFY_REPOSITORY: Action.CLEANUP,
    Member.REPAIR: Action.CLEANUP,
    Member.EXPLAIN: Action.CHECK,
    Member.SET_KERNEL_ARGUMENTS: Action.SWITCH_IMAGE,
    Member.SET_UNIFIED: Action.CONFIGURE,
    Member.SET_UPDATE_POLICY: Action.CONFIGURE,
    Member.HOLD_UPDATES: Action.CONFIGURE,
    Member.RELOAD: Action.CONFIGURE,
    Member.SET_PINNED: Action.CONFIGURE,
    Member.DELETE: Action.CLEANUP,
    Member.MAKE_DEFAULT: Action.ROLLBACK,
    Member.DIFF: Action.CHECK,
}
#: Options that leave the path of "the newest of the configured image", which is all that update stands for.
_ESCALATING: Final = ("allow-downgrade", "retry-failed")


def reboots(options: Mapping[str, object]) -> bool:
    """Whether a call asks for a reboot."""
    return options.get("apply", "none") != "none"


def required(
    member: Member, options: Mapping[str, object], facts: Facts, *, image: str = ""
) -> tuple[Action | LogindAction, ...]:
    """The polkit actions that a caller who is not root needs, all of them, in the order to ask for them.

    ``options`` are the plain values of the call's options, which the method is known to take; ``image`` is
    the image that the call names, "" for the tracked one. An empty result: the call is open to everybody.
    """
    action = _main(member, options, facts, image)
    if action is None:
        return ()
    if any(options.get(name) for name in _ESCALATING):
        action = Action.SWITCH_IMAGE
    if action is Action.UPDATE and not facts.source_trusted:
        action = Action.SWITCH_IMAGE
    if not reboots(options):
        return (action,)
    reboot = LogindAction.REBOOT_MULTIPLE_SESSIONS if facts.other_sessions else LogindAction.REBOOT
    return (action, reboot)


def _main(member: Member, options: Mapping[str, object], facts: Facts, image: str) -> Action | None:
    match member:
        case Member.CHECK:
            # Another image: the caller would aim root's network and credentials.
            return Action.SWITCH_IMAGE if image else Action.CHECK
        case Member.PULL:
            return Action.SWITCH_IMAGE if image else Action.UPDATE
        case Member.STAGE:
            return Action.UPDATE if facts.newest_of_tracked else Action.SWITCH_IMAGE
        case Member.COLLECT_GARBAGE:
            return Action.CHECK if options.get("dry-run") else Action.CLEANUP
        case Member.CANCEL:
            return None if facts.joined else Action.CANCEL
        case _:
            return _ALWAYS[member]
