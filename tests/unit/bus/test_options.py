"""Option dictionaries: every option of every member, and no other."""

from __future__ import annotations

import pytest

from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE
from hostimage_dbus.transport import Variant
from hostimaged.bus.options import MAX_STRING, OPTIONS, parse_options
from hostimaged.errors import InvalidArgs

VALUES = {"s": "text", "b": False}


def test_every_member_with_options_has_a_row() -> None:
    shipped = load_shipped()
    members = {
        method.name
        for name in (MANAGER_INTERFACE, JOB_INTERFACE)
        for method in shipped[name].methods.values()
        if "a{sv}" in method.signature
    }
    assert OPTIONS.keys() == members


@pytest.mark.parametrize("member", OPTIONS)
def test_all_options_of_all_members(member: str) -> None:
    every = {key: kind for row in OPTIONS.values() for key, kind in row.items()} | {"background": "b"}
    for key, kind in every.items():
        given = {key: Variant(kind, VALUES[kind])}
        if key in OPTIONS[member]:
            assert parse_options(member, given) == {key: VALUES[kind]}
        else:
            with pytest.raises(InvalidArgs, match=f"{member} has no option '{key}'"):
                parse_options(member, given)


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
        parse_options("GetStatus", {"client-id": value})


def test_a_key_is_shown_shortened_and_plain() -> None:
    with pytest.raises(InvalidArgs) as caught:
        parse_options("GetStatus", {"\n\u202e" + "k" * 5000: Variant("b", True)})
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
