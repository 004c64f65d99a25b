"""A person's program on a bus: connects as that user, and can be the authentication agent of a session.

Run by ``hostimage_testing.real_polkit`` as ``session_client.py ADDRESS UID SESSION``. It prints a line of
JSON for its unique name, and then one for each dialog: what polkit wants to be shown. Lines on its standard
input are commands: "register" as agent of the session; "done" when the password was entered or the attempt
failed, "dismiss" when the dialog was closed. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from hostimage_dbus.transport import Connection, MethodCall, Variant

POLKIT = "org.freedesktop.PolicyKit1"
AGENT_PATH = "/org/example/Agent"


def become(uid: int) -> None:
    """Drop every privilege, and stay visible in /proc as any other process of the user."""
    if os.getuid() == uid:
        return
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


class Agent:
    """The agent of one session. A dialog is open until it is answered or cancelled."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open: dict[str, MethodCall] = {}

    async def register(self, session: str) -> None:
        self._connection.set_handler(self._handle)
        await self._connection.call(
            POLKIT,
            f"/{POLKIT.replace('.', '/')}/Authority",
            f"{POLKIT}.Authority",
            "RegisterAuthenticationAgent",
            "(sa{sv})ss",
            [["unix-session", {"session-id": Variant("s", session)}], "C", AGENT_PATH],
        )

    def answer(self, command: str) -> None:
        _, call = self._open.popitem()
        if command == "dismiss":
            self._connection.reply_error(call, f"{POLKIT}.Error.Cancelled", "dismissed")
        else:
            self._connection.reply(call)

    def _handle(self, call: MethodCall) -> None:
        if call.member == "BeginAuthentication":
            action, message, _icon, details, cookie, identities = call.body
            self._open[cookie] = call
            uids = [data["uid"].value for kind, data in identities if kind == "unix-user"]
            tell(event="begin", action=action, message=message, details=details, cookie=cookie, uids=uids)
        elif call.member == "CancelAuthentication":
            (cookie,) = call.body
            self._connection.reply(call)
            if begun := self._open.pop(cookie, None):
                self._connection.reply_error(begun, f"{POLKIT}.Error.Cancelled", "cancelled")
            tell(event="cancelled", cookie=cookie)


async def main(address: str, uid: int, session: str) -> None:
    become(uid)
    connection = await Connection.connect(address)
    agent = Agent(connection)
    ended = asyncio.Event()

    def command() -> None:
        line = sys.stdin.readline().strip()
        if not line:
            ended.set()
        elif line == "register":
            registering.append(asyncio.create_task(agent.register(session)))
            registering[-1].add_done_callback(lambda task: tell(event="registered", ok=not task.exception()))
        else:
            agent.answer(line)

    registering: list[asyncio.Task[None]] = []
    asyncio.get_running_loop().add_reader(sys.stdin, command)
    tell(event="connected", name=connection.unique_name)
    await ended.wait()
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
