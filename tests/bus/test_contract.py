"""The shipped XML and the daemon's behaviour are the same, for all objects and for other people's tools."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import Emits, Interface, load
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    JOB_INTERFACE,
    JOBS_PATH,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    ROOT_PATH,
    deployment_path,
)
from hostimage_dbus.transport import BusError, Variant
from hostimage_testing.bus import PATIENCE, PROPERTIES, Bus, Client, Daemon, error_of, now, plain, steps_until
from hostimage_testing.tools import absent, require, run
from hostimage_testing.users import NEEDS_ROOT, SOMEBODY, user
from hostimaged.bus.authorization import Action, Facts, Member, required
from hostimaged.bus.options import OPTIONS

INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
INTERFACES = (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE, JOB_INTERFACE, LOG_CONTROL_INTERFACE)
SHIPPED = {name: load(f"{name}.xml")[name] for name in INTERFACES}
DEPLOYMENT = "a" * 64
#: About as much work for a processor as the start of the daemon.
CONTROL = "for _ in range(10_000_000): pass"


async def _introspect(client: Client, path: str) -> ET.Element:
    (text,) = await client.connection.call(BUS_NAME, path, INTROSPECTABLE, "Introspect")
    return ET.fromstring(text)


async def _job(daemon: Daemon, client: Client) -> str:
    return await client.pull(daemon.script("job", *steps_until(Path("/nonexistent"))))


async def _one_of_each(daemon: Daemon, client: Client) -> dict[str, str]:
    """Start with a deployment and a job; gives the path of an object of each interface."""
    daemon.findings(deployments=[{"id": DEPLOYMENT}])
    await daemon.start()
    await client.until(lambda: client.named("InterfacesAdded"))
    return {
        MANAGER_INTERFACE: ROOT_PATH,
        DEPLOYMENT_INTERFACE: deployment_path(DEPLOYMENT),
        JOB_INTERFACE: await _job(daemon, client),
        LOG_CONTROL_INTERFACE: LOG_CONTROL_PATH,
    }


async def test_introspection_is_the_shipped_file(daemon: Daemon, client: Client) -> None:
    for name, where in (await _one_of_each(daemon, client)).items():
        (text,) = await client.connection.call(BUS_NAME, where, INTROSPECTABLE, "Introspect")
        assert SHIPPED[name].xml in text
    assert [node.get("name") for node in (await _introspect(client, "/")).iter("node")][1:] == ["org"]
    below = [node.get("name") for node in (await _introspect(client, ROOT_PATH)).iter("node")][1:]
    assert below == ["deployments", "jobs"]
    assert [node.get("name") for node in (await _introspect(client, JOBS_PATH)).iter("node")][1:] == ["_1"]


async def test_every_method_is_there_with_its_signature(daemon: Daemon, client: Client) -> None:
    paths = await _one_of_each(daemon, client)
    for interface in SHIPPED.values():
        for method in interface.methods.values():
            wrong = error_of(
                client.connection.call(
                    BUS_NAME, paths[interface.name], interface.name, method.name, "xx", [1, 2]
                )
            )
            assert (await wrong).name == ErrorName.INVALID_ARGS, method.name


async def test_every_property_is_there_with_its_type(daemon: Daemon, client: Client) -> None:
    paths = await _one_of_each(daemon, client)
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
    mark = len(client.signals)
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


# Introspects, calls, watches a property and the object manager through GLib's proxies; prints what it saw.
_GLIB = """
import json, sys
from gi.repository import Gio, GLib
address, image = sys.argv[1:]
flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
bus = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
manager = Gio.DBusProxy.new_sync(
    bus, Gio.DBusProxyFlags.NONE, None, "org.hostimage1", "/org/hostimage1", "org.hostimage1.Manager", None)
objects = Gio.DBusObjectManagerClient.new_sync(
    bus, Gio.DBusObjectManagerClientFlags.NONE, "org.hostimage1", "/org/hostimage1", None, None, None)
loop = GLib.MainLoop()
seen = {"version": manager.get_cached_property("Version").unpack(), "added": [], "states": []}
objects.connect("object-added", lambda _, found: seen["added"].append(found.get_object_path()))
def changed(_proxy, values, _invalidated):
    seen["states"] += [values.unpack()["State"]] if "State" in values.unpack() else []
manager.connect("g-properties-changed", changed)
def signal(_proxy, _sender, name, arguments):
    if name == "JobRemoved":
        seen["removed"] = arguments.unpack()[3]
        GLib.timeout_add(200, loop.quit)
