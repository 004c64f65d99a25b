"""The sets of boot entries on disk as whole things: read raw, written, exchanged, removed, compared.

There is a live set and, while something is staged, a staged one (boot-entries.md 8): two directories of BLS
files beside each other in ``loader/``, or two GRUB files in ``grub2/``. What an entry means is not known
here. A set is written under a temporary name and renamed; the live set changes by an exchange of the two.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from hostimaged.errors import BootLoaderError
from hostimaged.host import bootfs
from hostimaged.host.bootfs import TEMPORARY, told
from hostimaged.system import durable

if TYPE_CHECKING:
    from pathlib import Path

#: Entries are a few hundred bytes and a handful; a directory with more is none of a boot loader's.
MAX_FILES: Final = 1024
MAX_FILE_SIZE: Final = 256 << 10
MAX_SET_SIZE: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class RawSet:
    """The files of a set by name, in the order of their names; a ``user.cfg`` is a set of one."""

    files: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, files: dict[str, bytes]) -> RawSet:
        """A set of these files."""
        return cls(tuple(sorted(files.items())))

    @property
    def digest(self) -> str:
        """A digest of names and contents, for journals; equal for equal sets alone."""
        total = hashlib.sha256()
        for name, content in self.files:
            total.update(f"{len(name.encode('utf-8', 'surrogateescape'))} {len(content)}\n".encode())
            total.update(name.encode("utf-8", "surrogateescape"))
            total.update(content)
        return total.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all contents."""
        return sum(len(content) for _, content in self.files)


def digest(files: RawSet | None) -> str:
    """The digest of a set, "" if there is none."""
    return "" if files is None else files.digest


class BootSetStore(Protocol):
    """Where the sets are. Raise ``BootLoaderError``, ``NoSpace``, ``ReadOnly``, ``StorageError``."""

    def live(self) -> RawSet | None:
        """What the boot loader shows; None if there is nothing, as before the first deployment."""

    def staged(self) -> RawSet | None:
        """What the next activation will put in its place; None if there is nothing."""

    def require_replaceable(self) -> None:
        """Raise ``BootLoaderError`` if what is no file would be lost with the live set."""

    def write_staged(self, files: RawSet) -> None:
        """Make ``files`` the staged set, durably; one that is there is replaced, with no set in between."""

    def replace_live(self, files: RawSet) -> None:
        """Make ``files`` the live set in one step, durably; the staged set stays."""

    def remove_staged(self) -> None:
        """Remove the staged set, durably; none is fine."""

    def activate(self) -> None:
        """Exchange the two sets in one step, durably; without a live set the staged one becomes it."""

    def remove_temporary(self) -> None:
        """Remove what a crash left under temporary names."""


class BlsSets:
    """The sets as directories of BLS entries, ``entries`` and ``entries.staged`` in ``loader``."""

    LIVE: Final = "entries"
    STAGED: Final = "entries.staged"

    def __init__(self, loader: Path) -> None:
        self._loader = loader

    def live(self) -> RawSet | None:
        """See ``BootSetStore``."""
        return self._read(self.LIVE)

    def staged(self) -> RawSet | None:
        """See ``BootSetStore``."""
        return self._read(self.STAGED)

    def _read(self, name: str) -> RawSet | None:
        path = self._loader / name
        with told(f"cannot read the boot entries in {path}"):
            try:
                names = sorted(os.listdir(path))
            except FileNotFoundError:
                return None
            if len(names) > MAX_FILES:
                raise BootLoaderError(f"{path} has {len(names)} files, more than {MAX_FILES}")
            found = {each: _read_file(path / each) for each in names}
        files = RawSet.of({each: content for each, content in found.items() if content is not None})
        if files.size > MAX_SET_SIZE:
            raise BootLoaderError(f"the boot entries in {path} have more than {MAX_SET_SIZE} bytes")
        return files

    def write_staged(self, files: RawSet) -> None:
        """See ``BootSetStore``."""
        self._write(files, self.STAGED)

    def replace_live(self, files: RawSet) -> None:
        """See ``BootSetStore``."""
        self.require_replaceable()
        self._write(files, self.LIVE)

    def require_replaceable(self) -> None:
        """See ``BootSetStore``: directories and links of other people cannot be carried over."""
        path = self._loader / self.LIVE
        with told(f"cannot read {path}"):
            if not path.is_dir():
                return
            with os.scandir(path) as found:
                for each in found:
                    if not each.is_file(follow_symlinks=False):
                        raise BootLoaderError(
                            f"{each.path} is no file, and would be lost with the other entries"
                        )

    def _write(self, files: RawSet, name: str) -> None:
        with told(f"cannot write boot entries in {self._loader}"), bootfs.directory(self._loader) as loader:
            temporary = durable.temporary_name(TEMPORARY)
            try:
                with bootfs.new_directory(loader, temporary) as entries:
                    for file_name, content in files.files:
                        durable.write_new_file(entries, file_name, (content,))
                bootfs.put_in_place(self._loader, loader, temporary, name)
            except BaseException:
                with contextlib.suppress(OSError):
                    bootfs.remove_tree(self._loader / temporary)
                raise

    def remove_staged(self) -> None:
        """See ``BootSetStore``."""
        with told(f"cannot remove {self._loader / self.STAGED}"):
            bootfs.remove_name(self._loader, self.STAGED)

    def activate(self) -> None:
        """See ``BootSetStore``."""
        self.require_replaceable()
        doing = f"cannot activate the boot entries in {self._loader}"
        with told(doing), bootfs.directory(self._loader) as loader:
            if bootfs.exists(self._loader / self.LIVE):
                durable.exchange_names(loader, self.STAGED, self.LIVE)
            else:
                durable.publish_name(loader, self.STAGED, self.LIVE)

    def remove_temporary(self) -> None:
        """See ``BootSetStore``."""
        bootfs.remove_temporary(self._loader)


