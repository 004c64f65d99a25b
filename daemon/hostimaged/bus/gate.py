"""The way of every guarded call: checked, its caller found out and authorised, checked again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol

from hostimaged.bus.authorization import Action, Facts, Member, reboots, required
from hostimaged.bus.limits import Slots
from hostimaged.errors import AccessDenied
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.trust import source_trust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.callers import Callers
    from hostimaged.bus.polkit import Authority, Caller
    from hostimaged.bus.requests import Request
    from hostimaged.system.paths import HostPaths

#: Calls of one user, and of all, that may be under way behind the check of who calls.
CALLS_PER_UID: Final = 64
CALLS_IN_ALL: Final = 1024
_RESERVE: Final = 64
#: How often the host may change while somebody is asked. Each time may mean another dialog.
_ROUNDS: Final = 8


class Sessions(Protocol):
    """Knows who is logged in."""

    async def other_sessions(self, uid: int) -> bool:
        """Whether users other than ``uid`` are; True as well if that is not known."""


async def _nothing(_: Caller) -> None:
    """Nothing is to be learned of the caller."""


class Gate:
    """Lets callers in whom ``authority`` allows what they ask for on the host with ``paths``.

    ``sessions`` knows who else would lose work by a reboot.
    """

    def __init__(self, callers: Callers, authority: Authority, sessions: Sessions, paths: HostPaths) -> None:
        self._callers = callers
        self._authority = authority
        self._sessions = sessions
        self._paths = paths
        self._under_way = Slots("calls", per_uid=CALLS_PER_UID, total=CALLS_IN_ALL, reserve=_RESERVE)

    @asynccontextmanager
    async def passed(
        self,
        call: MethodCall,
        prepare: Callable[[], Request],
        joined: Callable[[Caller], bool] = lambda _: False,
        learn: Callable[[Caller], Awaitable[None]] = _nothing,
    ) -> AsyncIterator[tuple[Caller, Request]]:
        """The caller and the request, while the call is carried out.

        ``prepare`` makes the request from what is known now and raises what is wrong with it; it is called
        before anybody is asked and again after every wait, so that what is let in is what was authorised.
        ``joined``: whether the caller asked for the job that is to be cancelled. ``learn`` finds out what
        carrying it out needs to know of the caller, so that nothing is waited for afterwards.

        Raises ``AccessDenied``, ``AuthorizationRequired`` and ``LimitsExceeded``.
        """
        prepare()
        caller = await self._callers.identify(call.sender)
        with self._under_way.held(caller.uid):
            await learn(caller)
            yield caller, await self._authorized(call, caller, prepare, joined)

    async def only_root(self, call: MethodCall) -> Caller:
        """The caller, if it is root or the daemon's own user; raises ``AccessDenied``."""
        caller = await self._callers.identify(call.sender)
        if not self._authority.trusts(caller.uid):
            raise AccessDenied("only root may do this")
        return caller

    async def _authorized(
        self,
        call: MethodCall,
        caller: Caller,
        prepare: Callable[[], Request],
        joined: Callable[[Caller], bool],
    ) -> Request:
        if self._authority.trusts(caller.uid):
            return prepare()
        granted: set[tuple[str, frozenset[tuple[str, str]]]] = set()
        for _ in range(_ROUNDS):
            request = prepare()
            trusted = await self._is_trusted(request)
            others = not reboots(request.options) or await self._sessions.other_sessions(caller.uid)
            if prepare() != request:
                continue
            facts = Facts(
                source_trusted=trusted,
                newest_of_tracked=request.newest,
                joined=joined(caller),
                other_sessions=others,
            )
            details = request.details
            key = frozenset(details.items())
            needed = required(request.member, request.options, facts, image=request.image)
            missing = [action for action in needed if (str(action), key) not in granted]
            if not missing:
                return request
            await self._authority.authorize(caller, missing[0], details, interactive=call.interactive)
            granted.add((str(missing[0]), key))
        raise AccessDenied("the host changes too fast to decide what may be done")

    async def _is_trusted(self, request: Request) -> bool:
        """Whether the source may be followed without a password, where that matters."""
        facts = Facts(source_trusted=True, newest_of_tracked=request.newest)
        if request.member is Member.CANCEL or Action.UPDATE not in required(
            request.member, request.options, facts, image=request.image
        ):
            return False
        if not request.reference:
            return False
        reference = ImageReference.parse(request.reference)
        return (await asyncio.to_thread(source_trust, reference, self._paths)).trusted
