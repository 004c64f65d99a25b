"""What an interrupted operation left, finished or taken back: before the next one, and as a job of its own.

The journal says what was planned and what the facts were. The facts now decide: those of after the commit
point, then what remained is done; those of before it, then what was made goes; neither, then another tool has
acted meanwhile, and only what is proved to be ours and serves nobody goes. Everything here may be interrupted
and repeated. Called under the exclusive lock of the repository.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.errors import BootLoaderError, CorruptRepository
from hostimaged.host import cleanup, etcmerge, journal, statedirs
from hostimaged.host.adopt import adopt
from hostimaged.host.bootfs import directory, told
from hostimaged.host.bootsets import digest
from hostimaged.host.journal import Operation
from hostimaged.host.marker import Marker
from hostimaged.host.model import ProblemId, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.host.bootsets import RawSet
    from hostimaged.host.entries import EntrySet
    from hostimaged.host.journal import Transaction
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import DeploymentId


def settle(session: Session) -> HostState:
    """The host under the exclusive lock, as an operation may decide from it.

    What was interrupted is finished or taken back, and deployments of an older bootc are adopted. Raises
    ``LockTimeout``, and as ``recover`` does.
    """
    state = session.exclusive()
    recover(session, state)
    state = session.state()
    if any(
        done.tagged or done.named or done.digested for done in adopt(session.paths, session.repository, state)
    ):
        state = session.state()
    return state


def recover(session: Session, state: HostState) -> list[DeploymentId]:
    """Finish or take back what was interrupted; says of which deployments the state was removed.

    Removes temporary names, kernels that nothing starts, and a staged set without a marker: after a power cut
    nothing is staged any more.
    Raises ``BootLoaderError`` or ``CorruptRepository`` where it is not known what must stay, and nothing is
    done then; ``JournalError`` for a journal that is damaged.
    """
    _require_known(state)
    transaction = journal.read(session.paths.transaction)
    cleanup.remove_temporary(session, state)
    removed: list[DeploymentId] = []
    if transaction is not None:
        removed += _finish(session, state, transaction)
        session.reporter.at("recover.finished")
        journal.remove(session.paths.transaction)
        state = session.state()
    if state.marker is None and state.sets.staged is not None:
        removed += cleanup.unstage(session, state)
        state = session.state()
    for row in state.deployments:
        if row.live is not None and row.role is not Role.STAGED:
            _clean_etc(session, row.id, etcmerge.discard)
    cleanup.sweep_artifacts(session, state)
    session.reporter.at("recover.done")
    return removed


def _require_known(state: HostState) -> None:
    """What could not be read must not pass for what is not there."""
    if state.sets.unreadable:
        raise BootLoaderError(f"the boot entries cannot be read: {state.sets.unreadable}")
    for problem in state.problems:
        if problem.id in (ProblemId.BOOTED_UNKNOWN, ProblemId.MARKER_DAMAGED):
            raise BootLoaderError(f"it is not known what runs, or what is staged: {problem.text}")
        if problem.id is ProblemId.REPOSITORY:
            raise CorruptRepository(f"it is not known what is pinned: {problem.text}")


def _finish(session: Session, state: HostState, transaction: Transaction) -> list[DeploymentId]:
    live, staged = digest(_raw(state.sets.live)), digest(_raw(state.sets.staged))
    match transaction.operation:
        case Operation.STAGE:
            committed = state.marker is not None and state.marker.depl_id == transaction.target
            if committed and staged == transaction.after:
                return []
            if not committed and transaction.after and staged == transaction.after:
                session.store(state).remove_staged()
            return _undo(session, transaction)
        case Operation.FINALIZE:
            return _finish_finalize(session, state, transaction, live, staged)
        case Operation.ACTIVATE | Operation.DEPLOY:
            if live == transaction.after:
                return cleanup.discard(session, transaction.discard)
            return _undo(session, transaction)
        case Operation.UPGRADE:
            from hostimaged.oci.upgrade import upgrade_images

            upgrade_images(session.repository, session.reporter)
            return []
        case Operation.COLLECT:
            # The rest is garbage as it was: the next collection finds it.
            return cleanup.discard(session, transaction.discard)


def _undo(session: Session, transaction: Transaction) -> list[DeploymentId]:
    """Take away what the transaction made, where nothing refers to it."""
    if transaction.target is None or not transaction.state_dir:
        return []
    return cleanup.discard(session, [transaction.target])


def _finish_finalize(
    session: Session, state: HostState, transaction: Transaction, live: str, staged: str
) -> list[DeploymentId]:
    ours = state.marker is not None and state.marker.depl_id == transaction.target
    if live == transaction.after:
        # The exchange is done: the old set must not be taken for a staged one, and exchanged again.
        if ours:
            session.remove_marker()
        session.reporter.at("recover.marker")
        if staged and staged == transaction.before:
            session.store(state).remove_staged()
    elif live == transaction.before:
        if ours and transaction.target is not None:
            # The marker was locked for the exchange, which did not come.
            session.write_marker(Marker(transaction.target, finalization_locked=False))
        _clean_etc(session, transaction.target, etcmerge.undo)
    elif not _is_started(state, transaction.target):
        # Another tool has acted, but has not activated it: of the merge nothing is used.
        _clean_etc(session, transaction.target, etcmerge.undo)
    return []


def _is_started(state: HostState, id_: DeploymentId | None) -> bool:
    """Whether a deployment runs, or is in the menu."""
    live = () if state.sets.live is None else state.sets.live.ids
    return id_ in live or (state.booted is not None and state.booted.id == id_)


def _clean_etc(session: Session, target: DeploymentId | None, clean: Callable[[int], None]) -> None:
    """Let a merge of ``/etc`` be done, or undone, if the deployment is still there."""
    if target is None:
        return
    path = statedirs.state_directory(session.paths, target)
    if path.is_dir():
        with told(f"cannot clean up {path}"), directory(path) as fd:
            clean(fd)


def _raw(entries: EntrySet | None) -> RawSet | None:
    return None if entries is None else entries.raw
