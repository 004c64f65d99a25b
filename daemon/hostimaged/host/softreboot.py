"""Soft reboots: the root that systemd starts next, without the firmware and the kernel (boot-entries.md 12).

It is prepared at ``/run/nextroot``, with the target image's own configuration of the root, which bootc leaves
out. All of it is in memory: a reboot forgets it. What is prepared is not written down either: the root itself
tells of which deployment it is, so one that bootc prepared is treated alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.cmdline import Cmdline
from hostimaged.boot.files import TreeFiles
from hostimaged.composefs.repository.verity import probe
from hostimaged.errors import (
    AlreadyBooted,
    HostimageError,
    PreconditionFailed,
    StorageError,
    VerityMismatch,
    from_os_error,
)
from hostimaged.host import statedirs
from hostimaged.host.arguments import cmdline_of
from hostimaged.host.booted import read_cmdline, root_of, root_source
from hostimaged.host.etctree import open_image_tree
from hostimaged.host.marker import read_marker
from hostimaged.host.model import Role
from hostimaged.host.nextroot import Action, Failed, Plan
from hostimaged.host.recover import settle
from hostimaged.host.setuproot import MountMode, SetupRoot
from hostimaged.host.softcheck import SoftRebootCheck, require_systemd
from hostimaged.progress import Phase
from hostimaged.system import mounts, process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.host.model import Deployment, HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import DeploymentId
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = ("soft-reboot.checked", "soft-reboot.prepared")

#: Seconds for putting a root together, which reads a few blocks.
_TIMEOUT: Final = 120
_PROGRAM: Final = "hostimaged.host.nextroot"
#: Values of systemd.volatile with which ``/var`` is not to be that of the disk (boot-initramfs.md 3).
_VOLATILE: Final = ("state", "overlay")


def prepared(paths: HostPaths) -> DeploymentId | None:
    """The deployment that a soft reboot would start, whoever prepared it; None if it is none."""
    sources = _placed(paths)
    found = root_of(sources[-1]) if sources else None
    return None if found is None else found[0]


def prepare(session: Session) -> bool:
    """Prepare what boots next; False if that is what runs, and nothing is prepared.

    Raises as ``place``; then nothing is prepared either.
    """
    session.reporter.phase(Phase.STAGING)
    state = settle(session)
    row = state.next_deployment
    if row is None or row.role is Role.BOOTED:
        cancel(session.paths)
        return False
    place(session, state, row)
    return True


def place(session: Session, state: HostState, row: Deployment) -> None:
    """Prepare a deployment, instead of another one.

    Raises ``AlreadyBooted``; ``PreconditionFailed`` if it cannot be reached, or something else is where its
    root belongs; ``VerityMismatch``, ``UnsupportedImage`` or ``StorageError`` if its root cannot be put
    together. Then nothing is prepared.
    """
    if row.role is Role.BOOTED:
        raise AlreadyBooted(f"deployment {row.id} is running")
    try:
        require_systemd(session.paths.usr)
        found = _check(session, state).check(row)
        if not found.capable:
            reason = f"deployment {row.id} cannot be reached by a soft reboot: {found.reason}"
            raise PreconditionFailed(reason)
        session.reporter.at("soft-reboot.checked")
        _assemble(session, state, row)
        session.reporter.at("soft-reboot.prepared")
    except HostimageError:
        with suppress(HostimageError):
            cancel(session.paths)
        raise


def cancel(paths: HostPaths) -> bool:
    """Take back what was prepared; says whether there was something. What is not ours is left alone.

    Raises ``StorageError``.
    """
    if prepared(paths) is None:
        return False
    _run(paths, Action.REMOVE)
    return True


def cancel_outdated(session: Session) -> None:
    """Take back what was prepared if it is no longer what boots next, or no longer to be reached.

    systemd starts a prepared root even where a reboot is all that it is asked for. Raises ``StorageError``.
    """
    found = prepared(session.paths)
    if found is None:
        return
    state = session.state()
    row = state.next_deployment
    if row is None or row.id != found or not _check(session, state).check(row).capable:
        cancel(session.paths)


def withdraw_staged(paths: HostPaths) -> DeploymentId | None:
    """Take back what was prepared if it is staged, before it is activated; gives which deployment it was.

    Merging makes another directory its ``/etc``, and removes the one that the prepared root has. Follow with
    ``place_activated``; without, a soft reboot starts what runs once more, and a reboot the new one. Raises
    ``StorageError`` or ``DamagedState``.
    """
    found = prepared(paths)
    staged = None if found is None else read_marker(paths.marker_dir)
    if found is None or staged is None or staged.depl_id != found:
        return None
    cancel(paths)
    return found


def place_activated(session: Session, activated: DeploymentId) -> None:
    """Prepare a deployment that was withdrawn, and is activated now.

    Raises as ``place``; then nothing is prepared.
    """
    state = session.state()
    try:
        _assemble(session, state, state.get(activated))
    except HostimageError:
        with suppress(HostimageError):
            cancel(session.paths)
        raise


def _check(session: Session, state: HostState) -> SoftRebootCheck:
    return SoftRebootCheck(session.paths, session.repository, state.dirs, state.booted_deployment)


def _placed(paths: HostPaths) -> list[str]:
    if paths.next_root is None:
        return []
    try:
        try:
            return mounts.sources_at(paths.host_mounts, paths.next_root)
        except FileNotFoundError:
            # A /proc that hides processes. What the host mounts there is seen in the namespaces of services.
            return mounts.sources_at(None, paths.next_root)
    except OSError as error:
        raise from_os_error(error, "cannot read the table of mounts") from error


def _assemble(session: Session, state: HostState, row: Deployment) -> None:
    """Put the root of a deployment together and place it."""
    paths = session.paths
    sources = _placed(paths)
    if sources and root_of(sources[-1]) is None:
        raise PreconditionFailed(f"something else is mounted at {paths.next_root}")
    setup = SetupRoot.load(TreeFiles(open_image_tree(session.repository, row.id), session.repository))
    var = _var(paths, setup)
    with _image(session, state, row) as (image, verity):
        _run(
            paths,
            Action.PLACE,
            image=image,
            verity=verity,
            source=root_source(row.id, transient=False),
            volatile_source=root_source(row.id, transient=True) if setup.transient_root else "",
            physical_root=str(paths.physical_root),
            objects=str(paths.repository / "objects"),
            state=str(statedirs.state_directory(paths, row.id)),
            etc=setup.etc,
            var=var,
        )


def _var(paths: HostPaths, setup: SetupRoot) -> MountMode:
    """How ``/var`` is mounted: as at a boot with the arguments that the kernel has, which stay the same."""
    if setup.var is MountMode.OVERLAY:
        # Two overlays on one upper directory, while both are mounted, damage it.
        raise PreconditionFailed("its /var is an overlay, which the running system is using")
    if setup.var_given:
        return setup.var
    volatile = Cmdline.parse(read_cmdline(paths) or "").get("systemd.volatile")
    return MountMode.NONE if volatile is not None and volatile.value in _VOLATILE else setup.var


@contextmanager
def _image(session: Session, state: HostState, row: Deployment) -> Iterator[tuple[int, bool]]:
    """The image, open, and whether the kernel vouches for it, so that it is to do so for all files.

    As the initramfs has it: with fs-verity its digest must be the id, always; without, only an entry with
    ``?`` lets it start (boot-initramfs.md 4).
    """
    argument = cmdline_of(state.dirs, row).composefs()
    fd = session.repository.open_image(str(row.id))
    try:
        protected, _ = probe(fd, session.repository.algorithm)
        if not protected and not (argument is not None and argument.optional):
            raise VerityMismatch(f"the image of deployment {row.id} has no fs-verity: its entry demands it")
        yield fd, protected
    finally:
        os.close(fd)


def _run(paths: HostPaths, action: Action, *, image: int = -1, **what: Any) -> None:
    """Have a process of its own carry out a plan. Raises ``StorageError``, or what a full disk raises."""
    with _namespace(paths) as namespace:
        plan = Plan(action, str(paths.next_root), namespace, image, **what)
        # -S: all that it would find is on the path already.
        argv = [sys.executable, "-S", "-P", "-m", _PROGRAM, plan.render()]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        child = process.spawn(
            argv,
            environment={"PYTHONPATH": path},
            pass_fds=[fd for fd in (namespace, image) if fd != -1],
            stdout=subprocess.PIPE,
        )
    with child:
        try:
            told, _ = child.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            raise StorageError(f"the root at {paths.next_root} was not ready within {_TIMEOUT} s") from None
    if child.returncode:
        failure = Failed.parse(told.decode("utf-8", "replace"))
        if failure is None:
            raise StorageError(f"the root at {paths.next_root} could not be changed")
        raise from_os_error(OSError(failure.code, failure.text), failure.doing)


@contextmanager
def _namespace(paths: HostPaths) -> Iterator[int]:
    """The mount namespace of the host, open; -1 if it is ours."""
    if paths.host_namespace is None:
        yield -1
        return
    try:
        fd = os.open(paths.host_namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, "cannot reach the mounts of the host") from error
    try:
        yield fd
    finally:
        os.close(fd)
