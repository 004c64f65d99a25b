"""How polkit's replies are understood, and what it is asked. The dialogue is in tests/bus/test_polkit.py."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimage_dbus.transport import BusError
from hostimaged.bus import polkit
from hostimaged.bus.authorization import Action, LogindAction
from hostimaged.bus.polkit import Authority, Caller
from hostimaged.errors import AccessDenied, AuthorizationRequired, HostimageError, InvalidArgs

USER = Caller(":1.42", 1000)
OWN_UID = 900


class FakeBus:
    """Stands for the connection: answers CheckAuthorization with ``reply``, which may be an exception."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.calls: list[tuple[str, list[Any]]] = []
        self.rules: list[str] = []

    async def call(
        self, destination: str, path: str, interface: str, member: str, signature: str, body: Any, **_: Any
    ) -> Any:
        assert destination == "org.freedesktop.PolicyKit1"
        self.calls.append((member, body))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    async def add_match(self, rule: str) -> None:
        self.rules.append(rule)

    async def remove_match(self, rule: str) -> None:
        self.rules.remove(rule)

    def on_signal(self, _callback: Any) -> Any:
        return lambda: None


async def ask(reply: Any, caller: Caller = USER, *, interactive: bool = False, **details: str) -> FakeBus:
    bus = FakeBus(reply)
    given = {key.replace("_", "-"): value for key, value in details.items()}
    async with asyncio.TaskGroup() as tasks:
        authority = Authority(bus, tasks, OWN_UID)  # type: ignore[arg-type]
        failure = None
        try:
            await authority.authorize(caller, Action.SWITCH_IMAGE, given, interactive=interactive)
        except HostimageError as error:
            failure = error
    assert bus.rules == []
    if failure:
        raise failure
    return bus


GRANTED = [[True, False, {}]]


async def test_the_question_names_subject_action_details_and_flags() -> None:
    bus = await ask(GRANTED, operation="upgrade", deployment="abc", image_digest="sha256:0")
    ((member, body),) = bus.calls
    assert member == "CheckAuthorization"
    (kind, subject), action, details, flags, cancellation_id = body
    assert (kind, subject["name"].signature, subject["name"].value) == ("system-bus-name", "s", ":1.42")
    assert action == "org.hostimage1.switch-image"
    assert details == {"operation": "upgrade", "deployment": "abc", "image-digest": "sha256:0"}
    assert flags == 0
    assert cancellation_id
    (_, body) = (await ask(GRANTED, interactive=True)).calls[0]
    assert body[3] == 1


@pytest.mark.parametrize("uid", [0, OWN_UID])
async def test_root_and_our_own_user_are_not_asked_about(uid: int) -> None:
    bus = await ask(BusError("x.y", "no polkit here"), Caller(":1.7", uid))
    assert bus.calls == []


@pytest.mark.parametrize("details", [{}, {"polkit.retains_authorization_after_challenge": "1"}])
async def test_a_challenge_says_that_authentication_is_needed(details: dict[str, str]) -> None:
    with pytest.raises(AuthorizationRequired) as silent:
        await ask([[False, True, details]])
    assert silent.value.message == "authentication is required: org.hostimage1.switch-image"
    with pytest.raises(AuthorizationRequired, match="no authentication agent"):
        await ask([[False, True, details]], interactive=True)
    with pytest.raises(AccessDenied, match="or the authentication failed"):
        await ask([[False, False, {}]], interactive=True)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([[False, False, {}]], "not allowed by the system's policy: org.hostimage1.switch-image"),
        ([[False, False, {"polkit.dismissed": "true"}]], "the request for authentication was dismissed"),
        (BusError("org.freedesktop.DBus.Error.ServiceUnknown", "x"), "polkit is not available"),
        (BusError("org.freedesktop.DBus.Error.Spawn.ChildExited", "x"), "polkit is not available"),
        (BusError("org.freedesktop.systemd1.UnitMasked", "x"), "polkit is not available"),
        (BusError("org.freedesktop.DBus.Error.NoReply", "x"), "polkit could not decide"),
        (BusError("org.freedesktop.DBus.Error.LimitsExceeded", "x"), "polkit could not decide"),
        (BusError("org.freedesktop.PolicyKit1.Error.Failed", "secret"), "polkit could not decide"),
        (BusError("org.freedesktop.PolicyKit1.Error.NotAuthorized", "x"), "polkit could not decide"),
    ],
)
async def test_everything_else_is_a_refusal(reply: Any, message: str) -> None:
    with pytest.raises(AccessDenied) as refused:
        await ask(reply)
    assert refused.value.message.startswith(message)
    assert "secret" not in refused.value.message


@pytest.mark.parametrize(
    "reply",
    [
        [],
        [True],
        [True, False, {}],
        [[True]],
        [[True, False]],
        [[True, False, {}], "more"],
        [[True, False, {}, "more"]],
        [[1, 0, {}]],
        [["true", "", {}]],
        [[True, 0, {}]],
        [[True, None, {}]],
        [[True, False, []]],
        [[True, False, {"a": 1}]],
        [[True, False, {1: "a"}]],
        [[True, True, {}]],
        [{"authorized": True}],
        ["yes"],
        None,
    ],
)
async def test_a_reply_of_another_form_is_a_refusal(reply: Any) -> None:
    with pytest.raises(AccessDenied, match="polkit could not decide"):
        await ask(reply)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c, max_size=4)))
