"""What must stay when garbage is collected: deployments, from the lowest facts, and why nothing may go.

Nothing here depends on a status: each deployment is a root because an entry, the running system, the marker,
a pin or the journal names it, however damaged it is itself. Where a fact is in doubt, nothing is collected at
all. Facts: operations.md 7.5.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError
from hostimaged.host import journal
from hostimaged.host.entries import NOTHING
from hostimaged.host.imagefacts import ImageSource
from hostimaged.host.imginfo import read_imginfo
from hostimaged.host.model import ProblemId
from hostimaged.host.origin import read_origin
from hostimaged.host.statedirs import state_directory
from hostimaged.host.tags import GUEST_TAG, PIN_TAG, is_guest
from hostimaged.oci.images import manifest_stream, tags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.entries import SetEntry
    from hostimaged.host.journal import Transaction
    from hostimaged.host.model import HostState
    from hostimaged.ids import DeploymentId, ManifestDigest
    from hostimaged.system.paths import HostPaths

#: Problems of a host that leave unknown what is a root.
_BLINDING: Final = (
    ProblemId.BOOTED_UNKNOWN,
    ProblemId.MARKER_DAMAGED,
    ProblemId.REPOSITORY,
    ProblemId.STATE_UNREADABLE,
)


@dataclass(frozen=True, slots=True)
class Root:
    """A deployment that stays, and why, for people.

    ``manifest`` is in the repository under its name, whatever state it is in; None if none is. ``kept_by_it``
    says that it refers to the boot image.
    """

    id: DeploymentId
    reasons: tuple[str, ...]
    manifest: ManifestDigest | None = None
    kept_by_it: bool = False


@dataclass(frozen=True, slots=True)
class Roots:
    """All deployments that stay, and those of which too little is left.

    ``doubts``: why nothing may be removed, for people; empty if all is clear. ``orphan_entries`` have an
    entry and no state directory; ``orphan_states`` the other way round; ``orphan_marker``: the marker names
    one without entry. ``staged_left``: there is a staged set that nothing will activate. ``guest``: the
    repository is that of another host.
    """

    roots: tuple[Root, ...]
    doubts: tuple[str, ...]
    orphan_entries: tuple[DeploymentId, ...] = ()
    orphan_states: tuple[DeploymentId, ...] = ()
    orphan_marker: bool = False
    staged_left: bool = False
    guest: bool = False

    @property
    def ids(self) -> frozenset[DeploymentId]:
        """The deployments that stay."""
        return frozenset(root.id for root in self.roots)


def find_roots(paths: HostPaths, repository: Repository, state: HostState) -> Roots:
    """The roots of the host that ``state`` is of. Never raises for damage."""
    return _Search(paths, repository, state).run()


def counted_entries(state: HostState) -> tuple[SetEntry, ...]:
    """The entries that start something, or will: those of a staged set only while it is marked as staged."""
    staged = state.sets.staged if state.marker is not None else None
    return (*(state.sets.live or NOTHING).entries, *(staged or NOTHING).entries)


class _Search:
    """One search for the roots of a host."""

    def __init__(self, paths: HostPaths, repository: Repository, state: HostState) -> None:
        self._paths = paths
        self._repository = repository
        self._state = state
        self._images = ImageSource(repository)
        self._doubts: list[str] = []
        self._reasons: dict[DeploymentId, list[str]] = {}
        self._guest = False

    def run(self) -> Roots:
        state = self._state
        self._doubts += self._doubtful()
        entries = dict.fromkeys(entry.id for entry in counted_entries(state))
        running = set() if state.booted is None else {state.booted.id, state.booted.cmdline_id}
        orphans = [id_ for id_ in entries if not self._has_state(id_)]
        self._doubts += [
            f"the deployment that runs, {id_}, has no state directory" for id_ in orphans if id_ in running
        ]
        orphan_entries = tuple(id_ for id_ in orphans if id_ not in running and self._is_removable(id_))
        self._collect_reasons(set(entries) - set(orphan_entries))
        orphan_states = tuple(sorted(self._orphan_states(set(entries))))
        marked = None if state.marker is None else state.marker.depl_id
        return Roots(
            tuple(self._root(id_) for id_ in sorted(self._reasons)),
            tuple(dict.fromkeys(self._doubts)),
            tuple(sorted(orphan_entries)),
            orphan_states,
            orphan_marker=marked is not None and marked not in entries,
            staged_left=state.marker is None and state.sets.staged is not None,
            guest=self._guest,
        )

    # --- doubts --------------------------------------------------------------------------------------------

    def _doubtful(self) -> Iterator[str]:
        """Why it is not known what has to stay."""
        state = self._state
        if state.sets.unreadable:
            yield f"the boot entries cannot be read: {state.sets.unreadable}"
        elif state.sets.live is None or not state.sets.live.entries:
            yield "no boot directory with entries of deployments was found"
        for each in (state.sets.live, state.sets.staged):
            yield from (foreign.problem for foreign in (each or NOTHING).foreign if foreign.problem)
        yield from (problem.text for problem in state.problems if problem.id in _BLINDING)
        booted = state.booted
        if booted is not None and all(entry.id != booted.id for entry in state.sets.entries):
            yield (
                f"no boot entry starts the deployment that runs, {booted.id}: another boot directory may be "
                "in use"
            )
        live_host = self._paths.scratch_root is None and self._paths.cmdline is not None
        if booted is None and live_host:
            yield "this host does not run from a deployment"
        yield from self._sharing()

    def _sharing(self) -> Iterator[str]:
        try:
            self._guest = is_guest(self._paths)
            if self._guest:
                yield f"the repository at {self._paths.repository} has its place elsewhere: others may use it"
            guest = next((name for name in tags(self._repository) if name.startswith(GUEST_TAG)), None)
        except HostimageError as error:
            yield error.message
            return
        if guest is not None:
            yield f"another host keeps its deployments in this repository: it made the tag {guest}"

    def _has_state(self, id_: DeploymentId) -> bool:
        path = state_directory(self._paths, id_)
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._doubts.append(f"{path} cannot be looked at: {error.strerror}")
        return True

    def _is_removable(self, id_: DeploymentId) -> bool:
        """Whether all entries of a deployment are files, or lines, that bootc or we made."""
        is_menu = self._state.sets.is_menu
        mine = [entry for entry in self._state.sets.entries if entry.id == id_]
        return is_menu or all(entry.file_name.startswith("bootc_") for entry in mine)

    # --- roots ---------------------------------------------------------------------------------------------

    def _collect_reasons(self, entries: set[DeploymentId]) -> None:
        state = self._state
        if state.booted is not None:
            self._keep(state.booted.id, "it runs")
            if state.booted.cmdline_id is not None and state.booted.soft_rebooted:
                self._keep(state.booted.cmdline_id, "the kernel was started with it")
        for id_ in (state.sets.live or NOTHING).ids:
            if id_ in entries:
                self._keep(id_, "it is in the boot menu")
        staged = state.sets.staged if state.marker is not None else None
        for id_ in (staged or NOTHING).ids:
            if id_ in entries:
                self._keep(id_, "it is in the boot menu of what is staged")
        if state.marker is not None and state.marker.depl_id in entries:
            self._keep(state.marker.depl_id, "it is staged")
        for row in state.deployments:
            if row.pinned:
                self._keep(row.id, "it is pinned")
        transaction = self._transaction()
        if transaction is not None:
            for each in (transaction.target, *transaction.discard):
                if each is not None and self._is_somewhere(each):
                    self._keep(each, f"an operation on it was interrupted ({transaction.operation})")

    def _keep(self, id_: DeploymentId, reason: str) -> None:
        self._reasons.setdefault(id_, []).append(reason)

    def _transaction(self) -> Transaction | None:
        try:
            return journal.read(self._paths.transaction)
        except HostimageError as error:
            self._doubts.append(error.message)
            return None

    def _is_somewhere(self, id_: DeploymentId) -> bool:
        """Whether anything of a deployment is there."""
        return self._has_state(id_) or id_.value in self._repository.images()

    def _orphan_states(self, entries: set[DeploymentId]) -> Iterator[DeploymentId]:
        """Deployments of which only the state directory is there, and of which that is certain."""
        pins = self._has_pins()
        for row in self._state.deployments:
            if row.id in entries or row.id in self._reasons:
                continue
            if pins and row.manifest_digest is None:
                # It may be what somebody pinned.
                self._keep(row.id, "it may be pinned: nobody knows which image it is")
                continue
            if os.path.lexists(self._paths.deployments / row.id.value):
                yield row.id

    def _has_pins(self) -> bool:
        try:
            return any(name.startswith(PIN_TAG) for name in tags(self._repository))
        except HostimageError:
            return True

    # --- manifests -----------------------------------------------------------------------------------------

    def _root(self, id_: DeploymentId) -> Root:
        manifest = self._manifest(id_)
        return Root(id_, tuple(self._reasons[id_]), manifest, self._keeps(manifest, id_))

    def _manifest(self, id_: DeploymentId) -> ManifestDigest | None:
        """Of the origin; else proved by what is beside it, or by the boot image."""
        digest, sidecar = None, None
        with suppress(OSError):
            directory = os.open(
                state_directory(self._paths, id_), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            try:
                with suppress(HostimageError):
                    origin = read_origin(directory, id_)
                    digest = None if origin is None else origin.manifest_digest
                with suppress(HostimageError):
                    sidecar = read_imginfo(directory, id_)
            finally:
                os.close(directory)
        try:
            if digest is not None and self._repository.has_stream(manifest_stream(digest)) is not None:
                return digest
            return self._images.prove(id_, sidecar)
        except HostimageError as error:
            self._doubts.append(f"which image deployment {id_} is cannot be told: {error.message}")
            return None

    def _keeps(self, manifest: ManifestDigest | None, id_: DeploymentId) -> bool:
        if manifest is None:
            return False
        try:
            return id_.object_id in self._images.open(manifest).config_refs.values()
        except HostimageError:
            return False
