"""The object server over a connection that records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import Emits, load_shipped, parse
from hostimage_dbus.names import PROPERTIES_INTERFACE
from hostimage_dbus.server import CALLS_PER_SENDER, Export, ObjectServer
from hostimage_dbus.transport import BusError, MethodCall, Variant

XML = """<node>
  <interface name="org.example.One">
    <method name="Echo">
      <arg name="a" type="s" direction="in"/>
      <arg name="b" type="s" direction="out"/>
    </method>
    <method name="Wait"/>
    <signal name="Done"><arg name="n" type="u"/></signal>
    <property name="Const" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <property name="Loud" type="i" access="read"/>
    <property name="Quiet" type="i" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
    </property>
    <property name="Size" type="t" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="invalidates"/>
    </property>
  </interface>
</node>"""
ONE = parse(XML)["org.example.One"]
INTERFACES = load_shipped() | {ONE.name: ONE}
VALUES = {"Const": "c", "Loud": 1, "Quiet": 2, "Size": 3}
ROOT = "/org/example"


class FakeConnection:
    """Records what is sent."""

    def __init__(self) -> None:
        self.congested = False
        self.serial = 0
        self.signals: list[tuple[str, str, list[Any]]] = []
        self.answers: list[tuple[int, Any]] = []
        self.handler: Callable[[MethodCall], None] = lambda _: None

    def set_handler(self, handler: Callable[[MethodCall], None]) -> None:
        self.handler = handler

    def emit(self, path: str, interface: str, member: str, signature: str, body: Sequence[Any]) -> None:
        del interface, signature
        self.signals.append((path, member, list(body)))

    def reply(self, call: MethodCall, signature: str = "", body: Sequence[Any] = ()) -> None:
        del signature
        self.answers.append((call.serial, list(body)))

    def reply_error(self, call: MethodCall, name: str, text: str) -> None:
        self.answers.append((call.serial, (str(name), text)))

    async def answered(self, count: int) -> None:
        """Let the loop run until ``count`` answers were given."""
        for _ in range(1000):
            if len(self.answers) >= count:
                return
            await asyncio.sleep(0)
        raise AssertionError(self.answers)

    def ask(self, member: str, signature: str = "", *body: Any, **changes: Any) -> Any:
        """Send a call; the answer if there is one at once."""
        self.serial += 1
        serial = self.serial
        fields = {
            "path": ROOT, "interface": ONE.name, "member": member, "signature": signature, "body": list(body),
            "sender": ":1.1", "serial": serial, "no_reply": False, "interactive": False, "oversize": False,
        } | changes  # fmt: skip
        self.handler(MethodCall(**fields))
        return dict(self.answers).get(serial)


class Fixture:
    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.connection = FakeConnection()
        self.server = ObjectServer(
            self.connection,  # type: ignore[arg-type]
            ROOT,
            tasks,
            INTERFACES,
            self.translate,
        )
        self.go = asyncio.Event()
        self.fault: Exception | None = None
        self.export = Export(ONE, VALUES, {"Echo": self.echo, "Wait": self.wait})
        self.server.export(ROOT, self.export)
        self.server.start()

    @staticmethod
    def translate(error: Exception) -> BusError | None:
        return BusError("org.example.Error.Known", str(error)) if isinstance(error, KeyError) else None

    def echo(self, call: MethodCall) -> Sequence[Any]:
        if self.fault:
            raise self.fault
        return call.body

    async def wait(self, call: MethodCall) -> Sequence[Any]:
        del call
        await self.go.wait()
        if self.fault:
            raise self.fault
        return []


@pytest_asyncio.fixture
async def fixture() -> AsyncIterator[Fixture]:
    async with asyncio.TaskGroup() as tasks:
        made = Fixture(tasks)
        yield made
        made.go.set()


def test_emits_is_parsed() -> None:
    assert {p.name: p.emits for p in ONE.properties.values()} == {
        "Const": Emits.CONST,
        "Loud": Emits.TRUE,
        "Quiet": Emits.FALSE,
        "Size": Emits.INVALIDATES,
    }


@pytest.mark.parametrize(
    ("values", "methods"),
    [
        ({"Const": "c"}, {"Echo", "Wait"}),
        (VALUES | {"More": 1}, {"Echo", "Wait"}),
        (VALUES, {"Echo"}),
        (VALUES, {"Echo", "Wait", "More"}),
    ],
)
def test_an_export_covers_its_interface_exactly(values: dict[str, Any], methods: set[str]) -> None:
    with pytest.raises(ValueError, match="do not match"):
        Export(ONE, values, dict.fromkeys(methods, lambda _: []))


async def test_changes_are_told_as_annotated_and_once(fixture: Fixture) -> None:
    fixture.server.change(ROOT, ONE.name, {"Loud": 5, "Quiet": 6, "Size": 7, "Const": "c"})
    fixture.server.change(ROOT, ONE.name, {"Loud": 5, "Size": 7})
    fixture.server.change(ROOT, ONE.name, {"Quiet": 8})
    ((path, member, body),) = fixture.connection.signals
    assert (path, member) == (ROOT, "PropertiesChanged")
    interface, changed, invalidated = body
    assert interface == ONE.name
    assert {key: value.value for key, value in changed.items()} == {"Loud": 5}
    assert invalidated == ["Size"]


async def test_a_constant_does_not_change(fixture: Fixture) -> None:
    with pytest.raises(ValueError, match="constant"):
        fixture.server.change(ROOT, ONE.name, {"Const": "d"})


async def test_progress_waits_for_a_slow_bus_and_is_not_lost(fixture: Fixture) -> None:
    fixture.connection.congested = True
    fixture.server.change(ROOT, ONE.name, {"Loud": 5}, droppable=True)
    fixture.server.change(ROOT, ONE.name, {"Loud": 6}, droppable=True)
    assert fixture.connection.signals == []
    fixture.server.change(ROOT, ONE.name, {"Size": 9})
    ((_, _, body),) = fixture.connection.signals
    assert body[1]["Loud"].value == 6
    assert body[2] == ["Size"]


async def test_objects_come_and_go_on_the_managers_path(fixture: Fixture) -> None:
    child = ROOT + "/child/_1"
    fixture.server.export(child, Export(ONE, VALUES, {"Echo": fixture.echo, "Wait": fixture.wait}))
    with pytest.raises(ValueError, match="already"):
        fixture.server.export(child)
    manager = "org.freedesktop.DBus.ObjectManager"
    (objects,) = fixture.connection.ask("GetManagedObjects", interface=manager)
    assert list(objects) == [child]
    fixture.server.unexport(child)
    assert fixture.connection.ask("GetManagedObjects", interface=manager) == [{}]
    added, removed = fixture.connection.signals
    assert added[:2] == (ROOT, "InterfacesAdded")
    assert added[2][0] == child
    assert removed == (ROOT, "InterfacesRemoved", [child, [ONE.name]])
    gone = fixture.connection.ask("Echo", "s", "x", path=child)
    assert gone[0] == ErrorName.UNKNOWN_OBJECT


async def test_errors_of_handlers(fixture: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    assert fixture.connection.ask("Echo", "s", "x") == ["x"]
    fixture.fault = KeyError("known")
    assert fixture.connection.ask("Echo", "s", "x")[0] == "org.example.Error.Known"
    fixture.fault = RuntimeError("secret")
    name, text = fixture.connection.ask("Echo", "s", "x")
    assert name == ErrorName.INTERNAL
    assert "secret" not in text
    assert "secret" in caplog.text
    assert fixture.connection.ask("Wait") is None
    fixture.go.set()
    await fixture.connection.answered(4)
    assert fixture.connection.answers[-1][1][0] == ErrorName.INTERNAL


async def test_waiting_calls_are_limited_per_sender(fixture: Fixture) -> None:
    for _ in range(CALLS_PER_SENDER):
        assert fixture.connection.ask("Wait") is None
    assert fixture.connection.ask("Wait")[0] == ErrorName.LIMITS_EXCEEDED
    fixture.connection.ask("Wait", sender=":1.2")
    fixture.go.set()
    await fixture.connection.answered(CALLS_PER_SENDER + 2)
    assert fixture.connection.ask("Wait") is None
    await fixture.connection.answered(CALLS_PER_SENDER + 3)


async def test_a_cancelled_call_is_answered() -> None:
    connections = []

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            fixture = Fixture(tasks)
            connections.append(fixture.connection)
            fixture.connection.ask("Wait")
            await asyncio.Event().wait()

    service = asyncio.ensure_future(serve())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    service.cancel()
    await asyncio.wait([service])
    assert [answer[0] for _, answer in connections[0].answers] == [ErrorName.CANCELLED]


class _Stop(Exception):
    pass


async def test_calls_are_answered_when_the_service_stops_before_they_began() -> None:
    """And those that come after that, with nothing about it in the journal."""
    fixtures = []

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            fixtures.append(Fixture(tasks))
            fixtures[0].connection.ask("Wait")
            raise _Stop

    with pytest.raises(ExceptionGroup):
        await serve()
    (fixture,) = fixtures
    late = fixture.connection.ask("Wait")
    stopping = (str(ErrorName.CANCELLED), "the service is stopping")
    assert late == stopping
    assert [answer for _, answer in fixture.connection.answers] == [stopping, stopping]
    assert not fixture.server._waiting


@pytest.mark.parametrize(
    ("member", "signature", "body", "changes", "name"),
    [
        ("Nothing", "", [], {}, "UnknownMethod"),
        ("Echo", "u", [1], {}, "InvalidArgs"),
        ("Echo", "s", ["x"], {"interface": "a.b"}, "UnknownInterface"),
        ("Echo", "s", ["x"], {"path": "/other"}, "UnknownObject"),
        ("Echo", "s", ["x"], {"oversize": True}, "LimitsExceeded"),
        ("Nothing", "", [], {"interface": None}, "UnknownMethod"),
        ("Get", "ss", [ONE.name, "Nothing"], {"interface": PROPERTIES_INTERFACE}, "UnknownProperty"),
        ("Get", "ss", ["a.b", "Loud"], {"interface": PROPERTIES_INTERFACE}, "UnknownInterface"),
        ("Set", "ssv", [ONE.name, "Loud", None], {"interface": PROPERTIES_INTERFACE}, "PropertyReadOnly"),
        ("GetAll", "s", [ONE.name], {"interface": PROPERTIES_INTERFACE, "path": "/org"}, "UnknownInterface"),
        (
            "GetManagedObjects",
            "",
            [],
            {"interface": "org.freedesktop.DBus.ObjectManager", "path": "/"},
            "UnknownInterface",
        ),
    ],
)
async def test_refusals(
    fixture: Fixture, member: str, signature: str, body: list[Any], changes: dict[str, Any], name: str
) -> None:
    fixture.connection.ask(member, signature, *body, **changes)
    await fixture.connection.answered(1)
    answer = fixture.connection.answers[0][1]
    assert answer[0] == f"org.freedesktop.DBus.Error.{name}"


WRITABLE = parse("""<node>
  <interface name="org.example.Two">
    <property name="Level" type="s" access="readwrite">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
    </property>
  </interface>
