"""The option dictionaries of methods: which keys each method takes, their types, and lengths of strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.bus.authorization import Member
from hostimaged.errors import InvalidArgs
from hostimaged.ids import SourceDigest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimage_dbus.transport import Variant

#: Longest string of an option: digests have 71 characters, names are shorter.
MAX_STRING: Final = 128
#: Values of "apply".
APPLY: Final = ("none", "reboot", "soft-reboot")

#: Values of "sharing".
SHARING: Final = ("copy", "auto", "require")
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {"apply": APPLY, "sharing": SHARING}

_ALL: Final = {"client-id": "s"}
_JOB: Final = _ALL | {"queue": "b", "no-join": "b"}
_APPLY: Final = {"apply": "s"}
_CHECK: Final = _JOB | {"background": "b", "allow-metered": "b", "allow-on-battery": "b"}
_PULL: Final = _CHECK | {"expect-digest": "s", "retry-failed": "b", "sharing": "s", "unified": "b"}
_SWITCH: Final = _PULL | _APPLY | {"download-only": "b", "allow-downgrade": "b"}

#: D-Bus type of each option, per member. An option that is not in its member's row is refused.
OPTIONS: Final[Mapping[Member, Mapping[str, str]]] = {
    Member.GET_STATUS: _ALL,
    Member.GET_DEPLOYMENT: _ALL,
    Member.LIST_IMAGES: _ALL,
    Member.CHECK: _CHECK,
    Member.UPGRADE: _SWITCH | {"from-downloaded": "b"},
    Member.PULL: _PULL,
    Member.STAGE: _JOB
    | _APPLY
    | {"expect-digest": "s", "retry-failed": "b", "download-only": "b", "allow-downgrade": "b"},
    Member.SWITCH: _SWITCH,
    Member.ROLLBACK: _JOB | _APPLY,
    Member.UNSTAGE: _JOB,
    Member.CANCEL_ROLLBACK: _JOB,
    Member.COLLECT_GARBAGE: _JOB | {"background": "b", "dry-run": "b"},
    Member.VERIFY_REPOSITORY: _JOB | {"background": "b"},
    Member.REPAIR: _JOB | {"dry-run": "b"},
    Member.EXPLAIN: _JOB,
    Member.SET_KERNEL_ARGUMENTS: _JOB | _APPLY,
    Member.SET_UNIFIED: _JOB,
    Member.SET_UPDATE_POLICY: _ALL,
    Member.HOLD_UPDATES: _ALL,
    Member.SET_PINNED: _JOB,
    Member.DELETE: _JOB,
    Member.MAKE_DEFAULT: _JOB | _APPLY,
    Member.DIFF: _JOB,
    Member.CANCEL: _ALL,
}


def parse_options(member: Member, given: Mapping[str, Variant]) -> dict[str, Any]:
    """The values of ``given``, checked for ``member``; raises ``InvalidArgs`` naming the option."""
    known = OPTIONS[member]
    values: dict[str, Any] = {}
    for key, variant in given.items():
        shown = ascii(key[:MAX_STRING])
        if key not in known:
            raise InvalidArgs(f"{member} has no option {shown}")
        if variant.signature != known[key]:
            raise InvalidArgs(f"option {shown} is of type {known[key]}, not {variant.signature[:MAX_STRING]}")
        if isinstance(variant.value, str):
            check_string(f"option {key}", variant.value)
        values[key] = variant.value
    for key, choices in _CHOICES.items():
        if key in values and values[key] not in choices:
            raise InvalidArgs(f"option {key} is one of {', '.join(choices)}")
    if "expect-digest" in values:
        SourceDigest(values["expect-digest"])
    return values


def check_string(what: str, value: str, limit: int = MAX_STRING) -> None:
    """Raise ``InvalidArgs`` unless ``value`` is one short printable line."""
    if len(value) > limit:
        raise InvalidArgs(f"{what} is longer than {limit} characters")
    if not value.isprintable():
        raise InvalidArgs(f"{what} has control characters")
