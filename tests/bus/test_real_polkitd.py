"""The real polkitd decides by the shipped policy file: who, from where, after which dialog."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_dbus.transport import Connection
from hostimage_testing.private_bus import private_bus
from hostimage_testing.real_polkit import (
    ACTIVE,
    INACTIVE,
    NAME,
    PATH,
    POLICY,
    SEATLESS,
    UID,
    Person,
    RealPolkit,
    Session,
    enter_password,
)
from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.bus.authorization import Action
from hostimaged.bus.polkit import Authority, Caller
from hostimaged.errors import AccessDenied, AuthorizationRequired, HostimageError

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="polkitd is started by root, in a mount namespace"),
]

SHIPPED = REPOSITORY_ROOT / "dbus/org.hostimage1.policy"
EXAMPLES = REPOSITORY_ROOT / "dbus/50-org.hostimage1.rules.example"
IMAGE = "docker://registry.example/os/base:1"
PATIENCE = 20.0
#: Results, as a caller sees them who allows no dialog.
YES, ASKS, NO = "yes", "asks", "no"
#: Values of PolkitImplicitAuthorization.
YES_WORD, KEEP_WORD = 5, 4
#: The table of the API.
COLUMNS = {
    Action.CHECK: (ASKS, ASKS, YES),
    Action.UPDATE: (ASKS, ASKS, YES),
    Action.CANCEL: (ASKS, ASKS, YES),
    Action.SWITCH_IMAGE: (ASKS, ASKS, ASKS),
    Action.ROLLBACK: (ASKS, ASKS, ASKS),
    Action.CLEANUP: (ASKS, ASKS, ASKS),
    Action.CONFIGURE: (ASKS, ASKS, ASKS),
}


@dataclass
class World:
    """polkitd, a person's program, and what stands for the daemon."""

    polkit: RealPolkit
    person: Person
    authority: Authority
    connection: Connection

    async def authorize(self, action: Action, *, interactive: bool = False, **details: str) -> None:
        await self.authority.authorize(
            Caller(self.person.name, UID), action, details, interactive=interactive
        )

    async def result(self, action: Action, **details: str) -> str:
        try:
            await self.authorize(action, **details)
        except AuthorizationRequired:
            return ASKS
        except AccessDenied as error:
            return NO if error.message.startswith("not allowed by the system's policy") else error.message
        return YES

    async def results(self) -> dict[Action, str]:
        return {action: await self.result(action) for action in Action}

    def ask(self, action: Action, **details: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.authorize(action, interactive=True, **details))

    async def dialog(self) -> dict[str, object]:
        event = await self.person.next()
        assert event.pop("event") == "begin"
        return event


@pytest.fixture
def polkit(tmp_path: Path) -> Iterator[RealPolkit]:
    """A polkitd with the shipped actions, not started."""
    with private_bus(tmp_path, POLICY) as address:
        yield RealPolkit(tmp_path / "polkit", address, [SHIPPED])


@asynccontextmanager
async def world(
    polkit: RealPolkit, session: Session | None = ACTIVE, **timeouts: float
) -> AsyncIterator[World]:
    async with polkit.running(), asyncio.TaskGroup() as tasks:
        connection = await Connection.connect(polkit.address)
        try:
            with polkit.person(session) as person:
                person.name = (await person.next())["name"]
                assert await connection.unix_user(person.name) == UID
                yield World(polkit, person, Authority(connection, tasks, 0, **timeouts), connection)
        finally:
            await connection.close()


async def failure(task: asyncio.Task[None]) -> HostimageError:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(HostimageError) as raised:
            await task
    return raised.value


@pytest.mark.parametrize(
    ("session", "column"), [(None, 0), (SEATLESS, 0), (INACTIVE, 1), (ACTIVE, 2)], ids=str
)
async def test_the_table(polkit: RealPolkit, session: Session | None, column: int) -> None:
    async with world(polkit, session) as here:
        found = await here.results()
    assert found == {action: columns[column] for action, columns in COLUMNS.items()}


async def test_polkit_reads_the_policy_file_as_it_is_meant(polkit: RealPolkit) -> None:
    """What pkaction would show."""
    async with world(polkit) as here:
        (actions,) = await here.connection.call(
            NAME, PATH, f"{NAME}.Authority", "EnumerateActions", "s", [""]
        )
    assert {action[0] for action in actions} == set(Action)
    for identifier, description, message, vendor, vendor_url, icon, *implicit, extra in actions:
        assert description
        assert message.startswith("Authentication is required to ")
        assert (vendor, vendor_url, icon) == ("hostimaged", "", "")
        assert [word != YES_WORD for word in implicit] == [c != YES for c in COLUMNS[Action(identifier)]]
        keeps = identifier in (Action.ROLLBACK, Action.CLEANUP, Action.CONFIGURE)
        assert (implicit[2] == KEEP_WORD) is keeps
        assert set(extra) <= {"org.freedesktop.policykit.imply"}