</node>""")["org.example.Two"]


async def test_a_property_that_can_be_written(fixture: Fixture) -> None:
    written: list[tuple[str, str]] = []

    async def write(call: MethodCall, value: str) -> None:
        if value == "bad":
            raise KeyError(value)
        written.append((call.sender, value))
        fixture.server.change("/two", WRITABLE.name, {"Level": value})

    with pytest.raises(ValueError, match="setters do not match"):
        Export(WRITABLE, {"Level": "info"}, {})
    with pytest.raises(ValueError, match="setters do not match"):
        Export(ONE, VALUES, {"Echo": fixture.echo, "Wait": fixture.wait}, {"Loud": write})
    fixture.server.export("/two", Export(WRITABLE, {"Level": "info"}, {}, {"Level": write}))
    for value in (Variant("s", "debug"), Variant("u", 1), Variant("s", "bad")):
        fixture.connection.ask(
            "Set", "ssv", WRITABLE.name, "Level", value, interface=PROPERTIES_INTERFACE, path="/two"
        )
    await fixture.connection.answered(3)
    answers = dict(fixture.connection.answers)
    assert answers[1] == []
    assert answers[2][0] == ErrorName.INVALID_ARGS
    assert answers[3][0] == "org.example.Error.Known"
    assert written == [(":1.1", "debug")]
    got = fixture.connection.ask(
        "Get", "ss", WRITABLE.name, "Level", interface=PROPERTIES_INTERFACE, path="/two"
    )
    assert got[0].value == "debug"
    # Its annotation promises no signal.
    assert fixture.connection.signals == []


async def test_properties_without_an_interface_mean_all(fixture: Fixture) -> None:
    (values,) = fixture.connection.ask("GetAll", "s", "", interface=PROPERTIES_INTERFACE)
    assert {key: value.value for key, value in values.items()} == VALUES
    assert fixture.connection.ask("Get", "ss", "", "Loud", interface=PROPERTIES_INTERFACE)[0].value == 1
    assert fixture.connection.ask("GetAll", "s", PROPERTIES_INTERFACE, interface=PROPERTIES_INTERFACE) == [{}]


async def test_signals_have_the_interfaces_signature(fixture: Fixture) -> None:
    fixture.server.emit(ROOT, ONE.name, "Done", 5)
    assert fixture.connection.signals == [(ROOT, "Done", [5])]
    with pytest.raises(KeyError):
        fixture.server.emit(ROOT, ONE.name, "Undone", 5)