manager.connect("g-signal", signal)
seen["job"] = manager.call_sync("Pull", GLib.Variant("(sa{sv})", (image, {})), 0, 20000, None).unpack()[0]
GLib.timeout_add_seconds(20, loop.quit)
loop.run()
print(json.dumps(seen))
"""


async def test_glib_can_use_it(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    python = "/usr/bin/python3"
    if run(python, "-c", "from gi.repository import Gio", check=False).code:
        absent("python3-gi is not installed")
    await daemon.start()
    image = daemon.script("image", {"phase": "pulling"}, {"result": {}})
    script = tmp_path / "glib.py"
    script.write_text(_GLIB)
    seen = json.loads(run(python, str(script), daemon.bus.address, image).out)
    assert seen["version"] == (await client.status())["daemon"]["version"]
    assert seen["added"] == [seen["job"]]
    assert seen["states"][-2:] == ["pulling", "idle"]
    assert seen["removed"] == "done"


async def test_gdbus_watches_properties(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    program = await asyncio.create_subprocess_exec(
        require("gdbus"), "monitor", "--address", daemon.bus.address, "--dest", BUS_NAME,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert program.stdout is not None
        while b"is owned by" not in (line := await program.stdout.readline()):
            assert line
        path = await client.pull(daemon.script("image", {"result": {}}))
        told = [(await program.stdout.readline()).decode()]
        while "JobRemoved" not in told[-1]:
            told.append((await program.stdout.readline()).decode())
    finally:
        program.kill()
        await program.communicate()
    manager = f"{ROOT_PATH}: org.freedesktop.DBus."
    assert told[0].startswith(f"{manager}ObjectManager.InterfacesAdded (objectpath '{path}'")
    changed = [line for line in told if line.startswith(f"{manager}Properties.PropertiesChanged")]
    assert any("'ActiveJob': <objectpath '/'>" in line for line in changed)


async def test_busctl_watches_properties_and_objects(daemon: Daemon, client: Client) -> None:
    """As debuggers see it, who become monitors of the bus: every signal, each from its right path."""
    await daemon.start()
    busctl = [require("busctl"), f"--address={daemon.bus.address}", "--json=short"]
    program = await asyncio.create_subprocess_exec(
        *busctl, "monitor", BUS_NAME, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    seen: list[tuple[str, str]] = []
    path = ""
    try:
        assert program.stdout is not None
        assert program.stderr is not None
        async with asyncio.timeout(PATIENCE):
            assert b"Monitoring bus message stream" in await program.stderr.readline()
            path = await client.pull(daemon.script("image", {"phase": "pulling"}, {"result": {}}))
            while not seen or seen[-1][1] != "JobRemoved":
                message = json.loads(await program.stdout.readline())
                if message["type"] == "signal":
                    seen.append((message["path"], message["member"]))
    finally:
        program.kill()
        await program.communicate()
    assert (ROOT_PATH, "InterfacesAdded") in seen
    assert {where for where, member in seen if member != "PropertiesChanged"} == {ROOT_PATH}
    assert {where for where, member in seen if member == "PropertiesChanged"} == {ROOT_PATH, path}
    read = run(*busctl, "get-property", BUS_NAME, path, JOB_INTERFACE, "State", "Progress").out
    assert [json.loads(line) for line in read.splitlines()] == [
        {"type": "s", "data": "done"},
        {"type": "d", "data": 1.0},
    ]


def busyness() -> float:
    """How many times longer than the processor needs for it a program takes now; 1 on a quiet machine."""
    started = now()
    with subprocess.Popen([sys.executable, "-c", CONTROL]) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status == 0
    return max((now() - started) / (usage.ru_utime + usage.ru_stime), 1.0)


async def test_name_is_owned_fast_and_status_follows(
    real_daemon: Daemon, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name within 0.5 s, first status within 1 s; on a busy machine as much more as any program takes."""
    names, statuses, busy, cpu = [], [], [], []
    for _ in range(4):
        busy.append(await asyncio.to_thread(busyness))
        owned = client.owner_appears()
        started = now()
        real_daemon.spawn()
        await owned
        names.append(now() - started)
        await client.status()
        statuses.append(now() - started)
        cpu.append(real_daemon.cpu())
        await real_daemon.end()
    await asyncio.get_running_loop().shutdown_default_executor()
    with capsys.disabled():
        print(
            f"\nname owned after {min(names):.3f} s, first status after {min(statuses):.3f} s, "
            f"{min(cpu):.2f} s of a processor, machine {min(busy):.1f} to {max(busy):.1f} times busy"
        )
    assert min(name / factor for name, factor in zip(names, busy, strict=True)) < 0.5
    assert min(status / factor for status, factor in zip(statuses, busy, strict=True)) < 1.0
    assert min(cpu) < 1.0, "whatever else runs"


