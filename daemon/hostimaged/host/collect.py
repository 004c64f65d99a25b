"""Collecting garbage: everything on the host and in the repository that no deployment and no tag needs.

What stays is kept by tags, made before anything is removed, so that whoever collects next keeps it too. All
that the decision needs is read before; it counts only if it was read under the exclusive lock. Things go from
the top down, each group on the device before the next: whatever interrupts it, what is left is whole, and
doing it again ends the work. Facts: operations.md 7.5.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository, gc
from hostimaged.composefs.repository.leftovers import remove_leftovers
from hostimaged.errors import BootLoaderError, HostimageError
from hostimaged.host import journal, statedirs
from hostimaged.host.adopt import adopt
from hostimaged.host.bootfs import told
from hostimaged.host.collectplan import Plan, Rules, make_plan
from hostimaged.host.collectroots import find_roots
from hostimaged.host.journal import MAX_DISCARDED, Operation, Transaction
from hostimaged.host.menu import Menu, live_menu, staged_menu
from hostimaged.host.read import read_host
from hostimaged.host.session import optional_verity
from hostimaged.host.tags import MadeTags, bootc_tag, image_ref, stream_ref, tag_deployment
from hostimaged.oci.commit import finish_interrupted
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.composefs.repository.gc import GcResult, Marked
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``, in the order of work; those of ``gc.mark`` and ``gc.sweep`` come between.
FAULT_POINTS: Final = (
    "collect.begun",
    "collect.tag",
    "collect.tagged",
    "gc.mark",
    "collect.marked",
    "collect.journal",
    "collect.marker",
    "collect.entries",
    "collect.state",
    "collect.states",
    "collect.untag",
    "collect.untagged",
    "collect.artifact",
    "collect.artifacts",
    "gc.refs",
    "gc.links",
    "gc.synced",
    "gc.objects",
    "collect.swept",
    "collect.store",
    "collect.stored",
    "collect.done",
)
#: Names of each kind that a result tells; there are rarely more than a few.
_TOLD: Final = 100
_NO_RULES: Final = Rules()


def collect(session: Session, rules: Rules = _NO_RULES) -> dict[str, Any]:
    """Collect garbage. ``result`` is ``collected``, ``nothing``, or ``kept``: nothing was removed, as
    ``reasons`` tell.

    Raises ``LockTimeout``, and what writing raises; then part of it is done, and the rest is as before.
    """
    session.reporter.phase(Phase.DELETING)
    state = _settled(session, session.exclusive())
    session.reporter.at("collect.begun")
    repository = session.repository
    plan = make_plan(session.paths, repository, state, rules, now=session.now())
    made = _make_missing(session, plan)
    session.reporter.at("collect.tagged")
    if plan.roots.doubts:
        return _kept(plan, plan.roots.doubts) | made
    adopt(session.paths, repository, state)
    marked = _mark(repository, plan, session.reporter)
    if marked.damage:
        return _kept(plan, [each.text for each in marked.damage]) | made
    session.reporter.at("collect.marked")
    path = session.paths.transaction
    journal.write(path, _transaction(session, plan))
    _remember_store(session, plan)
    session.reporter.at("collect.journal")
    _remove_deployments(session, state, plan)
    _remove_tags(session, plan)
    for each in plan.artifacts:
        each.remove()
        session.reporter.at("collect.artifact")
    session.reporter.at("collect.artifacts")
    # What was left out when it was marked is gone now, and the lock was never given up.
    marked = replace(marked, without_refs=frozenset())
    swept = gc.sweep(repository, marked, dry_run=False, reporter=session.reporter)
    remove_leftovers(repository)
    repository.sync()
    session.reporter.at("collect.swept")
    left = _remove_from_store(session, plan)
    session.reporter.at("collect.stored")
    journal.remove(path)
    with told(f"cannot remove {session.paths.collection_due}"):
        session.paths.collection_due.unlink(missing_ok=True)
    session.steady().reporter.at("collect.done")
    return _result(plan, marked, swept) | left | made


def make_room(
    paths: HostPaths,
    rules: Rules = _NO_RULES,
    *,
    now: int,
    lock_timeout: float,
    reporter: Reporter,
) -> int:
    """Remove objects that nothing keeps, and write nothing at all: bytes of what went.

    For a disk without the room to collect in good order, which begins with what stays. In doubt, or where
    there is damage, nothing goes. Raises ``LockTimeout``, ``ReadOnly`` and ``StorageError``.
    """
    with Repository.open(
        paths.repository,
        exclusive=True,
        lock_timeout=lock_timeout,
        insecure=optional_verity(paths),
        check=lambda: reporter.at("host.locking"),
    ) as repository:
        plan = make_plan(paths, repository, read_host(paths, repository), rules, now=now)
        if plan.roots.doubts:
            return 0
        marked = gc.mark(repository, roots=plan.root_names, reporter=reporter)
        if marked.damage:
            return 0
        return gc.sweep(repository, marked, dry_run=False, reporter=reporter).objects_bytes


def dry_run(
    paths: HostPaths,
    repository: Repository,
    state: HostState,
    rules: Rules = _NO_RULES,
    *,
    now: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """What ``collect`` would say of the host that ``state`` is of; nothing is changed.

    The shared lock is enough. What was interrupted is not settled, and so counts as kept.
    """
    plan = make_plan(paths, repository, state, rules, now=now)
    if plan.roots.doubts:
        return _kept(plan, plan.roots.doubts)
    marked = _mark(repository, plan, reporter)
    if marked.damage:
        return _kept(plan, [each.text for each in marked.damage])
    return _result(plan, marked, gc.sweep(repository, marked, dry_run=True, reporter=reporter))


def _settled(session: Session, state: HostState) -> HostState:
    """The host after what was interrupted is finished; in doubt as it is."""
    if find_roots(session.paths, session.repository, state).doubts:
        return state
    if journal.read(session.paths.transaction) is not None:
        from hostimaged.host.recover import recover

        recover(session, state)
        state = session.state()
    finish_interrupted(session.repository, session.reporter)
    return state


def _mark(repository: Repository, plan: Plan, reporter: Reporter) -> Marked:
    return gc.mark(repository, roots=plan.root_names, without_refs=plan.without_refs, reporter=reporter)


def _make_missing(session: Session, plan: Plan) -> dict[str, Any]:
    """Make the tags that are missing, durably: from now on anybody's collector keeps what they lead to."""
    made = []
    for digest in plan.missing_tags:
        with suppress(HostimageError):
            # What is too damaged to be tagged is told by what is marked.
            if tag_deployment(session.paths, session.repository, digest):
                made.append(bootc_tag(digest))
        session.reporter.at("collect.tag")
    for id_ in plan.missing_refs:
        with suppress(HostimageError):
            session.repository.name_image(str(id_), image_ref(id_))
        session.reporter.at("collect.tag")
    if plan.missing_tags or plan.missing_refs:
        session.repository.sync()
    return {"tags-made": made} if made else {}


