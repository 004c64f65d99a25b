"""What guarded methods do, once their callers are let in: start a job, or change how the daemon behaves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hostimaged.bus.authorization import Member
from hostimaged.bus.requests import make_request
from hostimaged.bus.status import STILL_LOOKING
from hostimaged.errors import Busy, Internal
from hostimaged.jobs.job import Apply, Initiator, Terms
from hostimaged.jobs.operations import (
    Check,
    Collect,
    Delete,
    Diff,
    Explain,
    KernelArguments,
    Pin,
    Pull,
    Repair,
    Rollback,
    Stage,
    Switch,
    Unify,
    Unstage,
    Upgrade,
    Verify,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.callers import Callers
    from hostimaged.bus.gate import Gate
    from hostimaged.bus.holds import Holds
    from hostimaged.bus.model import Model
    from hostimaged.bus.polkit import Caller
    from hostimaged.bus.requests import Request
    from hostimaged.config import Settings
    from hostimaged.jobs.operations import Operation
    from hostimaged.jobs.queue import JobQueue


#: Seconds to wait for the first scan, within the 25 in which callers commonly want an answer: what is to be
#: done to a host depends on what is there, and on what it follows.
_PATIENCE: Final = 20.0
#: These do not.
_OF_THE_DAEMON: Final = frozenset({Member.HOLD_UPDATES, Member.SET_UPDATE_POLICY, Member.RELOAD})
_APPLY: Final = {"none": Apply.NONE, "soft-reboot": Apply.SOFT_REBOOT, "reboot": Apply.REBOOT}


class GuardedMethods:
    """Answers the guarded methods of the Manager and of deployments."""

    def __init__(
        self,
        gate: Gate,
        callers: Callers,
        model: Model,
        queue: JobQueue,
        holds: Holds,
        *,
        reload: Callable[[], Awaitable[None]],
        set_policy: Callable[[str], Awaitable[None]],
        known: Callable[[float], Awaitable[bool]],
    ) -> None:
        self._gate = gate
        self._callers = callers
        self._model = model
        self._queue = queue
        self._holds = holds
        self._reload = reload
        self._set_policy = set_policy
        self._known = known

    async def answer(self, member: Member, call: MethodCall, deployment: str = "") -> Sequence[Any]:
        """Carry out a call; ``deployment`` is the id of the object that was called.

        It may have started the daemon, so what is on the host is waited for. Raises ``Busy`` if that is not
        known yet, and as ``make_request`` and what is asked for.
        """
        if member not in _OF_THE_DAEMON and not await self._known(_PATIENCE):
            raise Busy(f"{STILL_LOOKING}: try again later")
        prepare = partial(make_request, member, call.body, self._model, deployment)
        async with self._gate.passed(call, prepare, learn=self._callers.learn_unit) as (caller, request):
            match member:
                case Member.HOLD_UPDATES:
                    await self._holds.set(*request.arguments)
                case Member.SET_UPDATE_POLICY:
                    await self._set_policy(*request.arguments)
                case Member.RELOAD:
                    await self._reload()
                case _:
                    return [await self._start(request, caller)]
        return []

    async def _start(self, request: Request, caller: Caller) -> str:
        """Path of the job that does what is asked for."""
        options = request.options
        if _APPLY[options.get("apply", "none")] is Apply.SOFT_REBOOT:
            self._model.check_soft_reboot(request)
        self._model.check_unified(request)
        self._model.check_background(request)
        job = await self._queue.submit(
            operation_of(request, self._model.settings, unified=self._model.unifies(request)),
            Initiator(caller.uid, options.get("client-id", ""), caller.name, self._callers.unit(caller)),
            Terms(
                background=options.get("background", False),
                allow_metered=options.get("allow-metered", False),
                allow_on_battery=options.get("allow-on-battery", False),
                apply=_APPLY[options.get("apply", "none")],
            ),
            queue=options.get("queue", True),
            join=not options.get("no-join", False),
        )
        return job.path


def operation_of(request: Request, settings: Settings, *, unified: bool = False) -> Operation:
    """The worker's operation for a request that starts a job; ``unified``: images go through the store."""
    options = request.options
    waits: dict[str, Any] = {"lock_timeout": settings.lock_timeout}
    accepting: dict[str, Any] = {"retry_failed": options.get("retry-failed", False)}
    staging: dict[str, Any] = {
        "download_only": options.get("download-only", False),
        "allow_downgrade": options.get("allow-downgrade", False),
        "max_entries": settings.max_live_entries,
    }
    fetching: dict[str, Any] = {
        "expect_digest": options.get("expect-digest"),
        "verity": settings.verity,
        "sharing": options.get("sharing", "auto"),
        "minimum_free": settings.minimum_free,
        "unified": unified,
    } | accepting
    match request.member:
        case Member.CHECK:
            return Check(reference=request.reference)
        case Member.PULL:
            return Pull(reference=request.reference, **fetching, **waits)
        case Member.UPGRADE:
            downloaded = options.get("from-downloaded", False)
            return Upgrade(
                reference=request.reference, from_downloaded=downloaded, **fetching, **staging, **waits
            )
        case Member.SWITCH:
            return Switch(reference=request.reference, **fetching, **staging, **waits)
        case Member.STAGE:
            return Stage(
                manifest_digest=request.digest, reference=request.reference, **accepting, **staging, **waits
            )
        case Member.SET_UNIFIED:
            (wanted,) = request.arguments
            return Unify(reference=request.reference, unified=wanted, verity=settings.verity, **waits)
        case Member.ROLLBACK:
            return Rollback(**waits)
        case Member.CANCEL_ROLLBACK:
            return Rollback(action="cancel", **waits)
        case Member.MAKE_DEFAULT:
            return Rollback(action="default", deployment=request.deployment, **waits)
        case Member.UNSTAGE:
            return Unstage(**waits)
        case Member.DELETE:
            return Delete(deployment=request.deployment, **waits)
        case Member.SET_PINNED:
            (pinned,) = request.arguments
            return Pin(deployment=request.deployment, pinned=pinned, **waits)
        case Member.SET_KERNEL_ARGUMENTS:
            add, remove = request.arguments
            return KernelArguments(add=add, remove=remove, **waits)
        case _:
            return _housekeeping(request, settings, waits)


def _housekeeping(request: Request, settings: Settings, waits: dict[str, Any]) -> Operation:
    """As ``operation_of``, of what installs nothing."""
    match request.member:
        case Member.COLLECT_GARBAGE:
            dry_run = request.options.get("dry-run", False)
            return Collect(dry_run=dry_run, **rules_of(settings), **waits)
        case Member.EXPLAIN:
            (what,) = request.arguments
            return Explain(what=what, **rules_of(settings), **waits)
        case Member.REPAIR:
            return Repair(dry_run=request.options.get("dry-run", False), **waits)
        case Member.VERIFY_REPOSITORY:
            return Verify(**waits)
        case Member.DIFF:
            (other,) = request.arguments
            return Diff(deployment=request.deployment, other=other, **waits)
        case _:
            raise Internal


def rules_of(settings: Settings) -> dict[str, Any]:
    """What the settings say to operations that decide what is garbage."""
    return {
        "tracked": settings.tracked_image,
        "keep_pulled": settings.keep_pulled,
        "minimum_free": settings.minimum_free,
    }
