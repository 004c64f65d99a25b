"""Watches of the directories that a scan looks into, so that what other programs do there is noticed.

Every directory is watched together with those above it, up to one that is always there: one that appears
later, or takes another's place, is an entry that comes, and watched when the watches are renewed. Objects of
the repository are not watched, nor is what is below ``/etc``: there is too much of it.

Nothing is mounted and no automount triggered: of file systems to boot from only those are looked at that are
mounted in the usual places. A watch does not keep them from being unmounted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.boot.esp import mount_at
from hostimaged.errors import HostimageError
from hostimaged.host.bootdirs import AUTOFS, GRUB, LOADER, mount_table
from hostimaged.host.bootsets import BlsSets, GrubSets
from hostimaged.host.marker import NAME as MARKER
from hostimaged.system.inotify import Inotify, Mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.esp import Mount
    from hostimaged.system.inotify import Event
    from hostimaged.system.paths import HostPaths

#: Directories watched at most. A host with three deployments has 25; root may have 8,192 watches or more in
#: all, which others need as well. What is beyond is seen by the scans that come by themselves.
MAX_WATCHES: Final = 512
#: Neither read nor followed: opening a directory in this way is no use of it, and triggers no automount.
_FLAGS: Final = os.O_PATH | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory: the entries that matter (None: all), and those of them that are directories to watch.

    ``each``: what its other subdirectories are.
    """

    names: frozenset[str] | None = None
    below: dict[str, _Place] = field(default_factory=dict)
    each: _Place | None = None


def _only(below: dict[str, _Place], *names: str) -> _Place:
    """A directory of which only these entries matter."""
    return _Place(frozenset({*below, *names}), below)


_ALL: Final = _Place()
_STREAMS: Final = _Place(below={"refs": _only({"oci": _ALL})})
_REPOSITORY: Final = _only({"streams": _STREAMS, "images": _ALL}, "meta.json")
_LOADER: Final = _only({BlsSets.LIVE: _ALL, BlsSets.STAGED: _ALL})
_GRUB: Final = _only({}, GrubSets.LIVE, GrubSets.STAGED)
_UKIS: Final = Path(bls.UKI_DIRECTORY).name
_EFI: Final = _only({"Linux": _Place(below={_UKIS: _ALL})})
#: A file system to boot from; beside these, kernels are directories in it.
_BOOT: Final = _Place(below={LOADER: _LOADER, GRUB: _GRUB, "EFI": _EFI})


class Watches:
    """Watches of one host. Methods that block say so; one thread at a time. Raises ``OSError``.

    ``problem`` says what cannot be watched, since the last ``renew``; "": nothing.
    """

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._inotify = Inotify()
        self._names: dict[int, frozenset[bytes] | None] = {}
        self.problem = ""

    def fileno(self) -> int:
        """The descriptor, readable when something happened."""
        return self._inotify.fileno()

    def close(self) -> None:
        """End all watches. Twice is harmless."""
        self._inotify.close()

    def renew(self) -> None:
        """Watch what there is now, and nothing else. Blocks. Never raises for what is not there.

        What changes after this is noticed, so that a scan that begins now misses nothing.
        """
        table: list[Mount] = []
        if self._paths.scratch_root is None:
            with contextlib.suppress(HostimageError):
                table = mount_table(self._paths)
        renewal = _Renewal(self._inotify, frozenset(m.device for m in table if m.filesystem == AUTOFS))
        for path, place in self._bases(table):
            renewal.open(path, place)
        for watch in self._names.keys() - renewal.names.keys():
            self._inotify.remove(watch)
        self._names = renewal.names
        self.problem = renewal.problem

    def _bases(self, table: list[Mount]) -> Iterator[tuple[Path, _Place]]:
        paths = self._paths
        physical = _physical_root(paths)
        run = _run(paths)
        if paths.scratch_root is None:
            yield paths.physical_root, physical
            yield from run.items()
            for path in paths.boot_mounts:
                mount = mount_at(table, os.fsencode(path))
                if mount is not None and mount.filesystem != AUTOFS:
                    yield path, _BOOT
            return
        # There may be nothing but the root yet. Its facts are plain files, and there are no mounts.
        below = {path.name: place for path, place in run.items()} | {paths.physical_root.name: physical}
        below |= {path.name: _BOOT for path in (paths.boot, paths.esp) if path is not None}
        if paths.mountinfo is not None:
            own = paths.mountinfo.parent
            below[own.parent.name] = _only({own.name: _only({}, paths.mountinfo.name)})
        yield paths.scratch_root, _only(below)

    def read(self) -> bool | None:
        """Take some events; whether one of them matters. None: there are no more."""
        events = self._inotify.read()
        return any(map(self._matters, events)) if events else None

    def _matters(self, event: Event) -> bool:
        if event.mask & (Mask.OVERFLOW | Mask.UNMOUNT):
            return True
        if event.watch not in self._names or event.mask & Mask.IGNORED:
            # Told before the last renewal, or the end of a watch, which has its own reason.
            return False
        names = self._names[event.watch]
        return names is None or not event.name or event.name in names