def _transaction(session: Session, plan: Plan) -> Transaction:
    return Transaction(
        Operation.COLLECT,
        session.boot_id,
        session.now(),
        before="",
        after="",
        discard=plan.roots.orphan_states[:MAX_DISCARDED],
    )


def _remove_deployments(session: Session, state: HostState, plan: Plan) -> None:
    """What is left of deployments: the marker, entries, state directories; each is durable by itself."""
    roots = plan.roots
    if roots.orphan_marker:
        session.remove_marker()
    session.reporter.at("collect.marker")
    if roots.staged_left:
        session.store(state).remove_staged()
    _remove_entries(session, state, plan)
    session.reporter.at("collect.entries")
    for id_ in roots.orphan_states:
        statedirs.remove(session.paths, session.work, id_)
        session.reporter.at("collect.state")
    session.reporter.at("collect.states")


def _remove_entries(session: Session, state: HostState, plan: Plan) -> None:
    """Write the menus anew, as a whole, without the orphans; the staged one first, or it brings them back."""
    gone = frozenset(plan.orphan_entries)
    store, loader, is_menu = session.store(state), state.dirs.loader, state.sets.is_menu
    try:
        staged = staged_menu(state)
        if not plan.roots.staged_left and any(item.id in gone for item in staged.items):
            store.write_staged(_reduced(staged, gone).render(loader, is_menu=is_menu))
        live = live_menu(state)
        if any(item.id in gone for item in live.items):
            store.replace_live(_reduced(live, gone).render(loader, is_menu=is_menu))
    except BootLoaderError as error:
        # Files of others that could not be carried over: the entries stay, and start nothing, as before.
        session.reporter.message(error.message)


def _reduced(menu: Menu, gone: frozenset[Any]) -> Menu:
    return menu.having([item for item in menu.items if item.id not in gone])


def _remove_tags(session: Session, plan: Plan) -> None:
    """Remove our tags that keep nothing wanted, durably."""
    repository = session.repository
    for tag in plan.tags:
        repository.remove_stream_ref(stream_ref(tag))
        session.reporter.at("collect.untag")
    for id_ in plan.refs:
        repository.remove_image_ref(image_ref(id_))
        session.reporter.at("collect.untag")
    if plan.tags or plan.refs:
        repository.sync()
        MadeTags(session.paths).forget(plan.tags)
    session.reporter.at("collect.untagged")


def _remember_store(session: Session, plan: Plan) -> None:
    if plan.store.exists:
        from hostimaged.host import storecollect

        storecollect.remember(session.paths, plan.store)


def _remove_from_store(session: Session, plan: Plan) -> dict[str, Any]:
    session.reporter.at("collect.store")
    if not plan.store.anything:
        return {}
    from hostimaged.host import storecollect

    return storecollect.remove(session, plan.store)


def _kept(plan: Plan, reasons: Iterable[str]) -> dict[str, Any]:
    return {"result": "kept", "reasons": list(dict.fromkeys(reasons))[:_TOLD], **_numbers(None)} | {
        "deployments-kept": len(plan.roots.roots)
    }


def _result(plan: Plan, marked: Marked, swept: GcResult) -> dict[str, Any]:
    roots = plan.roots
    gone = {
        "states": [str(id_) for id_ in roots.orphan_states],
        "entries": [str(id_) for id_ in plan.orphan_entries],
        "tags": [*plan.tags, *(image_ref(id_) for id_ in plan.refs)],
        "artifacts": [each.name for each in plan.artifacts],
        "dangling": list(marked.dangling),
    }
    things = [*gone.values(), roots.orphan_marker, roots.staged_left, *swept.as_dict().values()]
    return {
        "result": "collected" if any([*things, plan.store.anything]) else "nothing",
        **_numbers(swept),
        "boot-bytes": sum(each.size for each in plan.artifacts),
        "deployments-kept": len(roots.roots),
        **{key: names[:_TOLD] for key, names in gone.items() if names},
        **plan.store.told(),
    }


def _numbers(swept: GcResult | None) -> dict[str, int]:
    return (swept or gc.GcResult()).as_dict()
