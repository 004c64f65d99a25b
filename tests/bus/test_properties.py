"""What the Manager tells of updates, holds, deployments, settings; and the level of logging."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    ROOT_PATH,
)
from hostimage_dbus.transport import Variant
from hostimage_testing.bus import PROPERTIES, Bus, Client, Daemon, error_of
from hostimage_testing.users import needs_root, user

SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())
DIGEST = {name: "sha256:" + name * 64 for name in "abc"}
FIRST, SECOND, THIRD = "1" * 64, "12" + "3" * 62, "4" * 64


async def manager(client: Client, *names: str) -> Any:
    values = await client.properties(ROOT_PATH, MANAGER_INTERFACE)
    return [values[name] for name in names] if len(names) > 1 else values[names[0]]


# updates


async def test_a_check_of_the_tracked_image_tells_of_an_update(daemon: Daemon, client: Client) -> None:
    result = {
        "manifest-digest": DIGEST["a"],
        "source-digest": DIGEST["b"],
        "version": "2.0",
        "timestamp": 5,
        "download-size": 1000,
        "total-size": 2000,
        "state": "available",
    }
    image = daemon.script("image", {"phase": "resolving"}, {"result": result})
    daemon.settings(f'tracked-image = "{image}"\n')
    await daemon.start()
    assert await manager(client, "Update", "LastCheck") == [{}, [0, "", ""]]
    started = time.time_ns() // 1000
    path = await client.check()
    assert (await client.removed(path))[2:4] == ["check", "done"]
    update, (when, *error) = await manager(client, "Update", "LastCheck")
    assert update == {
        "image": image,
        "digest": DIGEST["a"],
        "version": "2.0",
        "timestamp": 5,
        "download-size": 1000,
        "state": "available",
    }
    assert started <= when <= time.time_ns() // 1000
    assert error == ["", ""]
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "State") == ["checking", "idle"]
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert document["update"] == update
    # A pull brings it here, whatever digest the list of images has for it.
    daemon.findings(images=[{"tag": "t", "manifest-digest": DIGEST["c"], "source-digest": DIGEST["b"]}])
    await client.removed(await client.pull(""))
    update = await manager(client, "Update")
    assert (update["state"], update["download-size"]) == ("downloaded", 0)
    staged = {"id": FIRST, "image-digest": DIGEST["a"], "staged": True}
    daemon.findings(deployments=[staged])
    await client.removed(await client.pull(""))
    assert (await manager(client, "Update"))["state"] == "staged"
    daemon.findings(deployments=[staged | {"staged": False, "booted": True}])
    await client.removed(await client.pull(""))
    assert await manager(client, "Update") == {}


async def test_a_check_that_fails_keeps_what_was_known(daemon: Daemon, client: Client) -> None:
    image = daemon.script("image", {"result": {"manifest-digest": DIGEST["a"], "version": "2.0"}})
    daemon.settings(f'tracked-image = "{image}"\n')
    await daemon.start()
    await client.removed(await client.check())
    daemon.script("image", {"fail": ["NetworkError", "no network"]})
    await client.removed(await client.check())
    update, (_, *error) = await manager(client, "Update", "LastCheck")
    assert update["version"] == "2.0"
    assert error == [ErrorName.NETWORK, "no network"]


async def test_a_check_outlives_the_daemon(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    page = "https://os.example/changes"
    image = daemon.script(
        "image", {"result": {"manifest-digest": DIGEST["a"], "version": "2.0", "changelog-url": page}}
    )
    daemon.settings(f'tracked-image = "{image}"\n')
    await daemon.start()
    await client.removed(await client.check())
    known = await manager(client, "Update", "LastCheck")
    assert known[0]["changelog-url"] == page
    async with asyncio.timeout(20):
        while not os.path.exists(tmp_path / "root/run/hostimaged/check.json"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)
    await daemon.end()
    await daemon.start()
    assert await manager(client, "Update", "LastCheck") == known
    # Nobody wants to know of an image that is not tracked any more.
    daemon.settings('tracked-image = "oci:/other"\n')
    await client.manager("Reload")
    assert await manager(client, "Update", "LastCheck") == [{}, [0, "", ""]]
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "Update")[-1] == {}
    # Tracked again, it is known as before.
    daemon.settings(f'tracked-image = "{image}"\n')
    await client.manager("Reload")
    assert await manager(client, "Update", "LastCheck") == known


async def test_a_check_of_another_image_is_nobodys_update(daemon: Daemon, client: Client) -> None:
    daemon.settings(f'tracked-image = "{daemon.script("tracked", {"result": {}})}"\n')
    await daemon.start()
    other = daemon.script("other", {"result": {"manifest-digest": DIGEST["a"]}})
    path = await client.check(other)
    await client.removed(path)
    assert (await client.job(path))["Result"] == {"reference": other, "manifest-digest": DIGEST["a"]}
    assert await manager(client, "Update", "LastCheck") == [{}, [0, "", ""]]


async def test_no_scan_follows_a_check(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    await scan(daemon, client)
    daemon.findings(images=[{"tag": "new"}])
    await client.removed(await client.check(daemon.script("image", {"result": {}})))
    assert (await client.status())["images"] == []


# the update policy


async def set_policy(client: Client, policy: str) -> None:
    await client.connection.call(
        BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "SetUpdatePolicy", "sa{sv}", [policy, {}]
    )


async def test_the_update_policy_is_kept(real_daemon: Daemon, client: Client) -> None:
    real_daemon.settings('update-policy = "check"\n')
    await real_daemon.start()
    assert await manager(client, "UpdatePolicy") == "check", "until somebody chooses"
    await set_policy(client, "stage")
    assert await manager(client, "UpdatePolicy") == "stage"
    await asyncio.gather(*(set_policy(client, policy) for policy in ("none", "check", "download")))
    assert await manager(client, "UpdatePolicy") == "download", "the last one counts"
    path = real_daemon.root / "sysroot/state/hostimaged/policy.json"
    assert json.loads(path.read_text()) == {"version": 1, "policy": "download"}
    await real_daemon.end()
    await real_daemon.start()
    assert await manager(client, "UpdatePolicy") == "download"


async def test_a_policy_that_cannot_be_written_is_not_taken(real_daemon: Daemon, client: Client) -> None:
    (real_daemon.root / "sysroot").mkdir(parents=True)
    (real_daemon.root / "sysroot/state").write_text("in the way")
    await real_daemon.start()
    error = await error_of(set_policy(client, "stage"))
    assert error.name.startswith("org.hostimage1.Error."), error.name
    assert "cannot write" in error.message
    assert "policy.json" in error.message
    assert await manager(client, "UpdatePolicy") == "none"


@pytest.mark.parametrize(
    "content", ["", "{}", '{"version": 2, "policy": "stage"}', '{"version": 1, "policy": "all"}', "[" * 5000]
)
async def test_a_damaged_policy_is_a_problem(real_daemon: Daemon, client: Client, content: str) -> None:
    path = real_daemon.root / "sysroot/state/hostimaged/policy.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    real_daemon.settings('update-policy = "check"\n')
    await real_daemon.start()
    policy, problems = await manager(client, "UpdatePolicy", "Problems")
    assert policy == "check"
    assert [(id_, severity) for id_, severity, text in problems if "policy" in text] == [
        ("policy", "warning")
    ]
    await set_policy(client, "download")
    policy, problems = await manager(client, "UpdatePolicy", "Problems")
    assert policy == "download"
    assert not [id_ for id_, *_ in problems if id_ == "policy"]


# how the boot went


async def test_a_boot_that_failed_is_told_until_it_is_answered(daemon: Daemon, client: Client) -> None:
    boot_id = daemon.root / "proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    failure = {"version": 1, "boot_id": boot_id.read_text().strip(), "time": 7, "deployment": "ab" * 64}
    path = daemon.root / "run/hostimaged/boot.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(failure | {"message": "it did not start"}))
    await daemon.start()
    problems, last = await manager(client, "Problems", "LastFailure")
    assert ["boot", "error", "it did not start"] in problems
    assert (last["kind"], last["target"], last["time"], last["job"]) == ("boot", "ab" * 64, 7_000_000, 0)
    await client.removed(await client.pull(daemon.script("bad", {"fail": ["NoSpace", "the disk is full"]})))
    assert (await manager(client, "LastFailure"))["kind"] == "pull"
    await client.removed(
        await client.pull(daemon.script("good", {"result": {"manifest-digest": DIGEST["a"]}}))
    )
    assert (await manager(client, "LastFailure"))["kind"] == "boot"
    reply = await client.connection.call(BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "Rollback", "a{sv}", [{}])
    await client.removed(reply[0])
    assert await manager(client, "LastFailure") == {}


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "11234567-89ab-cdef-0123-456789abcdef"},
        {"deployment": "ab"},
        {"message": "\0"},
        {"time": -1},
    ],
)
async def test_what_is_of_another_boot_or_damaged_is_not_told(
    daemon: Daemon, client: Client, change: dict[str, Any]
) -> None:
    boot_id = daemon.root / "proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    failure = {"version": 1, "boot_id": boot_id.read_text().strip(), "time": 7, "deployment": "ab" * 64}
    path = daemon.root / "run/hostimaged/boot.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(failure | {"message": "it did not start"} | change))
    await daemon.start()
    problems, last = await manager(client, "Problems", "LastFailure")
    assert [id_ for id_, *_ in problems if id_ == "boot"] == []
    assert last == {}


# holds


async def hold(client: Client, until: int, reason: str = "") -> None:
    await client.manager("HoldUpdates", "tsa{sv}", until, reason, {})


def soon(seconds: float) -> int:
    return int((time.time() + seconds) * 1e6)


async def test_a_hold_holds_background_jobs(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    await hold(client, soon(3600), "a presentation")
    assert await manager(client, "Holds", "State") == [["manual"], "idle"]
    image = daemon.script("image", {"result": {}})
    held = await client.check(image, background=True)
    assert await manager(client, "State", "QueuedJobs") == ["held", [held]]
    refused = await error_of(client.check(image, background=True, queue=False, no_join=True))
    assert refused.name == ErrorName.HELD
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert [(h["kind"], h["reason"]) for h in document["holds"]] == [("manual", "a presentation")]
    assert document["jobs"][0]["holdReasons"] == ["manual"]
    await client.removed(await client.pull(image))
    await hold(client, 0)
    assert (await client.removed(held))[3] == "done"
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "Holds") == [["manual"], []]


async def test_a_hold_ends_by_itself_and_outlives_the_daemon(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    await client.status()
    # Long enough for a second start beside other tests.
    await hold(client, soon(8))
    await daemon.kill()
    await daemon.start()
    assert await manager(client, "Holds") == ["manual"]
    await client.changed(ROOT_PATH, MANAGER_INTERFACE, "Holds", [])
    await daemon.kill()
    await daemon.start()
    assert await manager(client, "Holds") == []


async def test_a_hold_ends_with_the_boot(daemon: Daemon, client: Client) -> None:
    boot_id = daemon.root / "proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text("11111111-1111-1111-1111-111111111111\n")
    await daemon.start()
    await hold(client, soon(3600))
    await daemon.end()
    boot_id.write_text("22222222-2222-2222-2222-222222222222\n")
    await daemon.start()
    assert await manager(client, "Holds") == []


async def test_a_damaged_hold_is_none(daemon: Daemon, client: Client) -> None:
    (daemon.root / "run/hostimaged").mkdir(parents=True)
    (daemon.root / "run/hostimaged/hold.json").write_text('{"until": -5}')
    await daemon.start()
    assert await manager(client, "Holds") == []


@pytest.mark.parametrize(
    ("until", "reason"), [(1, ""), (soon(-5), ""), (1 << 63, "x" * 1000), (1 << 63, "a\nb")]
)
async def test_what_cannot_be_held(daemon: Daemon, client: Client, until: int, reason: str) -> None:
    await daemon.start()
    assert (await error_of(hold(client, until, reason))).name == ErrorName.INVALID_ARGS
    assert await manager(client, "Holds") == []


# deployments


def row(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "image": "oci:/x", "image-digest": DIGEST["a"]} | more


async def scan(daemon: Daemon, client: Client) -> None:
    await client.removed(await client.pull(daemon.script("nothing", {"result": {}})))


async def test_deployments_come_change_and_go(daemon: Daemon, client: Client) -> None:
    daemon.findings(deployments=[row(FIRST, booted=True), row(SECOND, order=1, **{"is-rollback": True})])
    await daemon.start()
    await client.until(lambda: len(client.named("InterfacesAdded")) == 2)
    first, second, third = (f"{ROOT_PATH}/deployments/_{i[:32]}" for i in (FIRST, SECOND, THIRD))
    assert await manager(client, "Booted", "Staged", "RollbackTarget", "RebootRequired") == [
        first, "/", second, False,
    ]  # fmt: skip
    values = await client.properties(second, DEPLOYMENT_INTERFACE)
    assert (values["Id"], values["Order"], values["Verity"]) == (SECOND, 1, "unverified")
    (booted,) = await client.connection.call(
        BUS_NAME, ROOT_PATH, MANAGER_INTERFACE, "GetDeployment", "sa{sv}", ["booted", {}]
    )
    assert booted == first
    daemon.findings(
        deployments=[row(THIRD, staged=True), row(FIRST, booted=True, pinned=True, **{"size-exclusive": 9})]
    )
    mark = len(client.signals)
    await scan(daemon, client)
    told = [s for s in client.signals[mark:] if s.path in (first, second, third, ROOT_PATH)]
    assert ("InterfacesRemoved", second) in [(s.member, s.body[0]) for s in told]
    assert ("InterfacesAdded", third) in [(s.member, s.body[0]) for s in told]
    (changed,) = [s.body for s in told if s.path == first]
    assert {key: v.value for key, v in changed[1].items()} == {"Pinned": True}
    assert changed[2] == ["SizeExclusive"]
    assert await manager(client, "Staged", "RollbackTarget", "RebootRequired") == [third, "/", True]
    # Objects come and go before the Manager points to them.
    members = [(s.member, s.path) for s in told]
    assert members.index(("InterfacesRemoved", ROOT_PATH)) < max(
        i for i, m in enumerate(members) if m == ("PropertiesChanged", ROOT_PATH)
    )
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert [d["id"] for d in document["deployments"]] == [THIRD, FIRST]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("booted", FIRST), ("rollback", SECOND), ("staged", None),
        (FIRST, FIRST), ("11", FIRST), ("12", SECOND), ("1", None), ("9", None),
        ("", None), ("x" * 1000, None), ("1\n", None),
    ],
)  # fmt: skip
async def test_finding_a_deployment(daemon: Daemon, client: Client, name: str, found: str | None) -> None:
    daemon.findings(deployments=[row(FIRST, booted=True), row(SECOND, **{"is-rollback": True})])
    await daemon.start()
    await client.until(lambda: len(client.named("InterfacesAdded")) == 2)
    asking = client.manager("GetDeployment", "sa{sv}", name, {})
    if found is not None:
        assert await asking == f"{ROOT_PATH}/deployments/_{found[:32]}"
        return
    error = await error_of(asking)
    assert error.name in (ErrorName.NO_SUCH_DEPLOYMENT, ErrorName.INVALID_ARGS)
    assert error.message.isprintable()


# settings


async def test_reload_reads_the_settings_again(daemon: Daemon, client: Client) -> None:
    daemon.settings('tracked-image = "docker://r.example/one"\n')
    await daemon.start()
    daemon.settings('tracked-image = "docker://r.example/two"\nnonsense = 1\nlog-level = "debug"\n')
    assert await client.manager("Reload") == []
    tracked, problems = await manager(client, "TrackedImage", "Problems")
    assert tracked == "docker://r.example/two"
    assert [p[:2] for p in problems] == [["settings", "warning"]]
    level = await client.properties(LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE)
    assert level["LogLevel"] == "debug"
    daemon.settings("")
    await client.manager("Reload")
    assert await manager(client, "TrackedImage", "Problems") == ["", []]


async def test_reload_is_told_to_the_service_manager(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        owned = client.owner_appears()
        daemon.spawn(NOTIFY_SOCKET=str(tmp_path / "notify"))
        await owned
        await client.manager("Reload")
        await daemon.end()
        listener.setblocking(False)
        told = b""
        try:
            while True:
                told += listener.recv(4096) + b"\n"
        except BlockingIOError:
            pass
    lines = told.decode().splitlines()
    at = lines.index("RELOADING=1")
    assert lines[at + 1].startswith("MONOTONIC_USEC=")
    assert int(lines[at + 1].partition("=")[2]) > 0
    assert "READY=1" in lines[:at]
    assert "READY=1" in lines[at:]


# logging


async def set_log(client: Client, name: str, value: Variant) -> None:
    await client.connection.call(
        BUS_NAME, LOG_CONTROL_PATH, PROPERTIES, "Set", "ssv", [LOG_CONTROL_INTERFACE, name, value]
    )


async def test_the_level_of_logging(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    assert await client.properties(LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE) == {
        "LogLevel": "info",
        "LogTarget": "console",
        "SyslogIdentifier": "hostimaged",
    }
    await set_log(client, "LogLevel", Variant("s", "err"))
    await client.removed(await client.pull(daemon.script("quiet", {"result": {}})))
    await set_log(client, "LogLevel", Variant("s", "info"))
    await client.removed(await client.pull(daemon.script("loud", {"result": {}})))
    log = daemon.log.read_text()
    assert "/loud" in log
    assert "/quiet" not in log
    await set_log(client, "LogTarget", Variant("s", "auto"))
    await set_log(client, "LogTarget", Variant("s", "console"))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("LogLevel", Variant("s", "loud"), ErrorName.INVALID_ARGS),
        ("LogLevel", Variant("u", 7), ErrorName.INVALID_ARGS),
        ("LogTarget", Variant("s", "kmsg"), ErrorName.INVALID_ARGS),
        ("SyslogIdentifier", Variant("s", "x"), "org.freedesktop.DBus.Error.PropertyReadOnly"),
        ("Nothing", Variant("s", "x"), "org.freedesktop.DBus.Error.UnknownProperty"),
    ],
)
async def test_what_cannot_be_set(
    daemon: Daemon, client: Client, name: str, value: Variant, error: str
) -> None:
    await daemon.start()
    assert (await error_of(set_log(client, name, value))).name == error


@needs_root
async def test_only_root_sets_the_level(daemon: Daemon, bus: Bus, client: Client) -> None:
    await daemon.start()
    async with user(bus) as nobody:
        for name, value in (("LogLevel", "debug"), ("LogTarget", "auto")):
            refused = await error_of(set_log(nobody, name, Variant("s", value)))
            assert refused.name == ErrorName.ACCESS_DENIED
        assert (await nobody.properties(LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE))["LogLevel"] == "info"


async def test_two_reloads_at_once(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    assert await asyncio.gather(client.manager("Reload"), client.manager("Reload")) == [[], []]
