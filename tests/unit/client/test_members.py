"""Every member of the API has its command, with the arguments and options that the interface describes."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import hostimage_dbus
from hostimage_dbus.errors import EXIT_CODES, EXIT_USAGE, ErrorName
from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.names import (
    DEPLOYMENT_INTERFACE,
    LOG_CONTROL_PATH,
    MANAGER_INTERFACE,
    ROOT_PATH,
    job_path,
)
from hostimage_dbus.transport import BusError, Variant
from hostimagectl import cli
from hostimagectl.catalog import COMMANDS, GROUPS, JOB_OPTIONS, find
from hostimagectl.command import JobCommand
from hostimagectl.commands import hold, job, log, policy, reload, show, update
from hostimagectl.failure import Failure
from hostimagectl.parser import parser
from hostimagectl.service import Service

PARSER = parser()
DEPLOYMENT = "/org/hostimage1/deployments/_" + "ab" * 16
OTHER = "/org/hostimage1/deployments/_" + "cd" * 16
INTERFACES = load_shipped()
JOB_COMMANDS = [command for command in COMMANDS if isinstance(command, JobCommand)]
#: Members of the Manager that are not the start of a job.
OTHERS = {"GetStatus", "GetDeployment", "ListImages", "ListJobs", "SetUpdatePolicy", "HoldUpdates", "Reload"}
ARGUMENTS = {
    "diff": ["staged", "booted"],
    "why": ["oci-layer-x"],
    "stage": ["docker://registry.example/os"],
    "switch": ["docker://registry.example/os"],
    "make-default": ["booted"],
    "pin": ["booted"],
    "unpin": ["booted"],
    "delete": ["booted"],
    "kargs": ["--append=quiet", "--append", "a=b", "--delete=splash"],
    "set-unified": ["on"],
}
BODIES = {
    "diff": ("o", [DEPLOYMENT]),
    "why": ("s", ["oci-layer-x"]),
    "check": ("s", [""]),
    "pull": ("s", [""]),
    "stage": ("s", ["docker://registry.example/os"]),
    "switch": ("s", ["docker://registry.example/os"]),
    "pin": ("b", [True]),
    "unpin": ("b", [False]),
    "kargs": ("asas", [["quiet", "a=b"], ["splash"]]),
    "set-unified": ("b", [True]),
}


def arguments(*argv: str) -> argparse.Namespace:
    return PARSER.parse_args(argv)


def documented_options(command: JobCommand) -> set[str]:
    """Options that the comment of the member in the shipped XML lists."""
    interface = DEPLOYMENT_INTERFACE if command.on else MANAGER_INTERFACE
    file = Path(hostimage_dbus.__file__).parent / "interfaces" / f"{interface}.xml"
    comment = next(
        text
        for text in re.findall(r"<!--\s*(.*?)-->", file.read_text(), re.DOTALL)
        if text.startswith(command.member + ":")
    )
    listed = comment.split("@options:")[1].split("@job:")[0]
    return set(re.findall(r"([a-z-]+) \((?:s|b)\)", listed))


def test_every_method_has_a_command() -> None:
    assert {c.member for c in JOB_COMMANDS if not c.on} == set(INTERFACES[MANAGER_INTERFACE].methods) - OTHERS
    assert {c.member for c in JOB_COMMANDS if c.on} == set(INTERFACES[DEPLOYMENT_INTERFACE].methods)


def test_every_command_has_its_group() -> None:
    assert {command.group for command in COMMANDS} == set(GROUPS)


@pytest.mark.parametrize("command", JOB_COMMANDS, ids=lambda command: command.name)
def test_options_are_those_of_the_interface(command: JobCommand) -> None:
    ours = {option.key for option in (*command.options, *JOB_OPTIONS)} | {"client-id"}
    assert ours == documented_options(command)


@pytest.mark.parametrize("command", JOB_COMMANDS, ids=lambda command: command.name)
async def test_a_command_calls_its_member(
    bus: Any, daemon: Any, make_console: Any, command: JobCommand
) -> None:
    bus.deployments = {"booted": DEPLOYMENT, "staged": OTHER}
    given = arguments(command.name, *ARGUMENTS.get(command.name, []), "--no-wait", "--quiet")
    console = make_console(quiet=True)
    assert await job.start(daemon, command, given, console) == 0
    assert console.out == "1\n"
    member, path, body = bus.calls[-1]
    assert member == command.member
    assert path == ({"diff": OTHER}.get(command.name, DEPLOYMENT) if command.on else ROOT_PATH)
    signature, expected = BODIES.get(command.name, ("", []))
    assert body == [*expected, {"client-id": Variant("s", "hostimagectl")}]
    interface = INTERFACES[DEPLOYMENT_INTERFACE if command.on else MANAGER_INTERFACE]
    assert interface.methods[command.member].signature == signature + "a{sv}"
    assert "".join(parameter.signature for parameter in command.parameters) == signature


OPTION_VALUES = {"expect-digest": "sha256:" + "0" * 64, "apply": "soft-reboot", "sharing": "require"}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in JOB_COMMANDS for option in (*command.options, *JOB_OPTIONS)],
    ids=lambda value: value.name,
)
async def test_an_option_is_sent_as_its_type(
    bus: Any, daemon: Any, make_console: Any, command: JobCommand, option: Any
) -> None:
    bus.deployments = {"booted": DEPLOYMENT, "staged": OTHER}
    value = OPTION_VALUES.get(option.key, option.value)
    argv = [option.name] + ([value] if isinstance(value, str) else [])
    given = arguments(command.name, *ARGUMENTS.get(command.name, []), "--no-wait", *argv)
    await job.start(daemon, command, given, make_console(quiet=True))
    expected = Variant("s" if isinstance(value, str) else "b", value)
    assert bus.calls[-1][2][-1] == {"client-id": Variant("s", "hostimagectl"), option.key: expected}


async def test_without_waiting_the_job_is_told(bus: Any, daemon: Any, make_console: Any) -> None:
    command = find("check")
    assert isinstance(command, JobCommand)
    console = make_console()
    assert await job.start(daemon, command, arguments("check", "--no-wait"), console) == 0
    assert console.out == "job 1 does it ('hostimagectl jobs' shows it)\n"

    console = make_console(as_json=True)
    assert await job.start(daemon, command, arguments("check", "--no-wait"), console) == 0
    assert console.document["job"]["path"] == job_path(2)
    assert (console.document["result"], console.document["error"]) == (None, None)


async def test_without_waiting_a_job_may_be_over(bus: Any, daemon: Any, make_console: Any) -> None:
    async def forget() -> None:
        bus.jobs.clear()

    bus.on_pull = forget
    command = find("pull")
    assert isinstance(command, JobCommand)
    console = make_console(as_json=True)
    assert await job.start(daemon, command, arguments("pull", "--no-wait"), console) == 0
    assert console.document["job"]["id"] == 1


async def test_an_equal_job_is_joined_and_it_is_said(bus: Any, daemon: Any, make_console: Any) -> None:
    command = find("pull")
    assert isinstance(command, JobCommand)

    async def joined() -> None:
        bus.jobs[job_path(1)]["Created"] = 1_700_000_000_000_000

    bus.on_pull = joined
    console = make_console()
    task = asyncio.create_task(job.start(daemon, command, arguments("pull", "oci:/i"), console))
    await bus.called("GetAll")
    bus.end(job_path(1), "done")
    assert await task == 0
    assert "job 1 does this already; following it\n" in console.errors


async def test_a_new_job_is_not_said_to_be_joined(bus: Any, daemon: Any, make_console: Any) -> None:
    command = find("pull")
    assert isinstance(command, JobCommand)

    async def new() -> None:
        bus.jobs[job_path(1)]["Created"] = 2**62

    bus.on_pull = new
    console = make_console()
    task = asyncio.create_task(job.start(daemon, command, arguments("pull", "oci:/i"), console))
    await bus.called("GetAll")
    bus.end(job_path(1), "done")
    assert await task == 0
    assert "already;" not in console.errors


async def test_cancelling_a_shared_job_is_leaving_it(bus: Any, daemon: Any, make_console: Any) -> None:
    command = find("pull")
    assert isinstance(command, JobCommand)
    bus.shared = True
    console = make_console()
    task = asyncio.create_task(job.start(daemon, command, arguments("pull", "oci:/i"), console))
    await bus.called("GetAll")
    bus.change(job_path(1), State="running")
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Failure, match="job 1 goes on: others wait for it too") as caught:
        await task
    assert caught.value.code == EXIT_CODES[ErrorName.CANCELLED]


async def test_what_the_daemon_cannot_do_yet(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.errors["Rollback"] = BusError(ErrorName.NOT_SUPPORTED, "not built yet")
    command = find("rollback")
    assert isinstance(command, JobCommand)
    with pytest.raises(Failure) as caught:
        await job.start(daemon, command, arguments("rollback"), make_console())
    assert (caught.value.code, caught.value.message) == (EXIT_CODES[ErrorName.NOT_SUPPORTED], "not built yet")


async def test_an_unknown_deployment(bus: Any, daemon: Any, make_console: Any) -> None:
    command = find("pin")
    assert isinstance(command, JobCommand)
    with pytest.raises(Failure) as caught:
        await job.start(daemon, command, arguments("pin", "feed"), make_console())
    assert caught.value.code == EXIT_CODES[ErrorName.NO_SUCH_DEPLOYMENT]
    assert bus.count("SetPinned") == 0


CHECKED = {
    "reference": Variant("s", "docker://registry.example/os"),
    "manifest-digest": Variant("s", "sha256:" + "ab" * 32),
    "timestamp": Variant("t", 1_700_000_000_000_000),
    "download-size": Variant("t", 3 << 20),
    "state": Variant("s", "available\x1b[2J"),
}


async def test_the_result_of_any_job_for_people(bus: Any, daemon: Any, make_console: Any) -> None:
    async def end() -> None:
        bus.jobs[job_path(bus.next_id - 1)]["Kind"] = "check"
        bus.end(job_path(bus.next_id - 1), "done", Result=CHECKED)

    bus.on_pull = end
    command = find("check")
    assert isinstance(command, JobCommand)
    console = make_console()
    assert await job.start(daemon, command, arguments("check"), console) == 0
    assert console.out.splitlines()[0] == "checked"
    assert re.search(r"\n  Download size: +3.0 MiB\n", console.out)
    assert re.search(r"\n  Timestamp: +2023-11-1", console.out)
    assert "available\\x1b[2J" in console.out

    console = make_console(quiet=True)
    assert await job.start(daemon, command, arguments("check", "--quiet"), console) == 0
    assert console.out == "sha256:" + "ab" * 32 + "\n"


async def test_the_text_of_a_result_is_printed_line_by_line(bus: Any, daemon: Any, make_console: Any) -> None:
    async def end() -> None:
        bus.jobs[job_path(1)]["Kind"] = "diff"
        bus.end(job_path(1), "done", Result={"text": Variant("s", "+a\n-\x1b[2Jb\n")})

    bus.deployments = {"booted": DEPLOYMENT, "staged": OTHER}
    bus.on_pull = end
    command = find("diff")
    assert isinstance(command, JobCommand)
    console = make_console()
    assert await job.start(daemon, command, arguments("diff", "booted", "staged"), console) == 0
    assert console.out == "+a\n-\\x1b[2Jb\n"


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch, bus: Any) -> Any:
    """Commands connect to ``bus``."""
    from contextlib import asynccontextmanager

    from hostimagectl import service

    @asynccontextmanager
    async def connect(*, ask: bool = True) -> Any:
        yield Service(bus, ask=ask)

    monkeypatch.setattr(service, "connect", connect)
    return bus


async def test_show(connected: Any, make_console: Any) -> None:
    connected.deployments = {"booted": DEPLOYMENT}
    connected.properties[DEPLOYMENT] = {
        "Id": Variant("s", "ab" * 64),
        "Booted": Variant("b", True),
        "KernelArguments": Variant("s", "root=x\x1b[2J"),
        "Timestamp": Variant("t", 1_700_000_000_000_000),
    }
    console = make_console()
    assert await show.run(arguments("show", "booted"), console) == 0
    assert re.search(r"Booted: +yes\n", console.out)
    assert "root=x\\x1b[2J" in console.out
    console = make_console(as_json=True)
    await show.run(arguments("show", "booted"), console)
    assert console.document["deployment"]["Booted"] is True
    console = make_console(quiet=True)
    await show.run(arguments("show", "booted"), console)
    assert console.out == "ab" * 64 + "\n"


async def test_policy(connected: Any, make_console: Any) -> None:
    console = make_console()
    assert await policy.run(arguments("policy", "download"), console) == 0
    assert connected.calls[-1] == (
        "SetUpdatePolicy",
        ROOT_PATH,
        ["download", {"client-id": Variant("s", "hostimagectl")}],
    )
    assert console.out == "download\n"
    connected.properties[ROOT_PATH] = {"UpdatePolicy": Variant("s", "check")}
    console = make_console(as_json=True)
    assert await policy.run(arguments("policy"), console) == 0
    assert console.document == {"policy": "check"}


@pytest.mark.parametrize(
    ("chosen", "member", "body"),
    [("check", "Check", [""]), ("download", "Pull", [""]), ("stage", "Upgrade", [])],
)
async def test_update_does_what_the_policy_says(
    connected: Any, make_console: Any, chosen: str, member: str, body: list[str]
) -> None:
    connected.properties[ROOT_PATH] = {"UpdatePolicy": Variant("s", chosen)}
    given = arguments("update", "--background", "--allow-metered", "--no-wait")
    assert await update.run(given, make_console()) == 0
    called = [call for call in connected.calls if call[0] == member]
    assert [(path, sent[:-1]) for _, path, sent in called] == [(ROOT_PATH, body)]
    assert called[0][2][-1] == {
        "client-id": Variant("s", "hostimagectl"),
        "background": Variant("b", True),
        "allow-metered": Variant("b", True),
    }


async def test_update_does_nothing_where_nobody_wants_it(connected: Any, make_console: Any) -> None:
    connected.properties[ROOT_PATH] = {"UpdatePolicy": Variant("s", "none")}
    console = make_console(as_json=True)
    assert await update.run(arguments("update"), console) == 0
    assert console.document == {"policy": "none"}
    assert {member for member, *_ in connected.calls} <= {"Get"}
    connected.properties[ROOT_PATH] = {"UpdatePolicy": Variant("s", "format the disk")}
    with pytest.raises(Failure):
        await update.run(arguments("update"), make_console())


async def test_hold_and_release(connected: Any, make_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    given = arguments("hold", "90min", "--reason", "a demo")
    console = make_console()
    assert await hold.run(given, console) == 0
    until, reason, _ = connected.calls[-1][2]
    assert (until, reason) == ((1_700_000_000 + 5400) * 1_000_000, "a demo")
    assert console.out.startswith("updates are held until 2023-11-1")
    assert await hold.run(arguments("release"), make_console()) == 0
    assert connected.calls[-1][2][:2] == [0, ""]


async def test_reload(connected: Any, make_console: Any) -> None:
    console = make_console(as_json=True)
    assert await reload.run(arguments("reload"), console) == 0
    assert connected.calls[-1] == ("Reload", ROOT_PATH, [])
    assert console.document == {"error": None}


async def test_log_level(connected: Any, make_console: Any) -> None:
    connected.properties[LOG_CONTROL_PATH] = {"LogLevel": Variant("s", "info")}
    console = make_console()
    assert await log.run(arguments("log-level"), console) == 0
    assert console.out == "info\n"
    console = make_console(quiet=True)
    assert await log.run(arguments("log-level", "debug"), console) == 0
    assert connected.properties[LOG_CONTROL_PATH] == {"LogLevel": Variant("s", "debug")}
    assert console.out == ""


async def test_a_status_for_other_programs_is_passed_on(connected: Any, make_console: Any) -> None:
    from hostimagectl.commands import status

    console = make_console()
    assert await status.run(arguments("status", "--format", "bootc-v1"), console) == 0
    assert console.document == ["bootc-v1", {}]


def test_log_levels_are_those_of_the_interface() -> None:
    level = next(argument for argument in find("log-level").arguments if "level" in argument.names)
    words = re.findall(r"[a-z]+", INTERFACES["org.freedesktop.LogControl1"].xml.split("that are logged:")[1])
    assert [word for word in words if word != "or"][:8] == list(level.settings["choices"])


@pytest.mark.parametrize(
    "argv",
    [
        ["kargs"],
        ["set-unified", "yes"],
        ["hold"],
        ["hold", "2"],
        ["hold", "-2h"],
        ["hold", "2000-01-01"],
        ["hold", "400d"],
        ["hold", "9" * 30 + "h"],
        ["policy", "always"],
        ["show", ""],
        ["show", "a\nb"],
        ["upgrade", "--apply", "later"],
        ["upgrade", "oci:/i"],
        ["log-level", "loud"],
        ["diff", "booted"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == EXIT_USAGE
    assert "hostimagectl" in capsys.readouterr().err


def test_a_time_may_be_given_as_such() -> None:
    from datetime import datetime, timedelta

    when = (datetime.now().astimezone() + timedelta(days=2)).replace(microsecond=0)
    assert arguments("hold", when.isoformat()).until == int(when.timestamp()) * 1_000_000
