"""A person in a container: a login session, and what is done in it (``person_inside.py``)."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from hostimage_testing.container import PROGRAMS, Container
from hostimage_testing.tools import Finished

SEAT = "seat0"
#: Seconds for what comes at once, and how much longer we wait than the person.
PATIENCE = 30.0
_MARGIN = 20.0


class Person:
    """Somebody logged in; ``session`` is the id of the session."""

    def __init__(self, container: Container, process: subprocess.Popen[bytes]) -> None:
        self.container = container
        self._process = process
        self._read = b""
        self.session: str = self._result(PATIENCE)["session"]

    def run(self, *argv: str, limit: float = PATIENCE) -> Finished:
        """Run a program that has no terminal."""
        return self._run({"do": "run", "argv": argv, "limit": limit})

    def on_terminal(
        self, *argv: str, answers: Sequence[tuple[str, str | None]] = (), limit: float = PATIENCE
    ) -> Finished:
        """Run a program on a terminal; ``answers``: what to type after which text, None to close it."""
        order = {"do": "run", "terminal": True, "argv": argv, "answers": list(answers), "limit": limit}
        return self._run(order)

    def spawn(self, name: str, *argv: str) -> None:
        """Start a program beside others, to be called ``name``."""
        self._order({"do": "spawn", "id": name, "argv": argv})

    def tell(self, name: str, line: str) -> None:
        """Write a line to a program started beside."""
        self._order({"do": "tell", "id": name, "line": line})

    def hear(self, name: str, limit: float = PATIENCE) -> dict[str, Any]:
        """The next line, JSON, of a program started beside."""
        line = self._order({"do": "hear", "id": name, "limit": limit}, limit)["line"]
        assert line is not None, f"{name} said nothing"
        event: dict[str, Any] = json.loads(line)
        return event

    def ended(self, name: str, limit: float = PATIENCE) -> int:
        """Wait for the end of a program started beside; gives its exit code."""
        code: int = self._order({"do": "wait", "id": name, "limit": limit}, limit)["code"]
        return code

    def end(self, name: str) -> None:
        """Kill a program started beside."""
        self._order({"do": "end", "id": name})

    def activate(self) -> None:
        """Bring the session to the foreground of its seat."""
        self.container.run("loginctl", "activate", self.session)

    def session_property(self, name: str) -> str:
        """What logind says of the session."""
        return self.container.run(
            "loginctl", "show-session", "--value", f"-p{name}", self.session
        ).out.strip()

    def _run(self, order: dict[str, Any]) -> Finished:
        result = self._order(order, order["limit"])
        return Finished(result["code"], result["out"], result["err"])

    def _order(self, order: dict[str, Any], limit: float = 0.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        result = self._result(limit + _MARGIN)
        if "failure" in result:
            pytest.fail(f"{order}: {result['failure']}")
        return result

    def _result(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._read:
            if not select.select([self._process.stdout], [], [], limit)[0]:
                pytest.fail("the person does not answer")
            data = self._process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not data:
                pytest.fail("the person's session ended")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        result: dict[str, Any] = json.loads(line)
        return result


@contextmanager
def logged_in(container: Container, user: str, seat: str = SEAT) -> Iterator[Person]:
    """A session of ``user`` on ``seat`` ("": on none, as over a serial line), in the foreground at first."""
    properties = [f"--uid={user}", "-pPAMName=login", "-EXDG_SESSION_CLASS=user", "-ELC_ALL=C.UTF-8"]
    if seat:
        properties.append(f"-EXDG_SEAT={seat}")
    program = ["/usr/bin/python3", f"{PROGRAMS}/person_inside.py"]
    process = subprocess.Popen(
        container.command(
            "systemd-run", "--quiet", "--pipe", "--wait", "--collect", *properties, "--", *program
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield Person(container, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail("the person did not leave")