async def test_without_the_policy_file_nothing_is_allowed(tmp_path: Path) -> None:
    with private_bus(tmp_path, POLICY) as address:
        polkit = RealPolkit(tmp_path / "polkit", address, [])
        polkit.rules("polkit.addRule(function(action, subject) { return polkit.Result.YES; });")
        async with world(polkit) as here:
            with pytest.raises(AccessDenied, match="polkit could not decide"):
                await here.authorize(Action.CHECK)


@pytest.mark.parametrize(
    ("granted", "implied"),
    [
        (Action.SWITCH_IMAGE, {Action.SWITCH_IMAGE, Action.UPDATE, Action.CHECK}),
        (Action.UPDATE, {Action.UPDATE, Action.CHECK}),
        (Action.CLEANUP, {Action.CLEANUP, Action.CHECK}),
        (Action.CHECK, {Action.CHECK}),
        (Action.ROLLBACK, {Action.ROLLBACK}),
    ],
)
async def test_what_an_action_implies(polkit: RealPolkit, granted: Action, implied: set[Action]) -> None:
    polkit.rules(f'polkit.addRule(function(a, s) {{ if (a.id == "{granted}") return polkit.Result.YES; }});')
    async with world(polkit, None) as here:
        found = await here.results()
    assert {action for action, result in found.items() if result == YES} == implied


async def test_an_administrators_rule_sees_the_details(polkit: RealPolkit) -> None:
    polkit.rules(
        """polkit.addRule(function(action, subject) {
            if (action.lookup("operation") == "switch" && action.lookup("image") == "docker://a/b:1" &&
                action.lookup("deployment") == undefined && subject.user == "person") {
                return polkit.Result.YES;
            }
        });"""
    )
    async with world(polkit, None) as here:
        assert await here.result(Action.SWITCH_IMAGE, operation="switch", image="docker://a/b:1") == YES
        assert await here.result(Action.SWITCH_IMAGE, operation="switch", image="docker://a/b:2") == ASKS
        assert await here.result(Action.SWITCH_IMAGE, operation="pull", image="docker://a/b:1") == ASKS


async def test_a_dialog_shows_what_it_is_about_and_a_password_opens(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        task = here.ask(Action.SWITCH_IMAGE, operation="switch", image=IMAGE)
        dialog = await here.dialog()
        assert dialog["action"] == "org.hostimage1.switch-image"
        assert dialog["message"] == (
            f"Authentication is required to switch this computer to the operating system image {IMAGE}"
        )
        assert not task.done()
        await enter_password(here.connection, dialog)
        here.person.tell("done")
        await task
        # The next image is asked for again.
        assert await here.result(Action.SWITCH_IMAGE, operation="switch", image=IMAGE) == ASKS


async def test_a_password_for_one_step_of_a_repair_serves_for_the_next(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        task = here.ask(Action.ROLLBACK, operation="rollback")
        dialog = await here.dialog()
        assert "which installed version" in str(dialog["message"])
        await enter_password(here.connection, dialog)
        here.person.tell("done")
        await task
        assert await here.result(Action.ROLLBACK, operation="rollback") == YES
        assert await here.result(Action.CONFIGURE) == ASKS


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("done", "the system's policy forbids it, or the authentication failed"),
        ("dismiss", "the request for authentication was dismissed"),
    ],
)
async def test_a_wrong_password_and_a_closed_dialog_refuse(
    polkit: RealPolkit, command: str, message: str
) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        task = here.ask(Action.SWITCH_IMAGE)
        await here.dialog()
        here.person.tell(command)
        refused = await failure(task)
    assert type(refused) is AccessDenied
    assert refused.message.startswith(message)


