"""The dialogue with polkit on a real bus, with a double that does whatever polkit might do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostimage_dbus.transport import BUS, BUS_PATH, BusError, Connection, Limits
from hostimage_testing.polkit_double import POLICY, Answer, Check, PolkitDouble, Reply, polkit_program
from hostimage_testing.private_bus import private_bus
from hostimaged.bus.authorization import Action
from hostimaged.bus.polkit import WAITING_IN_ALL, WAITING_PER_UID, Authority, Caller
from hostimaged.errors import AccessDenied, AuthorizationRequired, HostimageError, LimitsExceeded

PATIENCE = 20.0
_OTHER = """
  <policy context="default">
    <allow own="com.example.Other"/>
    <allow send_destination="com.example.Other"/>
  </policy>
"""


class Service:
    """What stands for the daemon: its connection, and the authority under test."""

    def __init__(self, connection: Connection, tasks: asyncio.TaskGroup, **timeouts: float) -> None:
        self.connection = connection
        self.tasks = tasks
        self.authority = Authority(connection, tasks, own_uid=4242, **timeouts)

    def ask(
        self, caller: Connection, uid: int = 1000, action: Action = Action.UPDATE, *, interactive: bool = True
    ) -> asyncio.Task[None]:
        """Ask in a task of its own, as each call of a client is one."""

        async def asking() -> None:
            await self.authority.authorize(
                Caller(caller.unique_name, uid), action, {"operation": "upgrade"}, interactive=interactive
            )

        return asyncio.create_task(asking())

    @property
    def taken(self) -> int:
        return self.authority._waiting.taken

    async def idle(self) -> None:
        """Wait until no question is left, neither at polkit nor here."""
        async with asyncio.timeout(PATIENCE):
            while self.taken:  # noqa: ASYNC110 (a counter; nothing tells of it)
                await asyncio.sleep(0.01)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with private_bus(tmp_path, POLICY, _OTHER) as running:
        yield running


@asynccontextmanager
async def serving(address: str, **timeouts: float) -> AsyncIterator[Service]:
    connection = await Connection.connect(address)
    try:
        async with asyncio.TaskGroup() as tasks:
            service = Service(connection, tasks, **timeouts)
            yield service
            await service.idle()
    finally:
        await connection.close()


@pytest_asyncio.fixture
async def service(address: str) -> AsyncIterator[Service]:
    async with serving(address) as made:
        yield made


@pytest_asyncio.fixture
async def client(address: str) -> AsyncIterator[Connection]:
    connection = await Connection.connect(address)
    yield connection
    await connection.close()


async def failure(task: asyncio.Task[None]) -> HostimageError:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(HostimageError) as raised:
            await task
    return raised.value


async def match_rules(connection: Connection) -> int:
    """How many rules the bus has of ``connection``."""
    (stats,) = await connection.call(
        BUS, BUS_PATH, "org.freedesktop.DBus.Debug.Stats", "GetConnectionStats", "s", [connection.unique_name]
    )
    return int(stats["MatchRules"].value)


async def test_a_yes_is_a_yes(address: str, service: Service, client: Connection) -> None:
    async with PolkitDouble.connect(address) as polkit:
        await service.ask(client)
        await service.ask(client, action=Action.CHECK, interactive=False)
    first, second = polkit.checks
    assert first.caller == service.connection.unique_name
    assert (first.subject_kind, first.subject) == ("system-bus-name", {"name": client.unique_name})
    assert (first.action, first.details, first.flags) == (
        "org.hostimage1.update",
        {"operation": "upgrade"},
        1,
    )
    assert (second.action, second.flags) == ("org.hostimage1.check", 0)
    assert first.cancellation_id != second.cancellation_id
    assert polkit.cancelled == []


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (Answer.NO, AccessDenied, "the system's policy forbids it, or the authentication failed"),
        (Answer.DISMISSED, AccessDenied, "the request for authentication was dismissed"),
        (Answer.CHALLENGE, AuthorizationRequired, "authentication is required, and no"),
        (Answer.ERROR, AccessDenied, "polkit could not decide"),
        (Answer.CRASH, AccessDenied, "polkit could not decide"),
        (Reply("b", [True]), AccessDenied, "polkit could not decide"),
        (Reply("(bb)", [[True, False]]), AccessDenied, "polkit could not decide"),
        (Reply("(ba{ss})", [[True, {}]]), AccessDenied, "polkit could not decide"),
        (Reply("(uba{ss})", [[1, False, {}]]), AccessDenied, "polkit could not decide"),
        (Reply("(bba{ss})", [[True, True, {}]]), AccessDenied, "polkit could not decide"),
        (Reply("(bba{ss})s", [[True, False, {}], "x"]), AccessDenied, "polkit could not decide"),
    ],
    ids=str,
)
async def test_all_else_is_an_error(
    address: str, client: Connection, service: Service, answer: Any, error: type[Exception], message: str
) -> None:
    async with PolkitDouble.connect(address, answer):
        refused = await failure(service.ask(client))
    assert type(refused) is error
    assert refused.message.startswith(message)


async def test_a_reply_that_is_too_long_is_not_read(
    address: str, client: Connection, service: Service
) -> None:
    long = Reply("(bba{ss})", [[True, False, {"k": "v" * (Limits().reply + 1)}]])
    async with PolkitDouble.connect(address, long):
        refused = await failure(service.ask(client))
    assert refused.message.startswith("polkit could not decide")


async def test_without_polkit_there_is_no_yes(service: Service, client: Connection) -> None:
    refused = await failure(service.ask(client))
    assert type(refused) is AccessDenied
    assert refused.message.startswith("polkit is not available, so only root may do this")


async def test_a_polkit_that_dies_refuses_and_a_new_one_is_asked(
    address: str, service: Service, client: Connection
) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        task = service.ask(client)
        await polkit.until(lambda p: p.hanging)
        polkit.crash()
        assert type(await failure(task)) is AccessDenied
    async with PolkitDouble.connect(address):
        await service.ask(client)


async def test_a_dialog_is_awaited(address: str, service: Service, client: Connection) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        task = service.ask(client)
        await polkit.until(lambda p: p.hanging)
        assert not task.done()
        polkit.settle(Answer.YES)
        await task
        assert polkit.cancelled == []


async def test_a_caller_who_leaves_takes_the_dialog_along(address: str, service: Service) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        leaving = await Connection.connect(address)
        task = service.ask(leaving)
        await polkit.until(lambda p: p.hanging)
        await leaving.close()
        refused = await failure(task)
        await polkit.until(lambda p: p.cancelled)
        await service.idle()
    assert type(refused) is AccessDenied
    assert refused.message.startswith("the caller has left the bus")
    assert polkit.cancelled == [polkit.checks[0].cancellation_id]
    assert await match_rules(service.connection) == 0


async def test_others_who_leave_change_nothing(address: str, service: Service, client: Connection) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        task = service.ask(client)
        await polkit.until(lambda p: p.hanging)
        other = await Connection.connect(address)
        await other.close()
        await service.connection.unix_user(client.unique_name)
        assert not task.done()
        polkit.settle(Answer.YES)
        await task


async def test_a_call_that_is_cancelled_takes_the_dialog_along(
    address: str, service: Service, client: Connection
) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        task = service.ask(client)
        await polkit.until(lambda p: p.hanging)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await polkit.until(lambda p: p.cancelled)
        await service.idle()
    assert await match_rules(service.connection) == 0


async def test_a_call_that_is_cancelled_at_once_asks_nobody(
    address: str, service: Service, client: Connection
) -> None:
    async with PolkitDouble.connect(address, Answer.YES) as polkit:
        task = service.ask(client)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await service.idle()
        assert polkit.checks == []


@pytest.mark.parametrize("interactive", [True, False])
async def test_nobody_waits_for_ever(address: str, client: Connection, interactive: bool) -> None:
    timeouts = {"dialog_timeout": 600.0, "silent_timeout": 600.0}
    timeouts["dialog_timeout" if interactive else "silent_timeout"] = 0.2
    async with (
        serving(address, **timeouts) as service,
        PolkitDouble.connect(address, Answer.HANG) as polkit,
    ):
        refused = await failure(service.ask(client, interactive=interactive))
        await polkit.until(lambda p: p.cancelled)
        await service.idle()
    assert type(refused) is AccessDenied
    assert refused.message == "nobody authorised this in time: org.hostimage1.update"


async def test_a_connection_that_is_lost_refuses(address: str, client: Connection) -> None:
    async with serving(address) as service, PolkitDouble.connect(address, Answer.HANG) as polkit:
        task = service.ask(client)
        await polkit.until(lambda p: p.hanging)
        await service.connection.close()
        assert type(await failure(task)) is AccessDenied


async def test_a_service_that_stops_leaves_nothing_behind(address: str, client: Connection) -> None:
    connection = await Connection.connect(address)
    asked: list[tuple[Service, asyncio.Task[None]]] = []

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            service = Service(connection, tasks)
            asked.append((service, service.ask(client)))
            await asyncio.Event().wait()

    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        running = asyncio.create_task(serve())
        await polkit.until(lambda p: p.hanging)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        service, task = asked[0]
        assert type(await failure(task)) is AccessDenied
        assert service.taken == 0
        await connection.close()


async def test_one_user_has_four_dialogs_and_another_is_served(
    address: str, service: Service, client: Connection
) -> None:
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        tasks = [service.ask(client) for _ in range(WAITING_PER_UID)]
        await polkit.until(lambda p: p.hanging == WAITING_PER_UID)
        refused = await failure(service.ask(client))
        assert type(refused) is LimitsExceeded
        other = service.ask(client, uid=1001)
        await polkit.until(lambda p: p.hanging == WAITING_PER_UID + 1)
        await service.ask(client, uid=0)
        polkit.settle(Answer.YES)
        await asyncio.gather(*tasks, other)
        polkit.answer = Answer.YES
        await service.ask(client)


async def test_so_many_dialogs_in_all(address: str, service: Service, client: Connection) -> None:
    uids = [1000 + number // WAITING_PER_UID for number in range(WAITING_IN_ALL)]
    async with PolkitDouble.connect(address, Answer.HANG) as polkit:
        tasks = [service.ask(client, uid) for uid in uids]
        await polkit.until(lambda p: p.hanging == WAITING_IN_ALL)
        assert type(await failure(service.ask(client, uid=5000))) is LimitsExceeded
        await service.ask(client, uid=0)
        await service.ask(client, uid=4242)
        polkit.settle(Answer.NO)
        refusals = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(refusal) for refusal in refusals] == [AccessDenied] * WAITING_IN_ALL
    assert await match_rules(service.connection) == 0


async def test_users_who_come_and_go_cannot_use_up_our_replies(
    address: str, client: Connection, service: Service
) -> None:
    """A polkit that answers nothing at all: the bus counts each of its replies as pending, 128 in all."""
    async with PolkitDouble.connect(address, Answer.DEAF) as polkit:
        outcomes: list[type[BaseException] | None] = []
        for number in range(2 * WAITING_IN_ALL):
            async with AsyncExitStack() as stack:
                leaving = await Connection.connect(address)
                stack.push_async_callback(leaving.close)
                task = service.ask(leaving, uid=1000 + number)
                if number < WAITING_IN_ALL:
                    await polkit.until(lambda p, wanted=number + 1: p.hanging == wanted)  # type: ignore[misc]
            outcomes.append(type(await failure(task)))
        assert outcomes == [AccessDenied] * WAITING_IN_ALL + [LimitsExceeded] * WAITING_IN_ALL
        # Root's work goes on: other services are still asked and answer.
        other = await Connection.connect(address)
        other.set_handler(lambda call: other.reply(call, "s", ["here"]))
        await other.request_name("com.example.Other")
        silent = [
            asyncio.create_task(service.connection.call("com.example.Other", "/", "com.example", "Wait"))
            for _ in range(20)
        ]
        assert await asyncio.gather(*silent) == [["here"]] * 20
        await other.close()
        assert service.taken == WAITING_IN_ALL
        polkit.crash()
        await service.idle()
    async with PolkitDouble.connect(address):
        await service.ask(client)


@pytest.fixture
def refusing_program(address: str, tmp_path: Path) -> Iterator[Callable[[], list[Check]]]:
    """A double in a process of its own; what tells the checks it got."""
    with polkit_program(address, Answer.NO, tmp_path / "checks") as checks:
        yield checks


async def test_the_double_as_a_program(
    refusing_program: Callable[[], list[Check]], service: Service, client: Connection
) -> None:
    assert refusing_program() == []
    assert type(await failure(service.ask(client))) is AccessDenied
    (check,) = refusing_program()
    assert (check.action, check.subject) == ("org.hostimage1.update", {"name": client.unique_name})


async def test_the_double_refuses_what_polkit_does_not_understand(address: str, client: Connection) -> None:
    async with PolkitDouble.connect(address) as polkit:
        with pytest.raises(BusError):
            await client.call(
                "org.freedesktop.PolicyKit1", "/", "org.freedesktop.PolicyKit1.Authority", "Nothing"
            )
        polkit.faults.clear()