async def test_no_reply_but_a_yes_is_a_yes(reply: Any) -> None:
    with pytest.raises(AccessDenied):
        await ask(reply)


@pytest.mark.parametrize(
    ("operation", "begins"),
    [
        ("check", "Authentication is required to look up "),
        ("pull", "Authentication is required to download "),
        ("stage", "Authentication is required to prepare "),
        ("upgrade", "Authentication is required to update "),
        ("switch", "Authentication is required to switch "),
    ],
)
async def test_a_dialog_names_the_image(operation: str, begins: str) -> None:
    bus = await ask(GRANTED, operation=operation, image="docker://registry.example:5000/os:1.2_3")
    message = bus.calls[0][1][2]["polkit.message"]
    assert message.startswith(begins)
    assert message.count("$(") == message.count("$(image)") == 1


@pytest.mark.parametrize(
    "details",
    [
        {"operation": "switch"},
        {"operation": "rollback", "image": "docker://registry.example/os:1"},
        {"image": "docker://registry.example/os:1"},
        {"operation": "switch", "image": "oci:/srv/<b>your bank</b>"},
        {"operation": "switch", "image": "oci:/srv/" + "x" * 200},
    ],
)
async def test_a_dialog_shows_no_image_that_could_mislead(details: dict[str, str]) -> None:
    bus = await ask(GRANTED, **details)
    assert bus.calls[0][1][2] == details


async def test_the_dialog_of_a_reboot_is_logind_s() -> None:
    bus = FakeBus(GRANTED)
    details = {"operation": "switch", "image": "docker://registry.example/os:1"}
    async with asyncio.TaskGroup() as tasks:
        authority = Authority(bus, tasks, OWN_UID)  # type: ignore[arg-type]
        await authority.authorize(USER, LogindAction.REBOOT, details, interactive=True)
    assert bus.calls[0][1][1:3] == ["org.freedesktop.login1.reboot", details]


@pytest.mark.parametrize(
    "details",
    [
        {"image": "a\nb"},
        {"image": "a\u202eb"},
        {"image": "a\udc80b"},
        {"image": "x" * 4097},
        {"polkit.message": "Enter your password"},
        {"Image": "x"},
        {"": "x"},
        {f"k{number}": "x" for number in range(17)},
    ],
)
async def test_details_that_do_not_fit_a_dialog_are_refused(details: dict[str, str]) -> None:
    with pytest.raises(InvalidArgs):
        await ask(GRANTED, **details)


@pytest.mark.parametrize("name", ["", "org.example.Name", ":1.42','x", ":1.4 2", ":" + "1" * 300])
async def test_only_a_unique_name_says_who_calls(name: str) -> None:
    with pytest.raises(AccessDenied, match="unique name"):
        await ask(GRANTED, Caller(name, 1000))


@pytest.mark.parametrize(
    ("signal", "leaves"),
    [
        (("NameOwnerChanged", [":1.42", ":1.42", ""], "org.freedesktop.DBus"), True),
        (("NameOwnerChanged", [":1.42", ":1.42", ""], ":1.66"), False),
        (("NameOwnerChanged", [":1.421", ":1.421", ""], "org.freedesktop.DBus"), False),
        (("NameOwnerChanged", [":1.42", "", ":1.42"], "org.freedesktop.DBus"), False),
        (("NameLost", [":1.42", ":1.42", ""], "org.freedesktop.DBus"), False),
    ],
)
async def test_only_the_bus_says_that_a_caller_left(signal: Any, leaves: bool) -> None:
    class Signalling(FakeBus):
        def on_signal(self, callback: Any) -> Any:
            member, body, sender = signal
            callback("/org/freedesktop/DBus", "org.freedesktop.DBus", member, body, sender)
            return lambda: None

    bus = Signalling(GRANTED)
    async with asyncio.TaskGroup() as tasks:
        authority = Authority(bus, tasks, OWN_UID)  # type: ignore[arg-type]
        if leaves:
            with pytest.raises(AccessDenied, match="has left the bus"):
                await authority.authorize(USER, Action.CHECK, interactive=False)
        else:
            await authority.authorize(USER, Action.CHECK, interactive=False)
    assert bool(bus.calls) is not leaves


@pytest.mark.parametrize("where", ["call", "add_match", "remove_match"])
async def test_a_mistake_of_ours_is_a_refusal_and_no_more(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = Mock()
    monkeypatch.setattr(polkit, "_logger", logged)

    class Broken(FakeBus):
        async def add_match(self, rule: str) -> None:
            if where == "add_match":
                raise ZeroDivisionError

        async def remove_match(self, rule: str) -> None:
            if where == "remove_match":
                raise ZeroDivisionError

    bus = Broken(ZeroDivisionError() if where == "call" else [[False, False, {}]])
    async with asyncio.TaskGroup() as tasks:
        authority = Authority(bus, tasks, OWN_UID)  # type: ignore[arg-type]
        for _ in range(10):
            with pytest.raises(AccessDenied):
                await authority.authorize(USER, Action.CHECK, interactive=False)
    assert logged.exception.called


async def test_a_service_that_stops_refuses() -> None:
    bus = FakeBus(GRANTED)
    async with asyncio.TaskGroup() as tasks:
        authority = Authority(bus, tasks, OWN_UID)  # type: ignore[arg-type]
    for _ in range(10):
        with pytest.raises(AccessDenied, match="stopping"):
            await authority.authorize(USER, Action.CHECK, interactive=False)
    assert bus.calls == []