def _physical_root(paths: HostPaths) -> _Place:
    deploy, own = paths.deployments, paths.state
    state = _only({deploy.name: _Place(each=_ALL), own.name: _only({}, paths.pulls.name)})
    return _only({paths.repository.name: _REPOSITORY, own.parent.name: state, paths.boot.name: _BOOT})


def _run(paths: HostPaths) -> dict[Path, _Place]:
    """What holds the directory of the marker, which is not there before something is staged."""
    if paths.marker_dir is None:
        return {}
    return {paths.marker_dir.parent: _only({paths.marker_dir.name: _only({}, MARKER)})}


class _Renewal:
    """Goes through the directories that there are, and watches each; ``names``: what matters, by watch.

    ``triggers``: devices of automounts, to be left alone.
    """

    def __init__(self, inotify: Inotify, triggers: frozenset[tuple[int, int]]) -> None:
        self._inotify = inotify
        self._triggers = triggers
        self.names: dict[int, frozenset[bytes] | None] = {}
        self.problem = ""

    def open(self, path: Path | str, place: _Place, directory: int | None = None) -> None:
        """Watch the directory ``path`` and those below it, as far as they are there."""
        try:
            fd = os.open(path, _FLAGS, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            self._failed(path, error)
            return
        try:
            if self._is_directory(fd) and self._watch(fd, place):
                self._below(fd, place)
        except OSError as error:
            self._failed(path, error)
        finally:
            os.close(fd)

    def _is_directory(self, fd: int) -> bool:
        status = os.fstat(fd)
        device = os.major(status.st_dev), os.minor(status.st_dev)
        return stat.S_ISDIR(status.st_mode) and device not in self._triggers

    def _failed(self, path: Path | str, error: OSError) -> None:
        no_more = error.errno == errno.ENOSPC
        reason = "there may be no more watches (fs.inotify.max_user_watches)" if no_more else error.strerror
        self.problem = self.problem or f"{Path(path).name} cannot be watched: {reason}"

    def _watch(self, fd: int, place: _Place) -> bool:
        if len(self.names) >= MAX_WATCHES:
            self.problem = f"there are more than {MAX_WATCHES} directories to watch"
            return False
        watch = self._inotify.watch(fd)
        wanted = None if place.names is None else frozenset(map(os.fsencode, place.names))
        known = self.names.get(watch, frozenset())
        self.names[watch] = None if wanted is None or known is None else known | wanted
        return True

    def _below(self, fd: int, place: _Place) -> None:
        for name, below in place.below.items():
            self.open(name, below, fd)
        if place.each is not None:
            for name in os.listdir(f"/proc/self/fd/{fd}")[:MAX_WATCHES]:
                self.open(name, place.each, fd)
