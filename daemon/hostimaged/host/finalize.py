"""Finalizing, at shutdown: ``/etc`` is merged and the staged menu becomes the live one (boot-entries.md 10).

Runs without a bus, under both locks. bootc may have a finalizer of its own on the same host: two exchanges
would undo each other. So the marker is locked before the exchange, which bootc's heeds, and removed after it;
whoever comes second finds nothing to do.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.files import TreeFiles
from hostimaged.errors import HostimageError, PreconditionFailed
from hostimaged.host import bootcheck, etcmerge, journal, statedirs
from hostimaged.host.bootfs import directory, told
from hostimaged.host.bootsets import digest
from hostimaged.host.etctree import open_image_tree, subdirectory
from hostimaged.host.journal import Operation, Transaction
from hostimaged.host.marker import Marker
from hostimaged.host.menu import live_menu, staged_menu
from hostimaged.host.recover import recover
from hostimaged.host.setuproot import SetupRoot
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from hostimaged.host.etcplan import MergePlan
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.host.session import Session

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = (
    "finalize.started",
    "finalize.journal",
    "etc-merge.planned",
    "etc-merge.built",
    "etc-merge.synced",
    "etc-merge.exchanged",
    "finalize.merged",
    "finalize.locked",
    "finalize.activated",
    "finalize.marker",
    "finalize.entries",
    "finalize.done",
)


def finalize(session: Session) -> dict[str, Any]:
    """Activate what is staged. ``result`` is ``finalized``, ``nothing-staged`` or ``download-only``.

    Raises ``PreconditionFailed`` for conflicts in ``/etc`` and for a deployment that would not start,
    ``LockTimeout`` and what writing raises: then the old order stays, and what is staged stays staged.
    """
    session.reporter.phase(Phase.FINALIZING)
    recover(session, session.exclusive())
    state = session.state()
    session.reporter.at("finalize.started")
    row = state.staged_deployment
    if state.marker is None or row is None or state.sets.staged is None:
        return {"result": "nothing-staged"}
    if state.marker.finalization_locked:
        # It may be bootc that staged it.
        bootcheck.hold_back(session, row.id, held=True)
        return {"result": "download-only", "deployment": str(row.id)}
    if row.obstacle is not None or row.staged is None:
        reason = "it has no boot entry" if row.obstacle is None else row.obstacle.text
        raise PreconditionFailed(f"deployment {row.id} would not start: {reason}")
    state = _with_others_of_now(session, state)
    path = session.paths.transaction
    try:
        journal.write(path, _transaction(session, state, row))
        session.reporter.at("finalize.journal")
        plan = _merge(session, state, row)
        session.reporter.at("finalize.merged")
        _activate(session, state, row)
    except (HostimageError, OSError):
        with contextlib.suppress(HostimageError, OSError):
            recover(session.steady(), session.state())
        raise
    journal.remove(path)
    session.steady().reporter.at("finalize.done")
    summary = {} if plan is None else {f"etc-{name}": count for name, count in plan.summary.items()}
    return {"result": "finalized", "deployment": str(row.id), **summary}


def _with_others_of_now(session: Session, state: HostState) -> HostState:
    """Take what others have in the menu as it is now, not as it was when the menu was staged."""
    staged = staged_menu(state)
    menu = staged.with_others_of(live_menu(state))
    if menu == staged:
        return state
    session.store(state).write_staged(menu.render(state.dirs.loader, is_menu=state.sets.is_menu))
    session.reporter.at("finalize.others")
    return session.state()


def _transaction(session: Session, state: HostState, row: Deployment) -> Transaction:
    live = None if state.sets.live is None else state.sets.live.raw
    staged = None if state.sets.staged is None else state.sets.staged.raw
    return Transaction(
        Operation.FINALIZE,
        session.boot_id,
        session.now(),
        before=digest(live),
        after=digest(staged),
        target=row.id,
    )


def _merge(session: Session, state: HostState, row: Deployment) -> MergePlan | None:
    """Carry the administrator's changes over; None on a host that does not run from a deployment."""
    if state.booted is None:
        return None
    repository = session.repository
    # Looked up as needed: to read two whole trees takes seconds that a shutdown has better use for.
    pristine, new = open_image_tree(repository, state.booted.id), open_image_tree(repository, row.id)
    state_directory = statedirs.state_directory(session.paths, row.id)
    with (
        told("cannot merge /etc"),
        directory(session.paths.etc) as current,
        directory(state_directory) as target,
    ):
        return etcmerge.merge(
            subdirectory(pristine, b"etc"),
            current,
            subdirectory(new, b"etc"),
            target,
            booted_mode=SetupRoot.load(TreeFiles(pristine, repository)).etc,
            mode=SetupRoot.load(TreeFiles(new, repository)).etc,
            reporter=session.reporter,
        )


def _activate(session: Session, state: HostState, row: Deployment) -> None:
    store = session.store(state)
    session.write_marker(Marker(row.id, finalization_locked=True))
    session.reporter.at("finalize.locked")
    store.activate()
    session = session.steady()
    bootcheck.expect(session, row.id)
    session.reporter.at("finalize.activated")
    session.remove_marker()
    session.reporter.at("finalize.marker")
    store.remove_staged()
    session.reporter.at("finalize.entries")
    session.expect_garbage()
    # What the merge of /etc left is removed after the next boot (recover): a shutdown has no time for it.
