"""The three-way merge of ``/etc``, in one step.

The merged tree is made beside the unmerged one, synced, and exchanged with it::

    state/deploy/<id>/etc                  unmerged, then merged
    state/deploy/<id>/.etc-merge-<inode>   the merge under way, then the unmerged tree
    state/deploy/<id>/.etc-discarded       either of them being removed

``<inode>`` is the number of the unmerged directory. So whoever comes after a crash, or after another tool,
sees from the two names alone which of them is which, and nothing has to be written down. The unmerged tree
stays until the deployment is activated (``discard``); if it is not, ``undo`` brings it back. ``merge`` begins
with ``undo``: run again, after whatever, it gives what it would have given, for the ``/etc`` there is then.

A merge begun again by a tool that merges in place, as bootc does, finds a complete ``etc`` at any time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as st
from typing import TYPE_CHECKING, Final, TypeVar

from hostimaged.composefs.tree import Directory
from hostimaged.errors import HostimageError, PreconditionFailed, from_os_error
from hostimaged.host.etcplan import Enter, MergePlan, Put, make_plan
from hostimaged.host.etcseed import (
    ETC,
    OVERLAY_XATTRS,
    UPPER,
    make_work,
    upper_metadata,
    whiteout,
    without_overlay,
)
from hostimaged.host.etctree import DiskView, ImageView, Kind, kind_of_mode
from hostimaged.host.setuproot import MountMode
from hostimaged.system import durable, trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hostimaged.host.etcplan import Action
    from hostimaged.host.etctree import View
    from hostimaged.progress import Reporter
    from hostimaged.system.trees import Metadata

    _T = TypeVar("_T")

PREFIX: Final = ".etc-merge-"
DISCARDED: Final = ".etc-discarded"
#: How often a merge is begun anew because the running ``/etc`` changes under it.
_TRIES: Final = 5


# --- dry run -----------------------------------------------------------------------------------------------


def dry_run(
    pristine: Directory,
    current: int,
    new: Directory,
    *,
    booted_mode: MountMode,
    mode: MountMode,
    reporter: Reporter,
) -> MergePlan:
    """What a merge would do now: its lists, counts and conflicts; writes nothing.

    ``pristine`` and ``new`` are the ``/etc`` of the images of the running deployment and of the one to come,
    ``current`` is the running ``/etc``, open; ``booted_mode`` and ``mode`` are how they are mounted. Nothing
    is carried over from, or to, an ``/etc`` whose changes end with the boot.
    Raises ``PreconditionFailed``, ``LimitsExceeded`` or ``StorageError``.
    """
    if not (booted_mode.persistent and mode.persistent):
        return MergePlan()
    try:
        return _steady(lambda: _plan(pristine, current, ImageView(new), reporter))
    except OSError as error:
        raise from_os_error(error, "cannot compare /etc with that of the image") from error


def _plan(pristine: Directory, current: int, new: View, reporter: Reporter) -> MergePlan:
    return make_plan(pristine, current, new, lambda: reporter.at("etc-merge.compare"))


def _steady(work: Callable[[], _T]) -> _T:
    """Do ``work``, again if ``/etc`` changed meanwhile."""
    for _ in range(_TRIES):
        try:
            return work()
        except trees.Changed:
            continue
    raise PreconditionFailed("/etc cannot be merged: other programs keep changing it")


# --- merging -----------------------------------------------------------------------------------------------


def merge(
    pristine: Directory,
    current: int,
    new: Directory,
    deployment: int,
    *,
    booted_mode: MountMode,
    mode: MountMode,
    reporter: Reporter,
) -> MergePlan:
    """Merge into ``etc`` of the state directory open as ``deployment``; durable when this returns.

    The other arguments, and what may be raised, are those of ``dry_run``; also ``EtcConflict``, ``NoSpace``
    and ``ReadOnly``. After an error ``etc`` is unmerged. ``new`` counts for an overlay only: else the new
    tree is what ``etc`` has, since others may have put something there. Follow with ``discard`` or ``undo``.
    """
    try:
        undo(deployment)
        if not (booted_mode.persistent and mode.persistent):
            return MergePlan()
        with trees.opened_directory(ETC, deployment) as unmerged:
            lower = new if mode is MountMode.OVERLAY else None
            return _steady(lambda: _merge(pristine, current, lower, unmerged, deployment, reporter))
    except OSError as error:
        raise from_os_error(error, "cannot merge /etc") from error


def _merge(
    pristine: Directory,
    current: int,
    lower: Directory | None,
    unmerged: int,
    deployment: int,
    reporter: Reporter,
) -> MergePlan:
    plan = _plan(pristine, current, DiskView(unmerged) if lower is None else ImageView(lower), reporter)
    plan.check()
    reporter.at("etc-merge.planned")
    if not plan.actions:
        return plan
    name = f"{PREFIX}{os.fstat(unmerged).st_ino}"
    try:
        _build(name, plan, current, lower, unmerged, deployment, reporter)
        reporter.at("etc-merge.built")
        durable.sync_filesystem(deployment)
        reporter.at("etc-merge.synced")
    except Exception:
        with contextlib.suppress(OSError):
            trees.remove_tree(name, deployment)
        raise
    _exchange(name, deployment)
    reporter.at("etc-merge.exchanged")
    return plan


def _exchange(name: str, deployment: int) -> None:
    try:
        durable.exchange_names(deployment, name, ETC)
    except OSError:
        # It may have been done, and then not synced.
        with contextlib.suppress(HostimageError):
            undo(deployment)
        raise


def _build(
    name: str,
    plan: MergePlan,
    current: int,
    lower: Directory | None,
    unmerged: int,
    deployment: int,
    reporter: Reporter,
) -> None:
    metadata = trees.metadata_of_fd(unmerged)
    with trees.new_directory(os.fsencode(name), deployment, metadata) as target:
        trees.forget_acl(target)
        builder = _Builder(target, lambda: reporter.at("etc-merge.copy"), overlay=lower is not None)
        if lower is None:
            builder.directory(plan.actions, current, unmerged, None, target, b"")
        else:
            builder.upper(plan.actions, current, unmerged, lower, target)


class _Builder:
    """Makes the merged tree beneath ``root`` in one pass: what has an action from current, the rest from new.

    For an ``overlay`` the tree is the upper layer, and what current has gets no attribute of overlayfs.
    """

    def __init__(self, root: int, tick: Callable[[], None], *, overlay: bool) -> None:
        self._overlay = overlay
        self._from_new = trees.Copier(root, tick)
        self._from_current = trees.Copier(root, tick, without=OVERLAY_XATTRS if overlay else ())

    def upper(
        self, actions: Mapping[bytes, Action], current: int, new: int, image: Directory, target: int
    ) -> None:
        """Make ``upper``, of what the one in ``new`` has and of what differs from ``image``, and ``work``."""
        with _directory_if_any(UPPER, new) as old:
            metadata = upper_metadata(image.stat) if old is None else trees.metadata_of_fd(old)
            with trees.new_directory(UPPER, target, metadata) as made:
                self.directory(actions, current, old, image, made, UPPER + b"/")
        make_work(target)

    def directory(
        self,
        actions: Mapping[bytes, Action],
        current: int,
        new: int | None,
        image: Directory | None,
        target: int,
        prefix: bytes,
    ) -> None:
        """Fill ``target``. ``new`` is the directory on disk, ``image`` the one that shows through, if any."""
        if new is not None:
            for name, found in trees.entries(new):
                if name not in actions:
                    self._from_new.copy_found(name, found, new, target, prefix + name)
        for name, action in actions.items():
            if isinstance(action, Put):
                self._put(name, current, target, prefix + name)
            elif isinstance(action, Enter):
                self._enter(name, action, current, new, image, target, prefix)
            elif image is not None and name in image.entries:
                whiteout(name, target)

    def _put(self, name: bytes, current: int, target: int, path: bytes) -> None:
        found = trees.status(name, current)
        if kind_of_mode(found.st_mode) is not Kind.FILE:
            raise trees.Changed(errno.ESTALE, "a file was replaced")
        self._from_current.copy_found(name, found, current, target, path)

    def _enter(
        self,
        name: bytes,
        action: Enter,
        current: int,
        new: int | None,
        image: Directory | None,
        target: int,
        prefix: bytes,
    ) -> None:
        node = None if image is None else image.entries.get(name)
        below = node if isinstance(node, Directory) else None
        with trees.opened_directory(name, current) as ours, _directory_if_any(name, new) as theirs:
            metadata = self._merged_metadata(action, ours, theirs, below)
            with trees.new_directory(name, target, metadata) as made:
                self.directory(action.actions, ours, theirs, below, made, prefix + name + b"/")

    def _merged_metadata(
        self, action: Enter, ours: int, theirs: int | None, image: Directory | None
    ) -> Metadata:
        """What a directory gets: current's, with the attributes that only new has; or new's."""
        own = trees.metadata_of_fd(ours)
        if self._overlay:
            own = without_overlay(own)
        if theirs is not None:
            found = trees.metadata_of_fd(theirs)
        elif image is not None:
            found = upper_metadata(image.stat)
        else:
            return own
        if not action.own:
            return found
        kept = {name: value for name, value in found.xattrs.items() if name not in action.dropped}
        return own._replace(xattrs={**kept, **own.xattrs})


@contextlib.contextmanager
def _directory_if_any(name: bytes, parent: int | None) -> Iterator[int | None]:
    """A descriptor of the directory ``name``, or None if there is none."""
    if parent is None or not _is_directory(name, parent):
        yield None
        return
    with trees.opened_directory(name, parent) as fd:
        yield fd


def _is_directory(name: bytes | str, parent: int) -> bool:
    try:
        return st.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


# --- before and after --------------------------------------------------------------------------------------


def undo(deployment: int) -> None:
    """Bring back the unmerged ``etc`` of a deployment that was not activated, and remove what a merge left.

    Never for one that was booted. Doing it again, or without need, is harmless. Raises ``NoSpace``,
    ``ReadOnly`` or ``StorageError``.
    """
    try:
        for name in _leftovers(deployment):
            if _is_unmerged(name, deployment):
                durable.exchange_names(deployment, name, ETC)
            _discard(name, deployment)
        trees.remove_tree(DISCARDED, deployment)
    except OSError as error:
        raise from_os_error(error, "cannot take back the merge of /etc") from error


def discard(deployment: int) -> None:
    """Remove what a merge left beside the ``etc`` of a deployment that was activated, or booted.

    Doing it again, or without need, is harmless. Raises ``ReadOnly`` or ``StorageError``.
    """
    try:
        for name in _leftovers(deployment):
            _discard(name, deployment)
        trees.remove_tree(DISCARDED, deployment)
    except OSError as error:
        raise from_os_error(error, "cannot remove what the merge of /etc left") from error


def is_merged(deployment: int) -> bool:
    """Whether ``etc`` is merged, and the unmerged one is still there. Raises ``StorageError``."""
    try:
        return any(_is_unmerged(name, deployment) for name in _leftovers(deployment))
    except OSError as error:
        raise from_os_error(error, "cannot look at the state of the deployment") from error


def _leftovers(deployment: int) -> list[str]:
    return sorted(name for name in os.listdir(deployment) if name.startswith(PREFIX))


def _is_unmerged(name: str, deployment: int) -> bool:
    """Whether ``name`` has the unmerged tree, which was exchanged for the merged one."""
    found = os.stat(name, dir_fd=deployment, follow_symlinks=False)
    return st.S_ISDIR(found.st_mode) and name == f"{PREFIX}{found.st_ino}" and _is_directory(ETC, deployment)


def _discard(name: str, deployment: int) -> None:
    # Under another name first: a tree that is half removed is never taken for a whole one.
    trees.remove_tree(DISCARDED, deployment)
    durable.publish_name(deployment, name, DISCARDED)
    trees.remove_tree(DISCARDED, deployment)
