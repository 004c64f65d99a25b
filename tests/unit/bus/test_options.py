"""Option dictionaries: every option of every member, and no other."""

from __future__ import annotations

import pytest

from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.names import DEPLOYMENT_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE
from hostimage_dbus.transport import Variant
from hostimaged.bus.authorization import Member
from hostimaged.bus.options import APPLY, MAX_STRING, OPTIONS, SHARING, parse_options
from hostimaged.errors import InvalidArgs


def test_every_member_with_options_has_a_row() -> None:
    shipped = load_shipped()
    members = {
        method.name
        for name in (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE, JOB_INTERFACE)
        for method in shipped[name].methods.values()
        if "a{sv}" in method.signature
    }
    assert OPTIONS.keys() == members


#: The specification's table, written down a second time.
EVERY = {
    "client-id", "queue", "no-join", "background", "allow-metered", "allow-on-battery", "expect-digest",
    "retry-failed", "sharing", "unified", "download-only", "from-downloaded", "apply", "allow-downgrade",
    "dry-run",
}  # fmt: skip
JOB = {"client-id", "queue", "no-join"}
CHECK = JOB | {"background", "allow-metered", "allow-on-battery"}
PULL = CHECK | {"expect-digest", "retry-failed", "sharing", "unified"}
SWITCH = PULL | {"download-only", "apply", "allow-downgrade"}
ALLOWED = {
    "GetStatus": {"client-id"},
    "GetDeployment": {"client-id"},
    "ListImages": {"client-id"},
    "SetUpdatePolicy": {"client-id"},
    "HoldUpdates": {"client-id"},
    "Cancel": {"client-id"},
    "Check": CHECK,
    "Pull": PULL,
    "Upgrade": SWITCH | {"from-downloaded"},
    "Switch": SWITCH,
    "Stage": JOB | {"expect-digest", "retry-failed", "download-only", "apply", "allow-downgrade"},
    "Rollback": JOB | {"apply"},
    "MakeDefault": JOB | {"apply"},
    "SetKernelArguments": JOB | {"apply"},
    "CollectGarbage": JOB | {"background", "dry-run"},
    "Repair": JOB | {"dry-run"},
    "VerifyRepository": JOB | {"background"},
    "Unstage": JOB,
    "CancelRollback": JOB,
    "Explain": JOB,
    "SetUnified": JOB,
    "SetPinned": JOB,
    "Delete": JOB,
    "Diff": JOB,
}
TEXTS = {
    "client-id": "text",
    "apply": "reboot",
    "expect-digest": "sha256:" + "a" * 64,
    "sharing": "require",
}


@pytest.mark.parametrize("member", OPTIONS)
@pytest.mark.parametrize("key", sorted(EVERY))
def test_all_options_of_all_members(member: Member, key: str) -> None:
    value = TEXTS.get(key, False)
    given = {key: Variant("b" if value is False else "s", value)}
    if key in ALLOWED[member]:
        assert parse_options(member, given) == {key: value}
    else:
        with pytest.raises(InvalidArgs, match=f"{member} has no option '{key}'"):
            parse_options(member, given)


def test_the_table_is_whole() -> None:
    assert OPTIONS.keys() == ALLOWED.keys()
    assert {key for row in OPTIONS.values() for key in row} == EVERY


@pytest.mark.parametrize("value", APPLY)
def test_apply_has_three_values(value: str) -> None:
    assert parse_options(Member.STAGE, {"apply": Variant("s", value)}) == {"apply": value}
    with pytest.raises(InvalidArgs, match="apply is one of"):
        parse_options(Member.STAGE, {"apply": Variant("s", value + "s")})


@pytest.mark.parametrize("value", SHARING)
def test_sharing_has_three_values(value: str) -> None:
    assert parse_options(Member.PULL, {"sharing": Variant("s", value)}) == {"sharing": value}
    for other in ("", value + "s", value.upper()):
        with pytest.raises(InvalidArgs, match="sharing is one of copy, auto, require"):
            parse_options(Member.PULL, {"sharing": Variant("s", other)})


def test_a_digest_is_a_digest() -> None:
    with pytest.raises(InvalidArgs, match="source digest"):
        parse_options(Member.PULL, {"expect-digest": Variant("s", "sha256:1")})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Variant("u", 1), "is of type s, not u"),
        (Variant("as", ["x"]), "is of type s, not as"),
        (Variant("s", "x" * (MAX_STRING + 1)), "longer than"),
        (Variant("s", "a\nb"), "control characters"),
        (Variant("s", "a\u202eb"), "control characters"),
    ],
)
def test_values_are_checked(value: Variant, message: str) -> None:
    with pytest.raises(InvalidArgs, match=message):
        parse_options(Member.GET_STATUS, {"client-id": value})


def test_a_key_is_shown_shortened_and_plain() -> None:
    with pytest.raises(InvalidArgs) as caught:
        parse_options(Member.GET_STATUS, {"\n\u202e" + "k" * 5000: Variant("b", True)})
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
