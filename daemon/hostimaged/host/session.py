"""One operation on a host: its places, its repository and lock, and the state it works from.

Content is added under the repository's shared lock; entries, state directories and the marker are written
under the exclusive one, the only lock that bootc honours. The shared lock is dropped before the exclusive one
is asked for, so everything is read again then (architecture.md, rule 7).
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository
from hostimaged.errors import BootLoaderError, Cancelled, HostimageError
from hostimaged.host import espmount, marker
from hostimaged.host.artifacts import KernelFiles, UkiFiles
from hostimaged.host.bootdirs import mount_table
from hostimaged.host.booted import read_booted
from hostimaged.host.bootfs import told
from hostimaged.host.entries import set_store
from hostimaged.host.read import read_host
from hostimaged.system import durable
from hostimaged.system.boot import read_boot_id
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hostimaged.boot.loader import Bootloader
    from hostimaged.host.bootsets import BootSetStore
    from hostimaged.host.marker import Marker
    from hostimaged.host.model import HostState
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

DEFAULT_LOCK_TIMEOUT: Final = 60.0


@dataclass(slots=True)
class Session:
    """An operation under way; made by ``open_session``.

    ``work`` is a private directory on the file system of the physical root, gone at the end. ``bootloader``
    is given where nobody can be asked, as in an offline install. ``ends`` is what ends with it.
    """

    paths: HostPaths
    repository: Repository
    reporter: Reporter
    work: Path
    lock_timeout: float
    ends: ExitStack
    bootloader: Bootloader | None = None

    def state(self) -> HostState:
        """What is on the host now."""
        return read_host(self.paths, self.repository, bootloader=self.bootloader)

    def exclusive(self) -> HostState:
        """Exchange the shared lock for the exclusive one and read the host again, from now on with the ESP.

        Raises ``LockTimeout``; then the operation is over, no lock is held. Raises ``BootLoaderError`` if the
        ESP cannot be mounted.
        """
        self.repository.relock(
            exclusive=True,
            lock_timeout=self.lock_timeout,
            check=lambda: self.reporter.at("host.locking"),
        )
        # Not before: with the lock no bootc has it mounted in another way, nor do we keep one waiting.
        if not self.paths.esp_sought:
            self.paths = self.ends.enter_context(espmount.reached(self.paths, writable=True))
        return self.state()

    def store(self, state: HostState) -> BootSetStore:
        """Where the sets of entries are. Raises ``BootLoaderError`` if nobody mounted their file system."""
        found = set_store(state.dirs)
        if found is None:
            raise BootLoaderError("the file system with the boot entries is not mounted")
        return found

    def kernels(self, state: HostState) -> KernelFiles:
        """Where kernels are; raises ``BootLoaderError`` as ``store`` does."""
        if state.dirs.kernels is None:
            raise BootLoaderError("the file system with the kernels is not mounted")
        return KernelFiles(state.dirs.kernels)

    def ukis(self, state: HostState) -> UkiFiles:
        """Where UKIs are; raises ``BootLoaderError`` as ``store`` does."""
        if state.dirs.ukis is None:
            raise BootLoaderError("the EFI system partition is not mounted")
        return UkiFiles(state.dirs.ukis)

    def write_marker(self, content: Marker) -> None:
        """Say that a deployment is staged. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``."""
        directory = self.paths.marker_dir
        if directory is None:
            raise BootLoaderError("nothing can be staged on a host that does not run")
        with told("cannot mark the deployment as staged"):
            directory.mkdir(0o755, parents=True, exist_ok=True)
            durable.replace_file(directory / marker.NAME, content.serialise())

    def remove_marker(self) -> None:
        """Say that nothing is staged; nothing was is fine."""
        directory = self.paths.marker_dir
        if directory is None:
            return
        with told("cannot remove the mark of the staged deployment"):
            (directory / marker.NAME).unlink(missing_ok=True)

    def expect_garbage(self) -> None:
        """A deployment goes, or another is about to: what that leaves is collected, at the latest next boot.

        Not synced: a lost note costs space for a while.
        """
        path = self.paths.collection_due
        with told(f"cannot write {path}"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch()

    def steady(self) -> Session:
        """The same session, in which nobody can be told to stop: after a commit point, and to take back."""
        return replace(self, reporter=_Steady(self.reporter))

    @property
    def boot_id(self) -> str:
        """The kernel's id of this boot, "" where there is none."""
        return read_boot_id(self.paths.boot_id)

    @staticmethod
    def now() -> int:
        """Seconds since the epoch."""
        return max(int(time.time()), 0)


class _Steady:
    """A reporter whose work goes on, whoever wants it to stop."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        with suppress(Cancelled):
            self._reporter.at(point)


@contextmanager
def open_session(
    paths: HostPaths,
    reporter: Reporter,
    *,
    lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
    bootloader: Bootloader | None = None,
) -> Iterator[Session]:
    """Begin an operation, for which the caller holds the job lock, under the repository's shared lock.

    On a host that boots without fs-verity (``composefs=?``) the repository may lack it too. Raises
    ``RepositoryMissing`` before the first pull, and as ``Repository.open`` and ``private_directory`` do.
    """
    repository = Repository.open(
        paths.repository,
        lock_timeout=lock_timeout,
        insecure=optional_verity(paths),
        check=lambda: reporter.at("host.locking"),
    )
    with repository:
        repository.check_writable()
        with private_directory(paths.temporary, "host-") as work, ExitStack() as ends:
            yield Session(paths, repository, reporter, work, lock_timeout, ends, bootloader)


def optional_verity(paths: HostPaths) -> bool:
    """Whether the host boots without fs-verity, so that its repository may lack it too."""
    try:
        booted = read_booted(paths, mount_table(paths))
    except HostimageError:
        return False
    return booted is not None and booted.optional
