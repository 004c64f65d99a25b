"""Taking away what belongs to deployments that are no more, and nothing else.

Everything here is done under the exclusive lock, reads the host again before it removes, and may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostimaged.boot import bls
from hostimaged.errors import BootLoaderError
from hostimaged.host import bootfs, marker, statedirs
from hostimaged.host.artifacts import KernelFiles, UkiFiles
from hostimaged.system import durable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hostimaged.boot.bls import Entry
    from hostimaged.host.entries import Foreign, SetEntry
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import DeploymentId


def is_referenced(state: HostState, id_: DeploymentId, *, staged: bool = True) -> bool:
    """Whether anything says that a deployment is to stay: an entry, the running host, the marker, a pin.

    What cannot be read says so too. Without ``staged`` an entry of the staged set does not count.
    """
    row = state.find(id_)
    entries = state.sets.entries if staged or state.sets.live is None else state.sets.live.entries
    return (
        bool(state.sets.unreadable)
        or (state.booted is not None and id_ in (state.booted.id, state.booted.cmdline_id))
        or (state.marker is not None and state.marker.depl_id == id_)
        or any(entry.id == id_ for entry in entries)
        or (row is not None and row.pinned)
    )


def discard(session: Session, ids: Iterable[DeploymentId]) -> list[DeploymentId]:
    """Remove the state directories of those deployments that nothing refers to; says which.

    Then kernels and UKIs that no entry starts. Points ``discard.state`` and ``discard.artifact``.
    """
    state = session.state()
    discarded = _discard_states(session, state, ids)
    sweep_artifacts(session, state)
    return discarded


def _discard_states(
    session: Session, state: HostState, ids: Iterable[DeploymentId], *, staged_too: bool = False
) -> list[DeploymentId]:
    """Remove the state of those deployments that nothing refers to; ``staged_too``: but a staged entry."""
    discarded = []
    for id_ in dict.fromkeys(ids):
        referenced = is_referenced(state, id_, staged=not staged_too)
        if not referenced and statedirs.remove(session.paths, session.work, id_):
            discarded.append(id_)
            session.expect_garbage()
        session.reporter.at("discard.state")
    return discarded


@dataclass(frozen=True, slots=True)
class DeadArtifact:
    """A kernel or UKI that no entry starts. ``size`` is in bytes."""

    place: KernelFiles | UkiFiles
    name: str
    prefixed: bool
    size: int

    def remove(self) -> None:
        """Remove it, durably. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``."""
        if self.prefixed:
            self.place.remove(self.name)
        else:
            self.place.remove_unprefixed(self.name)


def dead_artifacts(state: HostState, entries: Sequence[SetEntry]) -> list[DeadArtifact]:
    """Kernels and UKIs that none of ``entries`` starts: whoever left them, nothing uses them.

    None where the entries are in doubt: unreadable, one of them damaged, or without the running deployment.
    """
    if state.sets.unreadable or not entries or state.dirs.kernels is None:
        return []
    others = [foreign for each in (state.sets.live, state.sets.staged) if each for foreign in each.foreign]
    if any(foreign.problem for foreign in others):
        return []
    known = [entry.entry for entry in entries] + [
        parsed for foreign in others if (parsed := _parsed(foreign)) is not None
    ]
    used = {entry.artifact() for entry in known}
    if state.booted is not None:
        if not any(entry.id == state.booted.id for entry in entries):
            return []
        used |= {str(state.booted.id), str(state.booted.cmdline_id)}
    without_prefix = {entry.artifact() for entry in known if not entry.has_prefix}
    places: list[KernelFiles | UkiFiles] = [KernelFiles(state.dirs.kernels)]
    if state.dirs.ukis is not None:
        places.append(UkiFiles(state.dirs.ukis))
    dead = []
    for place in places:
        for found in place.found():
            if found.name not in used:
                size = bootfs.tree_bytes(found.path)
                dead.append(DeadArtifact(place, found.name, prefixed=True, size=size))
        dead += [
            DeadArtifact(place, name, prefixed=False, size=0)
            for name in place.unprefixed()
            if name not in without_prefix
        ]
    return dead


def sweep_artifacts(session: Session, state: HostState) -> None:
    """Remove the dead artifacts of all that has an entry."""
    for each in dead_artifacts(state, state.sets.entries):
        each.remove()
        session.reporter.at("discard.artifact")


def _parsed(foreign: Foreign) -> Entry | None:
    """An entry of somebody's own making, which may start a kernel of ours."""
    try:
        return bls.parse(foreign.data, foreign.file_name)
    except BootLoaderError:
        return None


def staged_only_bytes(session: Session, state: HostState) -> int:
    """Bytes of kernels and UKIs that go when what is staged now goes."""
    staged = set() if state.sets.staged is None else {each.artifact for each in state.sets.staged.entries}
    live = set() if state.sets.live is None else {each.artifact for each in state.sets.live.entries}
    places: list[KernelFiles | UkiFiles] = [] if state.dirs.kernels is None else [session.kernels(state)]
    if state.dirs.ukis is not None:
        places.append(session.ukis(state))
    return sum(
        bootfs.tree_bytes(found.path)
        for place in places
        for found in place.found()
        if found.name in staged - live
    )


def remove_temporary(session: Session, state: HostState) -> None:
    """Remove what a crash left under temporary names: on the boot file system, and beside files of ours."""
    paths = session.paths
    replaced = [
        paths.transaction,
        paths.pulls,
        paths.expected_boot,
        paths.failed_boots,
        paths.held_back,
        paths.made_tags,
        *statedirs.origins(paths),
    ]
    if paths.marker_dir is not None:
        replaced.append(paths.marker_dir / marker.NAME)
    for path in replaced:
        with bootfs.told(f"cannot clean up {path.parent}"):
            durable.remove_replacements(path)
    if state.dirs.loader_dir is None:
        return
    session.store(state).remove_temporary()
    if state.dirs.kernels is not None:
        session.kernels(state).remove_temporary()
    if state.dirs.ukis is not None:
        session.ukis(state).remove_temporary()


def unstage(session: Session, state: HostState) -> list[DeploymentId]:
    """Take back what is staged, the marker first: from then on nothing is; says which state went.

    The entries go after the state: as long as they are there, recovery knows what remains to be removed.
    Points ``unstage.marker``, ``discard.state``, ``unstage.entries`` and ``discard.artifact``. Nothing staged
    is fine.
    """
    staged = set() if state.sets.staged is None else set(state.sets.staged.ids)
    if state.marker is not None:
        staged.add(state.marker.depl_id)
        session.remove_marker()
        # What is not staged any more is taken away to the end.
        session = session.steady()
    session.reporter.at("unstage.marker")
    discarded = _discard_states(session, session.state(), sorted(staged), staged_too=True)
    if state.sets.staged is not None:
        session.store(state).remove_staged()
    session.reporter.at("unstage.entries")
    sweep_artifacts(session, session.state())
    return discarded
