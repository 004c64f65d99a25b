"""The store of the host: the containers-storage beside the repository, made and known as bootc does.

Images of a host with unified storage are in it, and bound images; ``podman`` alone writes to it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from hostimaged.errors import StorageError, from_os_error
from hostimaged.oci.storage.podman import Podman
from hostimaged.oci.storage.store import DEFAULT_LOCK_TIMEOUT, Store, StoreMissing
from hostimaged.system.durable import publish_name, replace_symlink, sync_filesystem, write_new_file
from hostimaged.system.paths import LABELLED_STORE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    from hostimaged.system.paths import HostPaths

    #: The label of the file that has this path in the usual store, and this mode; None for none.
    Labeller: TypeAlias = Callable[[bytes, int], bytes | None]

#: In a store whose files have the labels that the policy has for them (bootc).
STAMP: Final = ".bootc_labeled"
_UNFINISHED: Final = "storage.tmp"
_LINK: Final = "../composefs/bootc"
_XATTR: Final = "security.selinux"
#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = ("store.directory", "store.link", "store.initialized", "store.made")


def exists(paths: HostPaths) -> bool:
    """Whether the host has a store. Creates nothing, and needs no podman."""
    return paths.store.is_dir()


def open_store(
    paths: HostPaths,
    *,
    lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
    check: Callable[[], None] | None = None,
) -> Store | None:
    """The store for reading; None if there is none. Creates nothing, and needs no podman.

    Raises as ``Store.open`` does, but for ``StoreMissing``.
    """
    try:
        return Store.open(paths.store, lock_timeout=lock_timeout, check=check)
    except StoreMissing:
        return None


@contextlib.contextmanager
def podman(
    paths: HostPaths, work_dir: Path, check: Callable[[], None], source: Path | None = None
) -> Iterator[Podman]:
    """podman on the store of the host, which exists; see ``Podman``."""
    with Podman(paths, paths.store, work_dir, check, source) as opened:
        yield opened


def ensure(
    paths: HostPaths,
    work_dir: Path,
    at: Callable[[str], None],
    label: Labeller | None = None,
) -> bool:
    """Make the store of the host, and the link to it, if it has none; says whether that was so.

    To be called when something is to be put in, by the holder of the job lock; the repository exists. ``at``
    is called at each step, and while podman works, and may raise; then nothing has the name of a store.
    ``label``: what labels files are to have where the host uses labels; a store without ``STAMP`` gets them.

    Raises ``NoSpace``, ``ReadOnly``, ``StorageError``, ``ProgramMissing``.
    """
    try:
        made = not exists(paths)
        if made:
            _make(paths, work_dir, at, label)
        elif label is not None and not (paths.store / STAMP).exists():
            _relabel(paths.store, label)
        _link(paths)
        at("store.link")
    except OSError as error:
        raise from_os_error(error, f"cannot make containers-storage at {paths.store}") from error
    return made


def _make(paths: HostPaths, work_dir: Path, at: Callable[[str], None], label: Labeller | None) -> None:
    parent = paths.store.parent
    if not paths.repository.is_dir():
        raise StorageError(f"there is no repository at {paths.repository} to have a store beside")
    parent.mkdir(mode=0o755, exist_ok=True)
    unfinished = parent / _UNFINISHED
    # Of one who was killed; nobody else is at work.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o755)
    at("store.directory")
    with Podman(paths, unfinished, work_dir, lambda: at("store.waiting")) as opened:
        opened.initialize()
    if label is not None:
        _relabel(unfinished, label)
    at("store.initialized")
    directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # It is a store only once all that makes it one is on the device.
        sync_filesystem(directory)
        publish_name(directory, unfinished.name, paths.store.name)
    finally:
        os.close(directory)
    at("store.made")


def _link(paths: HostPaths) -> None:
    """The link by which bootc and images find the store; whatever is there already stays."""
    link = paths.store_link
    if os.path.lexists(link):
        return
    link.parent.mkdir(mode=0o755, exist_ok=True)
    directory = os.open(link.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        replace_symlink(_LINK, link.name, directory=directory, temporary_directory=directory)
        sync_filesystem(directory)
    finally:
        os.close(directory)


def _relabel(store: Path, label: Labeller) -> None:
    """Give every file of ``store`` its label, and then the store its stamp. Links are not followed."""
    top = os.fsencode(store)
    _relabel_one(top, top, label)
    for parent, directories, files in os.walk(top):
        for name in directories + files:
            _relabel_one(os.path.join(parent, name), top, label)
    directory = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileExistsError):
            write_new_file(directory, STAMP, [])
    finally:
        os.close(directory)


def _relabel_one(path: bytes, top: bytes, label: Labeller) -> None:
    wanted = label(os.fsencode(LABELLED_STORE) + path[len(top) :], os.lstat(path).st_mode)
    if wanted is not None:
        os.setxattr(path, _XATTR, wanted, follow_symlinks=False)
