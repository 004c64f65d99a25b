"""Asking for a password: when polkit may, and who does on a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.transport import BusError
from hostimagectl import agent
from hostimagectl.agent import Agent
from hostimagectl.failure import Failure
from hostimagectl.service import Service

CHALLENGE = BusError(ErrorName.AUTHORIZATION_REQUIRED, "somebody has to be asked")


class Recorder(Agent):
    """An agent that starts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    async def start(self) -> None:
        self.started += 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def asked(bus: Any) -> list[bool]:
    """For each call: whether it allowed that somebody is asked."""
    seen: list[bool] = []
    bus.on_interactive = lambda member, interactive: seen.append(interactive)
    return seen


async def test_without_a_terminal_an_agent_elsewhere_may_ask(bus: Any, asked: list[bool]) -> None:
    await Service(bus).start_job("Pull", "s", [""])
    assert asked == [True]


async def test_no_ask_password(bus: Any, asked: list[bool]) -> None:
    service = Service(bus, ask=False)
    await service.start_job("Pull", "s", [""])
    await service.decide("SetUpdatePolicy", "s", ["none"])
    await service.reload()
    bus.add_job()
    await service.cancel("/org/hostimage1/jobs/_1")
    assert asked == [False] * 4


async def test_reading_never_asks(bus: Any, asked: list[bool]) -> None:
    service = Service(bus)
    await service.images()
    await service.status()
    await service.jobs()
    assert asked == [False] * 3


async def test_the_agent_is_started_only_when_it_is_needed(
    bus: Any, recorder: Recorder, asked: list[bool]
) -> None:
    service = Service(bus, agent=recorder)
    await service.start_job("Pull", "s", [""])
    assert (recorder.started, asked) == (0, [False])


async def test_the_agent_is_started_once_when_somebody_has_to_be_asked(
    bus: Any, recorder: Recorder, asked: list[bool]
) -> None:
    service = Service(bus, agent=recorder)

    def decide(member: str, interactive: bool) -> None:
        asked.append(interactive)
        if not interactive:
            raise CHALLENGE

    bus.on_interactive = decide
    await service.start_job("Pull", "s", [""])
    await service.start_job("Pull", "s", [""])
    assert (recorder.started, asked) == (1, [False, True, True])


async def test_a_refusal_is_not_asked_about(bus: Any, recorder: Recorder) -> None:
    bus.errors["Pull"] = BusError(ErrorName.ACCESS_DENIED, "no")
    with pytest.raises(Failure):
        await Service(bus, agent=recorder).start_job("Pull", "s", [""])
    assert recorder.started == 0
    assert bus.count("Pull") == 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a terminal."""
    master, slave = pty.openpty()
    with open(slave) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield slave
    os.close(master)


@pytest.fixture
def make_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Agent:
    """An agent whose pkttyagent is the shell script that the test is parametrized with."""
    path = tmp_path / "bin" / agent.PROGRAM
    path.parent.mkdir()
    path.write_text(f"#!/bin/bash\n{request.param.format(directory=tmp_path)}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return Agent()


def script(text: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make_agent", [text], indirect=True, ids=[""])


@script('echo "$$ $*" >{directory}/started\nfd=$4\neval "exec $fd>&-"\nexec sleep 60\n')
async def test_pkttyagent(terminal: int, make_agent: Agent, tmp_path: Path) -> None:
    before = termios.tcgetattr(terminal)
    await make_agent.start()
    pid, *arguments = await asyncio.to_thread(lambda: (tmp_path / "started").read_text().split())
    await asyncio.get_running_loop().shutdown_default_executor()
    assert arguments[:3] == ["--process", str(os.getpid()), "--notify-fd"]
    assert arguments[4:] == ["--fallback"]
    os.kill(int(pid), 0)
    await make_agent.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert termios.tcgetattr(terminal) == before
    await make_agent.stop()


@script("exit 3\n")
async def test_pkttyagent_that_ends_at_once(terminal: int, make_agent: Agent) -> None:
    async with asyncio.timeout(agent.READY_TIMEOUT / 2):
        await make_agent.start()
    await make_agent.stop()


@script("trap '' TERM\nwhile :; do sleep 0.05; done\n")
async def test_pkttyagent_that_is_never_ready(
    terminal: int, make_agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "READY_TIMEOUT", 0.2)
    monkeypatch.setattr(agent, "STOP_TIMEOUT", 0.2)
    await make_agent.start()
    await make_agent.stop()


@pytest.fixture
def agent_without_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    monkeypatch.setenv("PATH", str(tmp_path))
    return Agent()


async def test_no_pkttyagent(terminal: int, agent_without_program: Agent) -> None:
    assert not agent_without_program.useful()
    await agent_without_program.start()
    await agent_without_program.stop()


@script("exit 3\n")
def test_who_needs_an_agent(terminal: int, make_agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert make_agent.useful()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not make_agent.useful()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert not make_agent.useful()
