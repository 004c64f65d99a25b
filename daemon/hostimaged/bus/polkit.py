"""Asking polkit whether a caller may do something (org.freedesktop.PolicyKit1.Authority).

It fails closed: only a well-formed reply that says "authorized" is a yes. Which actions a call needs is
decided in ``hostimaged.bus.authorization``.
"""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.transport import BUS, BusError, Variant
from hostimaged.bus.authorization import Action
from hostimaged.bus.limits import Slots
from hostimaged.errors import AccessDenied, AuthorizationRequired, InvalidArgs
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from hostimage_dbus.transport import Connection
    from hostimaged.bus.authorization import LogindAction

POLKIT: Final = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY: Final = "org.freedesktop.PolicyKit1.Authority"
#: CheckAuthorizationFlags: polkit may ask somebody.
ALLOW_USER_INTERACTION: Final = 1

#: Seconds in which a dialog has to be answered: somebody may have to be fetched who knows the password.
DIALOG_TIMEOUT: Final = 600.0
#: Seconds polkit gets where it may ask nobody. Rules may run programs, for 10 s each.
SILENT_TIMEOUT: Final = 60.0
#: Questions of one user, and of all, that may wait for their answer. The bus lets a connection wait for 128
#: replies; what is left of them is for root's jobs, who wait for no authorisation.
WAITING_PER_UID: Final = 4
WAITING_IN_ALL: Final = 64
#: Cancellations under way at the same time: a polkit that answers nothing gets no further part of the 128.
_CANCELLATIONS: Final = 16

#: Details are a few words each and an image reference or a deployment id.
_MAX_DETAILS: Final = 16
_MAX_DETAIL: Final = 4096
_DETAIL_KEY: Final = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
_UNIQUE_NAME: Final = re.compile(r":[A-Za-z0-9_.-]{1,254}\Z")

#: What a dialog says where an image is named, by the detail "operation": who enters a password should see
#: for what, and polkitd gives agents the message only, none of our details. It fills in the image.
_MESSAGES: Final[Mapping[str, str]] = {
    "check": "Authentication is required to look up the operating system image $(image)",
    "pull": "Authentication is required to download the operating system image $(image)",
    "stage": "Authentication is required to prepare the operating system image $(image) for the next boot",
    "upgrade": "Authentication is required to update this computer from the operating system image $(image)",
    "switch": "Authentication is required to switch this computer to the operating system image $(image)",
}
#: Images that may stand in a message: some agents take markup in it, and a dialog has an end.
_SHOWABLE: Final = re.compile(r"[A-Za-z0-9:/@.,_+\[\]-]{1,200}\Z")

