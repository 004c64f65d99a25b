"""The plan of a three-way merge of ``/etc``: what the administrator changed, and what that does to a new one.

The trees: *pristine*, the image's ``/etc`` of the running deployment; *current*, the ``/etc`` that runs, on
disk; *new*, the ``/etc`` of the deployment to come. Whatever was added, modified or removed from pristine to
current is done to new; all else stays as new has it. Lists, order and conflicts are bootc's (its etc-merge),
save where its result loses what was changed; those places are marked.

Planning reads and writes nothing but memory, which grows with the changes and not with the trees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from hostimaged.composefs.tree import Directory, Leaf
from hostimaged.errors import LimitsExceeded, PreconditionFailed, printable
from hostimaged.host.etctree import (
    SELINUX,
    STAMP,
    Kind,
    View,
    kind_of_mode,
    kind_of_node,
    same_leaf,
    same_metadata,
)
from hostimaged.system import trees

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

#: Names in the current ``/etc``. Bounds the time of a shutdown, and the memory where all of them are new.
MAX_NAMES: Final = 1_000_000
#: Conflicts that are named in an error message.
_SHOWN: Final = 5


class Reason(StrEnum):
    """Why a change cannot be made to the new ``/etc``."""

    DIRECTORY_IS_FILE = "a directory here, but not in the new image"
    FILE_IS_DIRECTORY = "not a directory here, but one in the new image"


@dataclass(frozen=True, slots=True)
class Conflict:
    """A changed ``path``, from ``/etc`` and without a leading slash, that the new image has otherwise."""

    path: bytes
    reason: Reason

    @property
    def message(self) -> str:
        """For people."""
        return f"/etc/{printable(self.path)}: {self.reason}"


class EtcConflict(PreconditionFailed):
    """/etc cannot be merged: {detail}"""

    hint = "rename or remove what is named in /etc, then try again: what else conflicts is named then"

    def __init__(self, conflicts: tuple[Conflict, ...]) -> None:
        shown = "; ".join(conflict.message for conflict in conflicts[:_SHOWN])
        more = f"; and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
        super().__init__(shown + more)
        self.conflicts = conflicts


# --- actions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Put:
    """The name becomes the current file or symbolic link."""


@dataclass(frozen=True, slots=True)
class Remove:
    """The name is not in the result."""


@dataclass(slots=True)
class Enter:
    """The name is a directory in current and in the result.

    ``own``: with the metadata of current, else of new. ``dropped``: extended attributes that were removed in
    current, and that the result does not take from new. ``actions``: for the names in it; the others stay.
    """

    own: bool
    dropped: frozenset[bytes] = frozenset()
    actions: dict[bytes, Action] = field(default_factory=dict)


Action: TypeAlias = Put | Remove | Enter
_PUT: Final = Put()
_REMOVE: Final = Remove()


@dataclass(slots=True)
class MergePlan:
    """What is to be done, and the lists of paths that say so to people.

    ``added`` and ``modified`` have parents before children, and also the unchanged directories that are made
    again because of a change in them. ``removed`` has a directory without what was in it. ``actions`` are
    those for the names in ``/etc``; empty if there is nothing to do.
    """

    actions: dict[bytes, Action] = field(default_factory=dict)
    added: list[bytes] = field(default_factory=list)
    modified: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, int]:
        """Counts, for the result."""
        lists = {"added": self.added, "modified": self.modified, "removed": self.removed}
        return {name: len(paths) for name, paths in lists.items()} | {"conflicts": len(self.conflicts)}

    def check(self) -> None:
        """Raise ``EtcConflict`` if there is any conflict."""
        if self.conflicts:
            raise EtcConflict(tuple(self.conflicts))


# --- planning ----------------------------------------------------------------------------------------------


def make_plan(
    pristine: Directory, current: int, new: View, tick: Callable[[], None] = lambda: None
) -> MergePlan:
    """Plan the merge of ``current``, an open directory.

    ``tick`` is called once per name, and may raise. Raises ``OSError``, ``trees.Changed`` among them if
    current changes meanwhile, and ``LimitsExceeded``.
    """
    planner = _Planner(tick)
    planner.plan.actions = planner.directory(current, pristine, new, b"", 0)
    if new.kind(STAMP) is not Kind.ABSENT:
        planner.plan.actions[STAMP] = _REMOVE
    return planner.plan


class _Planner:
    def __init__(self, tick: Callable[[], None]) -> None:
        self.plan = MergePlan()
        self._tick = tick
        self._names = 0

    def directory(
        self, current: int, pristine: Directory | None, new: View, prefix: bytes, depth: int
    ) -> dict[bytes, Action]:
        """What is to be done to the names in a directory; ``prefix`` is its path with a slash, or empty."""
        if depth > trees.MAX_DEPTH:
            raise trees.TooDeep
        old = {} if pristine is None else pristine.entries
        actions: dict[bytes, Action] = {}
        present: set[bytes] = set()
        for name, found in trees.entries(current):
            self._count()
            kind = kind_of_mode(found.st_mode)
            if kind is Kind.SPECIAL or (not prefix and name == STAMP):
                continue
            present.add(name)
            path = prefix + name
            action: Action | None
            if kind is Kind.DIRECTORY:
                action = self._directory(name, found, current, old.get(name), new, path, depth)
            else:
                action = self._file(name, found, current, old.get(name), new, path)
            if action is not None:
                actions[name] = action
        for name in sorted(old.keys() - present):
            if kind_of_node(old[name]) is Kind.SPECIAL or (not prefix and name == STAMP):
                continue
            self.plan.removed.append(prefix + name)
            if new.kind(name) is not Kind.ABSENT:
                actions[name] = _REMOVE
        return actions

    def _count(self) -> None:
        self._tick()
        self._names += 1
        if self._names > MAX_NAMES:
            raise LimitsExceeded(f"there are more than {MAX_NAMES} names in /etc")

    def _file(
        self,
        name: bytes,
        found: os.stat_result,
        current: int,
        old: Directory | Leaf | None,
        new: View,
        path: bytes,
    ) -> Action | None:
        kind = kind_of_node(old)
        if isinstance(old, Leaf) and kind is Kind.FILE and same_leaf(old, name, current, found):
            return None
        (self.plan.modified if kind in {Kind.FILE, Kind.DIRECTORY} else self.plan.added).append(path)
        if new.kind(name) is Kind.DIRECTORY:
            self.plan.conflicts.append(Conflict(path, Reason.FILE_IS_DIRECTORY))
        return _PUT

    def _directory(
        self,
        name: bytes,
        found: os.stat_result,
        current: int,
        old: Directory | Leaf | None,
        new: View,
        path: bytes,
        depth: int,
    ) -> Action | None:
        plan = self.plan
        pristine = old if isinstance(old, Directory) else None
        enter = Enter(own=False)
        if pristine is None:
            # bootc lists a directory that was a file, but not what is in it, which is lost there.
            enter.own = True
            (plan.modified if kind_of_node(old) is Kind.FILE else plan.added).append(path)
        else:
            xattrs = trees.read_xattrs(name, current)
            if not same_metadata(pristine.stat, found, xattrs):
                enter.own = True
                enter.dropped = frozenset(pristine.stat.xattrs.keys() - xattrs.keys() - {SELINUX})
                plan.modified.append(path)
        added, modified = len(plan.added), len(plan.modified)
        conflict_at = len(plan.conflicts)
        with trees.opened_directory(name, current) as below, new.enter(name) as view:
            enter.actions = self.directory(below, pristine, view, path + b"/", depth + 1)
        changed = enter.own or len(plan.added) > added or len(plan.modified) > modified
        kind = new.kind(name)
        if kind is Kind.DIRECTORY:
            return enter if enter.own or enter.actions else None
        if not changed:
            # Things were removed from what the new image does not have: nothing to do.
            return None
        if kind is not Kind.ABSENT:
            # bootc notices this at the staging only if something below was changed.
            plan.conflicts.insert(conflict_at, Conflict(path, Reason.DIRECTORY_IS_FILE))
        elif not enter.own:
            # Made again for the sake of what is in it.
            enter.own = True
            if len(plan.added) > added:
                plan.added.insert(added, path)
            else:
                plan.modified.insert(modified, path)
        return enter
