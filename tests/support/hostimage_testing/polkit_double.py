"""A double of polkit: takes the calls of its authority, records them and answers as it is told.

In the process of a test: ``PolkitDouble.connect``. In a process of its own, for tests that wait for programs:
``polkit_program``.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hostimage_dbus.transport import Connection, MethodCall, Variant
from hostimage_testing.processes import python_environment

NAME = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"
SIGNATURES = {"CheckAuthorization": "(sa{sv})sa{ss}us", "CancelCheckAuthorization": "s"}
#: For the configuration of a bus: everybody may be polkit and talk to it.
POLICY = f"""
  <policy context="default">
    <allow own="{NAME}"/>
    <allow send_destination="{NAME}"/>
  </policy>
"""


class Answer(StrEnum):
    """What the double does with a check."""

    YES = "yes"
    NO = "no"
    CHALLENGE = "challenge"
    DISMISSED = "dismissed"
    ERROR = "error"
    HANG = "hang"  # until it is settled or cancelled
    DEAF = "deaf"  # not even a cancellation is answered
    CRASH = "crash"


@dataclass(frozen=True)
class Reply:
    """An answer of any form, for what a broken or hostile polkit might send."""

    signature: str
    body: list[Any]


@dataclass(frozen=True)
class Check:
    """A call of CheckAuthorization, as it came."""

    caller: str
    subject_kind: str
    subject: dict[str, Any]
    action: str
    details: dict[str, str]
    flags: int
    cancellation_id: str


_RESULTS: dict[Answer, tuple[bool, bool, dict[str, str]]] = {
    Answer.YES: (True, False, {}),
    Answer.NO: (False, False, {}),
    Answer.CHALLENGE: (False, True, {"polkit.retains_authorization_after_challenge": "1"}),
    Answer.DISMISSED: (False, False, {"polkit.dismissed": "true"}),
}


@dataclass(eq=False)
class PolkitDouble:
    """The double. ``answers`` by action go before ``answer``; ``checks`` and ``cancelled`` are what came."""

    connection: Connection
    answer: Answer | Reply = Answer.YES
    answers: dict[str, Answer | Reply] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    faults: list[MethodCall] = field(default_factory=list)
    record: Path | None = None
    _hanging: dict[str, MethodCall] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, address: str, answer: Answer | Reply = Answer.YES, record: Path | None = None
    ) -> AsyncIterator[PolkitDouble]:
        """Be polkit on the bus at ``address``; a call that polkit would not understand fails the test."""
        double = cls(await Connection.connect(address), answer, record=record)
        try:
            double.connection.set_handler(double._handle)
            await double.connection.request_name(NAME)
            yield double
        finally:
            await double.connection.close()
        assert not double.faults, double.faults

    @property
    def hanging(self) -> int:
        """How many checks wait for their answer."""
        return len(self._hanging)

    async def until(self, condition: Callable[[PolkitDouble], object], patience: float = 20.0) -> None:
        """Wait until ``condition`` is true."""
        async with asyncio.timeout(patience):
            while not condition(self):
                self._news.clear()
                await self._news.wait()

    def settle(self, answer: Answer | Reply) -> None:
        """Answer every check that hangs."""
        while self._hanging:
            _, call = self._hanging.popitem()
            self._reply(call, answer)

    def crash(self) -> None:
        """Leave the bus without a word."""
        self.connection._abort("crash")

    def _handle(self, call: MethodCall) -> None:
        if (call.path, call.interface, call.signature) != (PATH, INTERFACE, SIGNATURES.get(call.member)):
            self.faults.append(call)
            self.connection.reply_error(call, "org.freedesktop.DBus.Error.UnknownMethod", "not polkit's")
        elif call.member == "CheckAuthorization":
            self._check(call)
        else:
            self._cancel(call)
        self._news.set()

    def _check(self, call: MethodCall) -> None:
        (kind, subject), action, details, flags, cancellation_id = call.body
        plain = {key: value.value for key, value in subject.items() if isinstance(value, Variant)}
        check = Check(call.sender, kind, plain, action, details, flags, cancellation_id)
        self.checks.append(check)
        if self.record is not None:
            with self.record.open("a") as file:
                file.write(json.dumps(asdict(check)) + "\n")
        answer = self.answers.get(action, self.answer)
        if cancellation_id in self._hanging:
            self.faults.append(call)
            self.connection.reply_error(call, f"{NAME}.Error.CancellationIdNotUnique", "already in use")
        elif answer in (Answer.HANG, Answer.DEAF):
            self._hanging[cancellation_id] = call
        elif answer is Answer.CRASH:
            self.crash()
        else:
            self._reply(call, answer)

    def _cancel(self, call: MethodCall) -> None:
        """As polkitd does: the check ends with an error, then the cancellation is confirmed."""
        (cancellation_id,) = call.body
        self.cancelled.append(cancellation_id)
        if self.answer is Answer.DEAF:
            return
        check = self._hanging.pop(cancellation_id, None)
        if check is None:
            self.connection.reply_error(call, f"{NAME}.Error.Failed", "No such cancellation_id")
            return
        self.connection.reply_error(check, f"{NAME}.Error.Cancelled", "Operation was cancelled")
        self.connection.reply(call)

    def _reply(self, call: MethodCall, answer: Answer | Reply) -> None:
        if isinstance(answer, Reply):
            self.connection.reply(call, answer.signature, answer.body)
        elif answer is Answer.ERROR:
            self.connection.reply_error(call, f"{NAME}.Error.Failed", "Action is not registered")
        else:
            self.connection.reply(call, "(bba{ss})", [list(_RESULTS[answer])])


@contextmanager
def polkit_program(address: str, answer: Answer, record: Path) -> Iterator[Callable[[], list[Check]]]:
    """Run the double, which records in the file ``record``; gives what tells the checks so far."""

    def checks() -> list[Check]:
        lines = record.read_text().splitlines() if record.exists() else []
        return [Check(**json.loads(line)) for line in lines]

    with subprocess.Popen(
        [sys.executable, "-m", "hostimage_testing.polkit_double", address, answer, record],
        env=python_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield checks
        finally:
            process.kill()


async def _main(address: str, answer: str, record: str) -> None:
    async with PolkitDouble.connect(address, Answer(answer), Path(record)) as double:
        print("ready", flush=True)
        await double.connection.closed()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