async def test_without_an_agent_nobody_is_asked(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        refused = await failure(here.ask(Action.SWITCH_IMAGE))
    assert type(refused) is AuthorizationRequired
    assert "no authentication agent" in refused.message


async def test_without_leave_to_ask_the_agent_is_silent(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        assert await here.result(Action.SWITCH_IMAGE) == ASKS
        task = here.ask(Action.CONFIGURE)
        assert (await here.dialog())["action"] == "org.hostimage1.configure"
        here.person.tell("dismiss")
        await failure(task)


async def test_who_walks_away_closes_nothing_and_the_dialog_goes_in_time(polkit: RealPolkit) -> None:
    async with world(polkit, dialog_timeout=0.5) as here:
        await here.person.register_agent()
        task = here.ask(Action.SWITCH_IMAGE)
        dialog = await here.dialog()
        refused = await failure(task)
        assert refused.message.startswith("nobody authorised this in time")
        assert await here.person.next() == {"event": "cancelled", "cookie": dialog["cookie"]}


async def test_a_call_that_is_cancelled_closes_the_dialog(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        task = here.ask(Action.SWITCH_IMAGE)
        dialog = await here.dialog()
        task.cancel()
        assert await here.person.next() == {"event": "cancelled", "cookie": dialog["cookie"]}
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_program_that_is_killed_takes_its_dialog_along(polkit: RealPolkit) -> None:
    async with world(polkit) as here:
        await here.person.register_agent()
        with polkit.person(ACTIVE) as other:
            name = (await other.next())["name"]
            asking = here.authority.authorize(Caller(name, UID), Action.SWITCH_IMAGE, interactive=True)
            task = asyncio.create_task(asking)
            dialog = await here.dialog()
            other.leave()
            refused = await failure(task)
            assert refused.message.startswith("the caller has left the bus")
            assert await here.person.next() == {"event": "cancelled", "cookie": dialog["cookie"]}


async def test_a_polkitd_that_hangs_or_dies_refuses(polkit: RealPolkit) -> None:
    async with world(polkit, silent_timeout=0.5) as here:
        polkit.stop(signal.SIGSTOP)
        with pytest.raises(AccessDenied, match="in time"):
            await here.authorize(Action.CHECK)
        task = asyncio.create_task(here.authorize(Action.CHECK, interactive=True))
        polkit.stop(signal.SIGKILL)
        assert type(await failure(task)) is AccessDenied
        with pytest.raises(AccessDenied, match="polkit is not available"):
            await here.authorize(Action.CHECK)


def examples() -> list[str]:
    """The examples of the rules file, switched on as its first lines say."""
    blocks = re.findall(r"^//polkit.*?^//\}\);$", EXAMPLES.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub("^//", "", block, flags=re.MULTILINE) for block in blocks]


PLAIN_ACTIVE = {action: columns[2] for action, columns in COLUMNS.items()}


class TestExamples:
    """Each example does what its comment says, and the file as it is does nothing."""

    async def test_the_file_as_it_is_changes_nothing(self, polkit: RealPolkit) -> None:
        polkit.rules(EXAMPLES.read_text())
        polkit.user("monitor", "sysupdate", "imagetest")
        async with world(polkit) as here:
            assert await here.results() == PLAIN_ACTIVE
        assert len(examples()) == 5
        log = (polkit.directory / "log").read_text()
        assert "rror" not in log, log

    async def test_a_group_may_update_from_anywhere(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[0])
        polkit.user("person", "sysupdate")
        async with world(polkit, None) as here:
            found = await here.results()
        assert {action for action, result in found.items() if result == YES} == {Action.CHECK, Action.UPDATE}

    async def test_others_may_not(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[0])
        polkit.user("person", "users2")
        async with world(polkit, None) as here:
            assert set((await here.results()).values()) == {ASKS}

    async def test_a_managed_computer(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[1])
        async with world(polkit) as here:
            assert await here.results() == PLAIN_ACTIVE | {Action.UPDATE: ASKS}

    async def test_a_namespace_of_images(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[2])
        polkit.user("person", "imagetest")
        async with world(polkit, None) as here:
            switch = Action.SWITCH_IMAGE
            assert await here.result(switch, operation="switch", image=IMAGE) == YES
            assert await here.result(switch, operation="pull", image=IMAGE) == YES
            assert await here.result(switch, operation="kargs", image=IMAGE) == ASKS
            assert await here.result(switch, operation="switch") == ASKS
            evil = "docker://registry.example/os-evil/base:1"
            assert await here.result(switch, operation="switch", image=evil) == ASKS
            assert await here.result(Action.CONFIGURE, operation="switch", image=IMAGE) == ASKS

    async def test_a_kiosk(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[3])
        async with world(polkit) as here:
            assert await here.results() == dict.fromkeys(Action, NO) | {Action.CHECK: YES}

    async def test_a_monitoring_service(self, polkit: RealPolkit) -> None:
        polkit.rules(examples()[4])
        polkit.user("monitor")
        async with world(polkit, None) as here:
            assert await here.result(Action.CHECK, operation="check") == YES
            assert await here.result(Action.CHECK, operation="explain") == ASKS
            assert await here.result(Action.UPDATE, operation="check") == ASKS