class GrubSets:
    """The sets as GRUB files, ``user.cfg`` and ``user.cfg.staged`` in the directory ``grub2``."""

    LIVE: Final = "user.cfg"
    STAGED: Final = "user.cfg.staged"

    def __init__(self, grub: Path) -> None:
        self._grub = grub

    def live(self) -> RawSet | None:
        """See ``BootSetStore``."""
        return self._read(self.LIVE)

    def staged(self) -> RawSet | None:
        """See ``BootSetStore``; the one file has the name it will have when it is live."""
        return self._read(self.STAGED)

    def _read(self, name: str) -> RawSet | None:
        path = self._grub / name
        with told(f"cannot read {path}"):
            try:
                content = _read_file(path)
            except FileNotFoundError:
                return None
        return None if content is None else RawSet(((self.LIVE, content),))

    def require_replaceable(self) -> None:
        """See ``BootSetStore``."""
        path = self._grub / self.LIVE
        with told(f"cannot read {path}"):
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise BootLoaderError(f"{path} is no file, and would be lost")

    def write_staged(self, files: RawSet) -> None:
        """See ``BootSetStore``."""
        self._write(files, self.STAGED)

    def replace_live(self, files: RawSet) -> None:
        """See ``BootSetStore``."""
        self._write(files, self.LIVE)

    def _write(self, files: RawSet, name: str) -> None:
        ((_, content),) = files.files
        with told(f"cannot write {self._grub / name}"), bootfs.directory(self._grub) as grub:
            temporary = durable.temporary_name(TEMPORARY)
            try:
                durable.write_new_file(grub, temporary, (content,))
                bootfs.put_in_place(self._grub, grub, temporary, name)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=grub)
                raise

    def remove_staged(self) -> None:
        """See ``BootSetStore``."""
        with told(f"cannot remove {self._grub / self.STAGED}"):
            bootfs.remove_name(self._grub, self.STAGED)

    def activate(self) -> None:
        """See ``BootSetStore``."""
        doing = f"cannot activate {self._grub / self.STAGED}"
        with told(doing), bootfs.directory(self._grub) as grub:
            if bootfs.exists(self._grub / self.LIVE):
                durable.exchange_names(grub, self.STAGED, self.LIVE)
            else:
                durable.publish_name(grub, self.STAGED, self.LIVE)

    def remove_temporary(self) -> None:
        """See ``BootSetStore``."""
        bootfs.remove_temporary(self._grub)


def _read_file(path: Path) -> bytes | None:
    """The content of a regular file, None for anything else (directories, links, devices)."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    with open(fd, "rb") as file:
        content = file.read(MAX_FILE_SIZE + 1)
    if len(content) > MAX_FILE_SIZE:
        raise BootLoaderError(f"{path} is larger than {MAX_FILE_SIZE} bytes")
    return content