_logger = get_logger("hostimaged.bus")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the unique name of the connection, and the uid that the bus has for it."""

    name: str
    uid: int


class _Verdict(Enum):
    GRANTED = "granted"
    CHALLENGE = "challenge"
    DENIED = "denied"
    DISMISSED = "dismissed"
    ABSENT = "absent"
    FAILED = "failed"
    LEFT = "left"


#: Why a caller is refused, for the caller.
_REASONS: Final[Mapping[_Verdict, str]] = {
    _Verdict.DENIED: "not allowed by the system's policy: {action}",
    _Verdict.DISMISSED: "the request for authentication was dismissed: {action}",
    _Verdict.ABSENT: "polkit is not available, so only root may do this: {action}",
    _Verdict.FAILED: "polkit could not decide: {action}",
    _Verdict.LEFT: "the caller has left the bus: {action}",
}
#: How the bus says that it has no polkit and cannot start it, itself or by systemd.
_ABSENT: Final = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",
)


@dataclass(slots=True, eq=False)
class _Question:
    """One question to polkit. ``verdict`` is done, or cancelled, as soon as nobody waits any more."""

    caller: Caller
    action: Action | LogindAction
    details: dict[str, str]
    interactive: bool
    cancellation_id: str
    verdict: asyncio.Future[_Verdict] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, verdict: _Verdict) -> None:
        if not self.verdict.done():
            self.verdict.set_result(verdict)


class Authority:
    """Decides by polkit what callers may do; root and ``own_uid`` may do everything.

    Questions run as tasks of ``tasks``. ``dialog_timeout`` and ``silent_timeout``: seconds to wait for an
    answer with and without interaction.
    """

    def __init__(
        self,
        connection: Connection,
        tasks: asyncio.TaskGroup,
        own_uid: int,
        *,
        dialog_timeout: float = DIALOG_TIMEOUT,
        silent_timeout: float = SILENT_TIMEOUT,
    ) -> None:
        self._connection = connection
        self._tasks = tasks
        self._trusted = frozenset({0, own_uid})
        self._timeouts = {True: dialog_timeout, False: silent_timeout}
        self._waiting = Slots("authorisations", per_uid=WAITING_PER_UID, total=WAITING_IN_ALL)
        self._cancelling = asyncio.Semaphore(_CANCELLATIONS)
        self._last_id = 0

    def trusts(self, uid: int) -> bool:
        """Whether ``uid`` may do everything without polkit being asked."""
        return uid in self._trusted

    async def authorize(
        self,
        caller: Caller,
        action: Action | LogindAction,
        details: Mapping[str, str] | None = None,
        *,
        interactive: bool,
    ) -> None:
        """Return if ``caller`` may do ``action``; it may have taken minutes, so look at the world again.

        ``details`` are for the administrator's rules and for the dialog: "operation" (the kind of the job),
        "image", "image-digest", "deployment". ``interactive``: the caller allows that somebody is asked.

        Raises ``AccessDenied`` if not, or if polkit does not say so in time; ``AuthorizationRequired`` if
        somebody has to authenticate, and cannot be asked; ``LimitsExceeded`` if too many questions wait
        already; ``InvalidArgs`` if a detail is not fit for a dialog.
        """
        if self.trusts(caller.uid):
            return
        if not _UNIQUE_NAME.match(caller.name):
            raise AccessDenied("only a unique name says who calls")
        checked = _checked(action, details or {})
        self._last_id += 1
        question = _Question(caller, action, checked, interactive, str(self._last_id))
        self._waiting.take(caller.uid)
        asking = self._ask(question)
        try:
            self._tasks.create_task(asking)
        except RuntimeError:
            asking.close()
            self._waiting.free(caller.uid)
            raise AccessDenied("the service is stopping") from None
        try:
            async with asyncio.timeout(self._timeouts[interactive]):
                verdict = await question.verdict
        except TimeoutError:
            _logger.info("authorization.timeout", action=str(action), uid=caller.uid)
            raise AccessDenied(f"nobody authorised this in time: {action}") from None
        _judge(question, verdict)

    async def _ask(self, question: _Question) -> None:
        """Ask, and stay until polkit has answered, even if nobody waits for that any more.

        So long the bus counts a pending reply of ours, and so long the user's place is taken: users who come
        and go cannot use up the replies. Polkit's leaving the bus is an answer too.
        """
        with ExitStack() as place:
            place.callback(self._waiting.free, question.caller.uid)
            try:
                async with self._watched(question), asyncio.TaskGroup() as own:
                    if question.verdict.done():
                        return
                    canceller = own.create_task(self._cancel_when_settled(question))
                    try:
                        verdict = await self._check(question)
                    finally:
                        canceller.cancel()
                    # Before anybody hears of it, so that who asks again at once finds the place free.
                    place.close()
                    question.settle(verdict)
            except BusError as error:
                _logger.warning("authorization.failed", error=error.name, detail=error.message)
            except Exception:  # a mistake of ours costs this call, not all that the service does
                _logger.exception("authorization.failed", action=str(question.action))
            finally:
                question.settle(_Verdict.FAILED)

    async def _check(self, question: _Question) -> _Verdict:
        try:
            reply = await self._connection.call(
                POLKIT,
                AUTHORITY_PATH,
                AUTHORITY,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [
                    ["system-bus-name", {"name": Variant("s", question.caller.name)}],
                    str(question.action),
                    question.details,
                    ALLOW_USER_INTERACTION if question.interactive else 0,
                    question.cancellation_id,
                ],
                timeout=math.inf,
            )
        except BusError as error:
            if not question.verdict.done():
                _logger.warning(
                    "authorization.failed",
                    action=str(question.action),
                    uid=question.caller.uid,
                    error=error.name,
                    detail=error.message,
                )
            return _Verdict.ABSENT if error.name.startswith(_ABSENT) else _Verdict.FAILED
        verdict = _understood(reply)
        if verdict is _Verdict.FAILED:
            _logger.warning("authorization.malformed", action=str(question.action), uid=question.caller.uid)
        return verdict

    async def _cancel_when_settled(self, question: _Question) -> None:
        """Take the question back once nobody waits, so that a dialog goes away.

        This is cancelled itself when polkit answers.
        """
        await asyncio.wait([question.verdict])
        async with self._cancelling:
            with suppress(BusError):
                await self._connection.call(
                    POLKIT,
                    AUTHORITY_PATH,
                    AUTHORITY,
                    "CancelCheckAuthorization",
                    "s",
                    [question.cancellation_id],
                    timeout=math.inf,
                )

    @asynccontextmanager
    async def _watched(self, question: _Question) -> AsyncIterator[None]:
        """Settle the question when its caller leaves the bus.

        A caller who left before the bus knows of the rule is unknown to polkit as well: unique names are
        never used twice.
        """
        name = question.caller.name
        rule = f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{name}'"
        unsubscribe = self._connection.on_signal(partial(_departed, question))
        try:
            await self._connection.add_match(rule)
            yield
            # Not when cancelled: the service stops then, and the bus forgets its rules with it.
            with suppress(BusError):
                await self._connection.remove_match(rule)
        finally:
            unsubscribe()


def _departed(
    question: _Question, _path: str, interface: str, member: str, body: list[Any], sender: str
) -> None:
    if sender == BUS and interface == BUS and member == "NameOwnerChanged":
        name, _, new_owner = body
        if name == question.caller.name and not new_owner:
            question.settle(_Verdict.LEFT)


def _checked(action: Action | LogindAction, details: Mapping[str, str]) -> dict[str, str]:
    """``details`` for polkit, with a message for the dialog; raises ``InvalidArgs``."""
    if len(details) > _MAX_DETAILS:
        raise InvalidArgs(f"more than {_MAX_DETAILS} details of an authorisation")
    for key, value in details.items():
        if not _DETAIL_KEY.match(key):
            raise InvalidArgs(f"detail {key[:32]!a} of an authorisation has an unusable name")
        if len(value) > _MAX_DETAIL or not value.isprintable():
            raise InvalidArgs(f"{key} is too long or has control characters")
    checked = dict(details)
    message = _MESSAGES.get(details.get("operation", ""))
    if message is not None and isinstance(action, Action) and _SHOWABLE.match(details.get("image", "")):
        checked["polkit.message"] = message
    return checked


def _understood(reply: list[Any]) -> _Verdict:
    """What a reply of type (bba{ss}) says; whatever is of another form says nothing."""
    match reply:
        case [[bool(authorized), bool(challenge), dict(details)]]:
            if not all(isinstance(text, str) for item in details.items() for text in item):
                return _Verdict.FAILED
        case _:
            return _Verdict.FAILED
    if authorized:
        # Nobody is both authorized and still to be challenged.
        return _Verdict.FAILED if challenge else _Verdict.GRANTED
    if challenge:
        return _Verdict.CHALLENGE
    return _Verdict.DISMISSED if details.get("polkit.dismissed") else _Verdict.DENIED


def _judge(question: _Question, verdict: _Verdict) -> None:
    """Return for a yes, and raise the error for anything else."""
    _logger.info(
        "authorization.answered",
        verdict=verdict.value,
        action=str(question.action),
        uid=question.caller.uid,
        interactive=question.interactive,
    )
    if verdict is _Verdict.GRANTED:
        return
    if verdict is _Verdict.CHALLENGE:
        missing = ", and no authentication agent can ask for it" if question.interactive else ""
        raise AuthorizationRequired(f"authentication is required{missing}: {question.action}")
    if verdict is _Verdict.DENIED and question.interactive:
        # polkit does not tell a wrong password from a rule that says no.
        raise AccessDenied(f"the system's policy forbids it, or the authentication failed: {question.action}")
    raise AccessDenied(_REASONS[verdict].format(action=question.action))
