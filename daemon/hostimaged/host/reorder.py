"""Changes of the live menu alone: roll back, choose the default, delete, set kernel arguments.

The new menu is written whole and exchanged with the live one in one step, which is the commit point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.cmdline import Cmdline, Parameter, validate_arguments
from hostimaged.boot.loader import Bootloader
from hostimaged.errors import AlreadyBooted, BootLoaderError, NoRollback, PreconditionFailed
from hostimaged.host import bootcheck, cleanup, journal
from hostimaged.host.bootsets import digest
from hostimaged.host.journal import Operation, Transaction
from hostimaged.host.menu import live_menu, staged_menu
from hostimaged.host.model import Role
from hostimaged.host.recover import settle
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hostimaged.host.menu import Menu
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import DeploymentId

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = (
    "activate.journal",
    "unstage.marker",
    "discard.state",
    "unstage.entries",
    "activate.entries",
    "discard.artifact",
    "activate.done",
)


def begin(session: Session) -> HostState:
    """The host under the exclusive lock, after recovery: what an operation decides from."""
    session.reporter.phase(Phase.STAGING)
    return settle(session)


def rollback(session: Session) -> dict[str, Any]:
    """Let the rollback deployment boot next; what is staged is dropped, as it would win.

    ``result`` is ``queued``, or ``already-queued``. Raises ``NoRollback``.
    """
    state = begin(session)
    if state.rollback_queued and state.staged_deployment is None:
        return {"result": "already-queued", "deployment": str(_default(state))}
    target = state.rollback_deployment
    if target is None or target.live is None:
        raise NoRollback("there is no deployment to roll back to")
    activate(session, state, live_menu(state).first(target.id), target=target.id, drop_staged=True)
    return {"result": "queued", "deployment": str(target.id)}


def cancel_rollback(session: Session) -> dict[str, Any]:
    """Let the booted deployment boot next again; ``result`` is ``cancelled`` or ``not-queued``."""
    state = begin(session)
    booted = state.booted_deployment
    if booted is None:
        raise PreconditionFailed("this host is not booted from a deployment")
    if not state.rollback_queued:
        return {"result": "not-queued", "deployment": str(booted.id)}
    activate(session, state, live_menu(state).first(booted.id), target=booted.id)
    return {"result": "cancelled", "deployment": str(booted.id)}


def make_default(session: Session, id_: DeploymentId) -> dict[str, Any]:
    """Let a deployment that has an entry boot next; ``result`` is ``default`` or ``already-default``.

    What is staged is dropped. Raises ``NoSuchDeployment`` and ``PreconditionFailed``.
    """
    state = begin(session)
    row = state.get(id_)
    if row.role is Role.STAGED:
        raise PreconditionFailed(f"deployment {id_} is staged: it becomes the default at shutdown")
    if row.live is None:
        raise PreconditionFailed(f"deployment {id_} has no boot entry")
    if row.default and state.staged_deployment is None:
        return {"result": "already-default", "deployment": str(id_)}
    if row.obstacle is not None:
        raise PreconditionFailed(f"deployment {id_} would not start: {row.obstacle.text}")
    activate(session, state, live_menu(state).first(id_), target=id_, drop_staged=True)
    return {"result": "default", "deployment": str(id_)}


def delete(session: Session, id_: DeploymentId) -> dict[str, Any]:
    """Remove a deployment with its entry, state and kernel; ``result`` is ``deleted`` or ``unstaged``.

    Raises ``AlreadyBooted`` for the one that runs, ``PreconditionFailed`` for a pinned one.
    """
    state = begin(session)
    session.reporter.phase(Phase.DELETING)
    row = state.get(id_)
    if state.booted is not None and id_ in (state.booted.id, state.booted.cmdline_id):
        raise AlreadyBooted(f"deployment {id_} is running and cannot be deleted")
    if row.pinned:
        raise PreconditionFailed(f"deployment {id_} is pinned")
    menu = live_menu(state)
    if row.role is Role.STAGED and menu.item(id_) is None:
        cleanup.unstage(session, state)
        return {"result": "unstaged", "deployment": str(id_)}
    if menu.item(id_) is None:
        cleanup.discard(session, [id_])
        return {"result": "deleted", "deployment": str(id_)}
    rest = menu.without(id_)
    if not rest.items:
        raise PreconditionFailed(f"deployment {id_} is the only one that can be booted")
    if row.role is not Role.STAGED and (staged := staged_menu(state)).item(id_) is not None:
        # Or the shutdown would bring it back.
        files = staged.without(id_).render(state.dirs.loader, is_menu=state.sets.is_menu)
        session.store(state).write_staged(files)
        session.reporter.at("delete.staged")
    activate(session, state, rest, target=id_, discard=[id_], drop_staged=row.role is Role.STAGED)
    return {"result": "deleted", "deployment": str(id_)}


def set_kernel_arguments(session: Session, add: Iterable[str], remove: Iterable[str]) -> dict[str, Any]:
    """Change the arguments of the deployment that boots next; ``result`` is ``changed`` or ``unchanged``.

    That is the staged one, locked or not, else the default. The others keep theirs. Raises ``InvalidArgs``,
    ``PreconditionFailed`` for an argument to remove that is not there, ``BootLoaderError`` for a UKI.
    """
    added, removing = tuple(add), validate_arguments(remove)
    validate_arguments(added)
    state = begin(session)
    # What GRUB would expand or split is not added; what is there already can be taken away.
    adding = validate_arguments(added, grub=state.dirs.loader is not Bootloader.SYSTEMD)
    staged = state.staged_deployment
    row = staged or state.default_deployment
    if row is None:
        raise PreconditionFailed("there is no deployment")
    menu = staged_menu(state) if staged is not None and staged.staged is not None else live_menu(state)
    item = menu.item(row.id)
    if item is None:
        raise BootLoaderError(f"deployment {row.id} has no boot entry")
    options = changed_arguments(item.options, adding, removing)
    result = {"deployment": str(row.id), "kernel-arguments": options}
    if options == item.options:
        return {"result": "unchanged", **result}
    changed = menu.having([each.with_options(options) if each.id == row.id else each for each in menu.items])
    if staged is not None and staged.staged is not None:
        files = changed.render(state.dirs.loader, is_menu=state.sets.is_menu)
        session.store(state).write_staged(files)
        session.steady().reporter.at("activate.entries")
    else:
        activate(session, state, changed, target=row.id)
    return {"result": "changed", **result}


def changed_arguments(options: str, add: Sequence[Parameter], remove: Sequence[Parameter]) -> str:
    """``options`` without ``remove``, with ``add``; raises ``PreconditionFailed`` for what is not there."""
    cmdline = Cmdline.parse(options)
    for parameter in remove:
        if parameter not in cmdline.parameters:
            raise PreconditionFailed(f"there is no kernel argument {parameter}")
    return str(cmdline.removing(remove).adding(add))


def activate(
    session: Session,
    state: HostState,
    menu: Menu,
    *,
    target: DeploymentId,
    discard: Sequence[DeploymentId] = (),
    drop_staged: bool = False,
) -> None:
    """Replace the live menu by ``menu``; then the state of ``discard`` goes.

    Raises before the commit point with nothing changed, but that what was staged may be gone.
    """
    files = menu.render(state.dirs.loader, is_menu=state.sets.is_menu)
    live = None if state.sets.live is None else state.sets.live.raw
    path = session.paths.transaction
    journal.write(
        path,
        Transaction(
            Operation.ACTIVATE,
            session.boot_id,
            session.now(),
            before=digest(live),
            after=digest(files),
            target=target,
            discard=tuple(discard),
        ),
    )
    session.reporter.at("activate.journal")
    if drop_staged:
        cleanup.unstage(session, state)
    session.store(state).replace_live(files)
    session = session.steady()
    bootcheck.expect(session, menu.items[0].id)
    session.reporter.at("activate.entries")
    cleanup.discard(session, discard)
    journal.remove(path)
    session.reporter.at("activate.done")


def _default(state: HostState) -> DeploymentId | None:
    default = state.default_deployment
    return None if default is None else default.id