async def test_calls_during_the_start_are_answered(real_daemon: Daemon, client: Client) -> None:
    """The name is there before the service is: calls wait instead of failing."""
    owned = client.owner_appears()
    real_daemon.spawn()
    await owned
    assert (await client.status())["schema"] == 1
    with pytest.raises(BusError):
        await client.connection.call(BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "Nothing", timeout=PATIENCE)


@pytest.mark.parametrize("connections", [pytest.param(30, marks=NEEDS_ROOT)])
async def test_a_flood_during_the_start_keeps_nobody_out(
    real_daemon: Daemon, bus: Bus, client: Client, connections: int
) -> None:
    async with AsyncExitStack() as stack:
        flood = [await stack.enter_async_context(user(bus)) for _ in range(connections)]
        other = await stack.enter_async_context(user(bus, SOMEBODY))
        owned = client.owner_appears()
        real_daemon.spawn()
        await owned
        calls = [asyncio.create_task(outcome(one)) for one in flood for _ in range(50)]
        await asyncio.sleep(0)
        statuses = await asyncio.gather(other.status(), client.status())
        assert [status["schema"] for status in statuses] == [1, 1]
        answers = Counter(await asyncio.gather(*calls))
        # How many were early depends on the machine; each has its answer.
        assert answers.keys() <= {"", str(ErrorName.LIMITS_EXCEEDED)}
        assert answers[""] >= 64


async def outcome(client: Client) -> str:
    """Ask for the status; the error name, "" for none."""
    try:
        await client.status()
    except BusError as error:
        return error.name
    return ""


def _comments(interface: Interface) -> dict[str, str]:
    """The comment right before each member, by the member's name; whitespace is single spaces."""
    found = re.findall(
        r'<!--((?:(?!-->).)*)-->\s*<(?:method|signal|property) name="(\w+)"', interface.xml, re.DOTALL
    )
    return {name: " ".join(text.split()) for text, name in found}


@pytest.mark.parametrize("name", INTERFACES)
def test_every_member_is_documented(name: str) -> None:
    interface = SHIPPED[name]
    comments = _comments(interface)
    assert comments.keys() == {*interface.methods, *interface.signals, *interface.properties}
    root = ET.fromstring(interface.xml)
    for member, text in comments.items():
        assert text.startswith(f"{member}: "), member
        assert "Security: " in text, member
    for method in root.iter("method"):
        text = comments[method.get("name", "")]
        for argument in method.iter("arg"):
            assert f"@{argument.get('name')}" in text, (method.get("name"), argument.get("name"))


def test_options_in_the_documentation_are_those_that_are_taken() -> None:
    common = {"client-id", "queue", "no-join"}
    for name in (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE, JOB_INTERFACE):
        for member, text in _comments(SHIPPED[name]).items():
            if "@options: " not in text:
                continue
            documented = re.split(r"\. @| Errors:", text.partition("@options: ")[2])[0]
            options = set(re.findall(r"([a-z]+(?:-[a-z]+)*) \([bs]\)", documented))
            assert options == set(OPTIONS[Member(member)]), member
            assert common <= options or len(options) == 1, member


def test_actions_in_the_documentation_exist_and_are_the_first_that_is_asked_for() -> None:
    for name in (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE):
        for member in SHIPPED[name].methods:
            security = _comments(SHIPPED[name])[member].partition("Security: ")[2]
            needed = required(Member(member), {}, Facts(source_trusted=True, newest_of_tracked=True))
            documented = re.findall(r"org\.hostimage1\.[a-z-]+", security)
            assert set(documented) <= set(Action)
            assert documented[:1] == [str(action) for action in needed], member
            assert (security == "open to everybody.") is (not needed)


def test_every_error_name_in_the_interface_exists() -> None:
    known = {name.rpartition(".")[2] for name in ErrorName}
    seen: set[str] = set()
    for interface in SHIPPED.values():
        for text in _comments(interface).values():
            if "Errors: " in text:
                listed = re.sub(r"\([^)]*\)", "", text.partition("Errors: ")[2].partition(". ")[0])
                seen |= {name.strip(" .") for name in listed.split(",")}
    assert seen <= known, seen - known
    assert {"NoSuchDeployment", "Held", "InteractiveAuthorizationRequired"} <= seen


def test_variants_of_the_library_compare_by_value() -> None:
    """The object server relies on it to tell what changed."""
    assert Variant("a{sv}", {"a": Variant("s", "b")}) == Variant("a{sv}", {"a": Variant("s", "b")})
    assert Variant("(ss)", ["a", "b"]) != Variant("(ss)", ["a", "c"])
