"""The files of one layer in a store, and its tar made of them bit for bit.

The files lie in the layer's ``diff``, or in that of a layer below where overlayfs copied only metadata up.
Nobody but the digest of the whole tar vouches for what is given here.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from hostimaged.errors import ImageNotFound, UnsupportedImage, from_os_error, printable
from hostimaged.oci.storage.crc64 import crc64_file
from hostimaged.oci.storage.store import StoreDamaged
from hostimaged.oci.storage.tarsplit import FileEntry, parse
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from hostimaged.errors import HostimageError
    from hostimaged.oci.storage.store import Store

#: Layers below one that are searched (composefs-rs 0.9 gives up there, too).
MAX_LOWER: Final = 500
#: Bytes of ``lower``: podman itself writes no more than fit into mount options, a page.
_MAX_LOWER_TEXT: Final = 64 << 10
_READ: Final = 256 << 10
_LINK: Final = re.compile(r"l/([A-Za-z0-9]{1,64})\Z")
_TARGET: Final = re.compile(r"\.\./([0-9a-f]{64})/diff\Z")
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_METACOPY: Final = ("trusted.overlay.metacopy", "user.overlay.metacopy")


class OpenFile(NamedTuple):
    """The content of a file of the tar: all ``size`` bytes of ``fd``, open read-only.

    The descriptor is not the caller's, and stays open until the next part is asked for.
    """

    name: bytes
    size: int
    fd: int


class Layer:
    """A layer of ``store``. Opening holds descriptors only; a context manager, for one thread.

    ``check`` is called while checksums are computed, which may take long, and may raise.
    """

    def __init__(self, store: Store, layer_id: str, check: Callable[[], None]) -> None:
        self._store = store
        self._check = check
        self._id = layer_id
        self._lower: list[str] | None = None
        self._tar_split = -1
        self._diff = self._open(f"overlay/{layer_id}/diff", _DIRECTORY_FLAGS)
        try:
            self._tar_split = self._open(f"overlay-layers/{layer_id}.tar-split.gz", _FILE_FLAGS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its descriptors. Twice is harmless."""
        for fd in (self._diff, self._tar_split):
            if fd >= 0:
                os.close(fd)
        self._diff = self._tar_split = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def parts(self) -> Iterator[bytes | OpenFile]:
        """The tar: bytes, and files whose content comes next.

        Raises ``StoreDamaged`` where the data or a file is not as it must be, ``ImageNotFound`` if the layer
        was removed meanwhile.
        """
        for part in self._entries():
            if isinstance(part, bytes):
                yield part
                continue
            fd = self._file(part)
            try:
                yield OpenFile(part.name, part.size, fd)
            finally:
                os.close(fd)

    def damaged_files(self) -> Iterator[bytes]:
        """Names of the files that do not have the checksum that was made when they were stored."""
        for part in self._entries():
            if isinstance(part, bytes) or part.checksum is None:
                continue
            fd = self._file(part)
            try:
                if crc64_file(fd, part.size, self._check) != part.checksum:
                    yield part.name
            finally:
                os.close(fd)

    def _entries(self) -> Iterator[bytes | FileEntry]:
        try:
            yield from parse(self._compressed())
        except UnsupportedImage as error:
            raise self._damaged(f"the tar-split data of layer {self._id}: {error.message}") from error

    def _compressed(self) -> Iterator[bytes]:
        at = 0
        try:
            while piece := os.pread(self._tar_split, _READ, at):
                at += len(piece)
                yield piece
        except OSError as error:
            raise from_os_error(error, f"reading containers-storage at {self._store.root}") from error

    # --- files ---------------------------------------------------------------------------------------------

    def _file(self, entry: FileEntry) -> int:
        """A descriptor of the file with the content of ``entry``."""
        fd = self._try(self._diff, entry)
        if fd is not None:
            return fd
        for layer_id in self._below():
            directory = self._open(f"overlay/{layer_id}/diff", _DIRECTORY_FLAGS)
            try:
                fd = self._try(directory, entry)
            finally:
                os.close(directory)
            if fd is not None:
                return fd
        raise self._missing(f"the file {printable(entry.name)} of layer {self._id}")

    def _try(self, directory: int, entry: FileEntry) -> int | None:
        """The file in the ``diff`` directory; None if it is not there, or only its metadata is."""
        name = entry.name.removeprefix(b"./")
        try:
            fd = syscalls.open_beneath(directory, os.fsdecode(name), _FILE_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._damaged(
                f"the file {printable(entry.name)} of layer {self._id} cannot be opened: {error.strerror}"
            ) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged(f"{printable(entry.name)} of layer {self._id} is no regular file")
            if self._is_stub(fd, status, entry):
                os.close(fd)
                return None
            if status.st_size != entry.size:
                raise self._damaged(
                    f"the file {printable(entry.name)} of layer {self._id} has {status.st_size} bytes, "
                    f"not {entry.size}"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _is_stub(self, fd: int, status: os.stat_result, entry: FileEntry) -> bool:
        """Whether the content of a file is in a layer below (overlayfs, "metacopy")."""
        if status.st_blocks and status.st_size == entry.size:
            return False
        for name in _METACOPY:
            try:
                os.getxattr(fd, name)
            except OSError:
                continue
            return True
        # The attribute may not be seen without CAP_SYS_ADMIN. A stub has no blocks, as a file of zeros may.
        if status.st_blocks or status.st_size != entry.size or entry.checksum is None:
            return False
        return crc64_file(fd, entry.size, self._check) != entry.checksum

    # --- layers below --------------------------------------------------------------------------------------

    def _below(self) -> list[str]:
        """The ids of the layers below, nearest first."""
        if self._lower is None:
            found = {self._id: None}
            pending = self._links(self._id)
            while pending:
                layer_id = self._resolve(pending.pop(0))
                if layer_id in found:
                    continue
                found[layer_id] = None
                if len(found) > MAX_LOWER + 1:
                    raise self._damaged(f"layer {self._id} has over {MAX_LOWER} layers below it")
                pending[:0] = self._links(layer_id)
            self._lower = list(found)[1:]
        return self._lower

    def _links(self, layer_id: str) -> list[str]:
        name = f"overlay/{layer_id}/lower"
        try:
            with os.fdopen(syscalls.open_beneath(self._store.fileno(), name, _FILE_FLAGS), "rb") as file:
                text = file.read(_MAX_LOWER_TEXT + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(name, error) from error
        found = [_LINK.match(link) for link in text.decode("ascii", "replace").strip().split(":")]
        if len(text) > _MAX_LOWER_TEXT or None in found:
            raise self._damaged(f"{name} is not valid")
        return [link[1] for link in found if link is not None]

    def _resolve(self, link: str) -> str:
        name = f"overlay/l/{link}"
        try:
            target = os.readlink(name, dir_fd=self._store.fileno())
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise self._unreadable(name, error) from error
        found = _TARGET.match(target)
        if found is None:
            raise self._damaged(f"{name} leads to no layer")
        return found[1]

    # --- errors --------------------------------------------------------------------------------------------

    def _open(self, name: str, flags: int) -> int:
        try:
            return syscalls.open_beneath(self._store.fileno(), name, flags)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _missing(self, what: str) -> HostimageError:
        """The error for something that should be there: was the whole layer removed meanwhile?"""
        if self._id not in {layer.id for layer in self._store.layers().values()}:
            return ImageNotFound(
                f"layer {self._id} was removed from containers-storage at {self._store.root} meanwhile"
            )
        return self._damaged(f"{what} is missing")

    def _damaged(self, detail: str) -> StoreDamaged:
        return StoreDamaged(root=self._store.root, detail=detail)

    def _unreadable(self, name: str, error: OSError) -> HostimageError:
        return from_os_error(error, f"cannot open {self._store.root / name}")
