"""The shipped XML and the daemon's behaviour are the same, for all objects and for other people's tools."""

from __future__ import annotations

import asyncio
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import Emits, load
from hostimage_dbus.names import BUS_NAME, JOB_INTERFACE, JOBS_PATH, MANAGER_INTERFACE, ROOT_PATH
from hostimage_dbus.transport import BusError, Variant
from hostimage_testing.bus import PATIENCE, PROPERTIES, Client, Daemon, error_of, now, plain, steps_until
from hostimage_testing.tools import require, run

INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
SHIPPED = {name: load(f"{name}.xml")[name] for name in (MANAGER_INTERFACE, JOB_INTERFACE)}
#: Budgets are for a quiet machine; see the testing notes.
SLACK = 5


async def _introspect(client: Client, path: str) -> ET.Element:
    (text,) = await client.connection.call(BUS_NAME, path, INTROSPECTABLE, "Introspect")
    return ET.fromstring(text)


async def _job(daemon: Daemon, client: Client) -> str:
    return await client.pull(daemon.script("job", *steps_until(Path("/nonexistent"))))


async def test_introspection_is_the_shipped_file(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await _job(daemon, client)
    for where, name in ((ROOT_PATH, MANAGER_INTERFACE), (path, JOB_INTERFACE)):
        (text,) = await client.connection.call(BUS_NAME, where, INTROSPECTABLE, "Introspect")
        assert SHIPPED[name].xml in text
    assert [node.get("name") for node in (await _introspect(client, "/")).iter("node")][1:] == ["org"]
    assert [node.get("name") for node in (await _introspect(client, ROOT_PATH)).iter("node")][1:] == ["jobs"]
    assert [node.get("name") for node in (await _introspect(client, JOBS_PATH)).iter("node")][1:] == ["_1"]


async def test_every_method_is_there_with_its_signature(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    paths = {MANAGER_INTERFACE: ROOT_PATH, JOB_INTERFACE: await _job(daemon, client)}
    for interface in SHIPPED.values():
        for method in interface.methods.values():
            wrong = error_of(
                client.connection.call(
                    BUS_NAME, paths[interface.name], interface.name, method.name, "xx", [1, 2]
                )
            )
            assert (await wrong).name == ErrorName.INVALID_ARGS, method.name


async def test_every_property_is_there_with_its_type(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    paths = {MANAGER_INTERFACE: ROOT_PATH, JOB_INTERFACE: await _job(daemon, client)}
    for name, interface in SHIPPED.items():
        (values,) = await client.connection.call(BUS_NAME, paths[name], PROPERTIES, "GetAll", "s", [name])
        assert {key: value.signature for key, value in values.items()} == {
            prop.name: prop.signature for prop in interface.properties.values()
        }
        for key in values:
            (value,) = await client.connection.call(
                BUS_NAME, paths[name], PROPERTIES, "Get", "ss", [name, key]
            )
            assert value.signature == interface.properties[key].signature


async def test_annotations_are_true(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    """What a property's annotation says is what happens to it over a job's life and a scan."""
    await daemon.start()
    await client.until(lambda: daemon.process)
    before = await client.properties(ROOT_PATH, MANAGER_INTERFACE)
    seen: dict[str, dict[str, object]] = {ROOT_PATH: dict(before)}
    (daemon.root / "sysroot").mkdir(exist_ok=True)
    (daemon.root / "sysroot/findings.json").write_text(
        '{"repository": {"algorithm": "a", "formats": [], "secure": true, "used": 99},'
        ' "images": [], "problems": [{"id": "i", "text": "t"}]}'
    )
    go = tmp_path / "go"
    steps = [
        {"phase": "pulling"},
        {"totals": [10, 1]},
        {"advance": 5},
        {"generating": [1, 2]},
        {"message": "m"},
    ]
    path = await client.pull(daemon.script("job", *steps, *steps_until(go, result={"changed": True})))
    seen[path] = dict(await client.job(path))
    mark = len(client.signals)
    go.touch()
    await client.removed(path)
    told: dict[str, set[str]] = {ROOT_PATH: set(), path: set()}
    for signal in client.signals[mark:]:
        if signal.member == "PropertiesChanged":
            interface, changed, invalidated = signal.body
            told[signal.path] |= set(changed) | set(invalidated)
            for key in changed:
                assert SHIPPED[interface].properties[key].emits is Emits.TRUE
                seen[signal.path][key] = plain(changed[key])
            for key in invalidated:
                assert SHIPPED[interface].properties[key].emits is Emits.INVALIDATES
                seen[signal.path][key] = (await client.properties(signal.path, interface))[key]
    assert "RepositorySize" in told[ROOT_PATH]
    assert {"Problems", "State", "ActiveJob"} <= told[ROOT_PATH]
    assert {"State", "Result", "Finished", "Cancellable", "Progress"} <= told[path]
    # Whoever followed the signals knows exactly what is true now.
    assert seen[path] == await client.job(path)
    assert {k: v for k, v in seen[ROOT_PATH].items() if k not in ("QueuedJobs", "ActiveJob")} == {
        k: v
        for k, v in (await client.properties(ROOT_PATH, MANAGER_INTERFACE)).items()
        if k not in ("QueuedJobs", "ActiveJob")
    }


async def test_object_manager_speaks_from_the_managers_path(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await _job(daemon, client)
    (objects,) = await client.connection.call(BUS_NAME, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
    assert list(objects) == [path]
    assert list(objects[path]) == [JOB_INTERFACE]
    (added,) = client.named("InterfacesAdded")
    assert added.path == ROOT_PATH
    assert added.body[0] == path
    assert plain(added.body[1][JOB_INTERFACE]["State"]) == "queued"


async def test_peer_answers_everywhere(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    peer = "org.freedesktop.DBus.Peer"
    assert await client.connection.call(BUS_NAME, "/any/where", peer, "Ping") == []
    answers = [
        await asyncio.gather(client.connection.call(name, "/", peer, "GetMachineId"), return_exceptions=True)
        for name in (BUS_NAME, "org.freedesktop.DBus")
    ]
    # The bus's own answer, which is an error on a machine that has no id.
    assert str(answers[0]) == str(answers[1])


@pytest.mark.parametrize("tool", ["busctl", "gdbus"])
async def test_other_tools_can_use_it(daemon: Daemon, client: Client, tool: str) -> None:
    program = require(tool)
    await daemon.start()
    address = daemon.bus.address
    if tool == "busctl":
        shown = run(program, f"--address={address}", "introspect", BUS_NAME, ROOT_PATH).out
        called = run(
            program, f"--address={address}", "call", BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "ListJobs"
        ).out
        assert called == "a(tsso) 0\n"
    else:
        where = ["--address", address, "--dest", BUS_NAME, "--object-path", ROOT_PATH]
        shown = run(program, "introspect", *where).out
        called = run(program, "call", *where, "--method", f"{MANAGER_INTERFACE}.ListJobs").out
        assert called == "(@a(tsso) [],)\n"
    for member in (*SHIPPED[MANAGER_INTERFACE].methods, *SHIPPED[MANAGER_INTERFACE].properties):
        assert member in shown


async def test_name_is_owned_fast_and_status_follows(real_daemon: Daemon, client: Client) -> None:
    best = {"name": 99.0, "status": 99.0}
    for _ in range(3):
        owned = client.owner_appears()
        started = now()
        real_daemon.spawn()
        await owned
        best["name"] = min(best["name"], now() - started)
        await client.status()
        best["status"] = min(best["status"], now() - started)
        await real_daemon.end()
    assert best["name"] < 0.5 * SLACK
    assert best["status"] < 1.0 * SLACK


async def test_calls_during_the_start_are_answered(real_daemon: Daemon, client: Client) -> None:
    """The name is there before the service is: calls wait instead of failing."""
    owned = client.owner_appears()
    real_daemon.spawn()
    await owned
    assert (await client.status())["schema"] == 1
    with pytest.raises(BusError):
        await client.connection.call(BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "Nothing", timeout=PATIENCE)


def test_every_error_name_in_the_interface_exists() -> None:
    known = {name.rpartition(".")[2] for name in ErrorName}
    for interface in SHIPPED.values():
        for line in interface.xml.splitlines():
            text = line.strip()
            if text.startswith("Errors: "):
                names = text.removeprefix("Errors: ").partition("(")[0].split(".")[0]
                assert {n.strip() for n in names.split(",") if n.strip()} <= known


def test_variants_of_the_library_compare_by_value() -> None:
    """The object server relies on it to tell what changed."""
    assert Variant("a{sv}", {"a": Variant("s", "b")}) == Variant("a{sv}", {"a": Variant("s", "b")})
    assert Variant("(ss)", ["a", "b"]) != Variant("(ss)", ["a", "c"])
