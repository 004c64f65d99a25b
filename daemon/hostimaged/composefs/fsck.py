"""Check of a repository: is everything there that is named, and is it what its name says?

Phases, findings and counts are those of composefs-rs 0.9.4 (``cfsctl fsck``):

0. meta.json is read again;
1. every object has the digest that is its name (``fsck_objects``); left out of a check of the metadata;
2. every stream leads to an object, opens, and every object it refers to is there; every reference below
   ``streams/refs`` leads somewhere;
3. every image leads to an object, is a sound composefs image, and every object it needs is there; every
   reference below ``images/refs`` leads somewhere.

Content of streams is not read. Objects are seen as the rest of the program sees them, so links are followed
within the repository only, and files are bounded as elsewhere. Nothing is changed, and a finding never ends
the check: only a directory that cannot be read does. What manifests and configurations say is the business of
``hostimaged.oci.fsck``.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final, Protocol

from hostimaged.composefs.erofs import ErofsError, Image
from hostimaged.composefs.erofs.format import MAX_IMAGE
from hostimaged.composefs.fsck_objects import OBJECTS, ObjectCheck
from hostimaged.composefs.fsck_report import Findings, Kind, Report, shown
from hostimaged.composefs.repository.metadata import FILE_NAME, MAX_SIZE, Metadata
from hostimaged.errors import HostimageError, from_os_error
from hostimaged.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ObjectId

_STREAMS: Final = "streams"
_IMAGES: Final = "images"
_REFS: Final = "refs"
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
#: O_NONBLOCK: a fifo in the place of an image must not hang us.
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK
#: Objects remembered to be there, which takes some 15 MB.
_MAX_PRESENT: Final = 100_000
#: What composefs-rs calls the types of files.
_FILE_TYPES: Final = {
    stat.S_IFREG: "RegularFile",
    stat.S_IFIFO: "Fifo",
    stat.S_IFSOCK: "Socket",
    stat.S_IFCHR: "CharacterDevice",
    stat.S_IFBLK: "BlockDevice",
}


class Breaks(Protocol):
    """Gives up the lock of the repository now and then, so that others get it."""

    def due(self) -> bool:
        """Whether it is time to; called often."""

    def take(self) -> None:
        """Give it up for a while; nothing is read meanwhile."""


def check(
    repository: Repository,
    *,
    metadata_only: bool = False,
    give_up: Callable[[], None] | None = None,
    breaks: Breaks | None = None,
    advance: Callable[[int], None] | None = None,
) -> Report:
    """Check ``repository``; with ``metadata_only`` the content of objects is not looked at.

    ``give_up`` is called now and then, and may raise to end the check. ``breaks`` are taken between two
    entries, and while an object is read; what others remove meanwhile is no finding. ``advance`` is called,
    in any thread, with the number of each directory of objects that was checked. Raises ``StorageError`` or
    another ``HostimageError`` only if a directory cannot be read, and what those two raise. Memory is bounded
    by the largest image.
    """
    return _Check(repository, give_up or _go_on, breaks, advance).run(metadata_only=metadata_only)


def _go_on() -> None:
    pass


class _Check:
    """One check under way."""

    def __init__(
        self,
        repository: Repository,
        give_up: Callable[[], None],
        breaks: Breaks | None,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._repository = repository
        self._advance = advance
        self._root = repository.fileno()
        self._may_end = give_up
        self._breaks = breaks
        #: Breaks taken so far.
        self._taken = 0
        self._objects: ObjectCheck | None = None
        self._report = Report()
        # Images need what their layers refer to, so most objects are asked for twice.
        self._present: set[bytes] = set()
        #: Directories of objects of which that has the files.
        self._listed_objects: set[int] = set()

    def run(self, *, metadata_only: bool) -> Report:
        self._metadata()
        if metadata_only:
            self._names()
            return self._report
        repository = self._repository
        objects = ObjectCheck(
            self._root,
            repository.algorithm,
            secure=repository.secure,
            check=self._give_up,
            done=self._advance,
        )
        report = self._report
        self._objects = objects
        with objects:
            objects.begin()
            # Helpers may be hashing now. What is found meanwhile is told after what they find.
            before, report.errors = report.errors, Findings()
            self._names()
            tally = objects.finish()
        after, report.errors = report.errors, before
        report.objects_checked = tally.checked
        report.objects_corrupted = tally.corrupted
        report.errors.extend(tally.findings)
        report.errors.extend(after)
        return report

    def _give_up(self) -> None:
        """End here if need be, or take a break."""
        self._may_end()
        if self._breaks is None or not self._breaks.due():
            return
        with self._objects.idle() if self._objects is not None else contextlib.nullcontext():
            self._breaks.take()
        self._taken += 1
        self._present.clear()
        self._listed_objects.clear()

    def _metadata(self) -> None:
        report = self._report
        try:
            fd = os.open(FILE_NAME, _FILE_FLAGS | os.O_CLOEXEC, dir_fd=self._root)
            try:
                metadata = Metadata.parse(os.pread(fd, MAX_SIZE + 1, 0))
            finally:
                os.close(fd)
        except FileNotFoundError:
            report.errors.add(Kind.METADATA_PARSE_FAILED, FILE_NAME, "it was there a moment ago")
            return
        except OSError as error:
            report.errors.add(Kind.METADATA_PARSE_FAILED, FILE_NAME, error.strerror)
            return
        except HostimageError as error:
            report.errors.add(Kind.METADATA_PARSE_FAILED, FILE_NAME, error.message)
            return
        report.has_metadata = True
        opened = self._repository.algorithm
        try:
            metadata.check()
            compatible = metadata.algorithm is opened
        except HostimageError:
            compatible = False
        if not compatible:
            detail = f"expected {metadata.algorithm.identifier}, repository opened as {opened.label}"
            report.errors.add(Kind.METADATA_ALGORITHM_MISMATCH, FILE_NAME, detail)

    def _names(self) -> None:
        report = self._report
        for name, kind in self._entries(_STREAMS):
            report.streams_checked += 1
            report.streams_corrupted += self._is_corrupted(f"{_STREAMS}/{name}", kind, self._check_stream)
        self._check_references(_STREAMS)
        for name, kind in self._entries(_IMAGES):
            report.images_checked += 1
            report.images_corrupted += self._is_corrupted(f"{_IMAGES}/{name}", kind, self._check_image)
        self._check_references(_IMAGES)

    # --- names and references ------------------------------------------------------------------------------

    def _entries(self, directory: str) -> Iterator[tuple[str, int]]:
        """Names and file types in ``directory``, without the references."""
        listed_at = self._taken
        for name, kind in self._listed(directory):
            if name == _REFS:
                continue
            self._give_up()
            if self._taken == listed_at or self._is_there(f"{directory}/{name}"):
                yield name, kind

    def _is_there(self, path: str) -> bool:
        """Whether what was listed before a break is there still."""
        with contextlib.suppress(FileNotFoundError):
            os.stat(path, dir_fd=self._root, follow_symlinks=False)
            return True
        return False

    def _is_corrupted(self, path: str, kind: int, check_target: Callable[[str], None]) -> bool:
        """Check an entry that should be a link, and what it leads to."""
        if kind != stat.S_IFLNK:
            self._report.errors.add(Kind.ENTRY_NOT_SYMLINK, shown(path))
            return True
        if (finding := self._follow(path)) is not None:
            return finding is Kind.BROKEN_SYMLINK
        try:
            check_target(path)
        except _Corrupted as error:
            self._report.errors.add(error.kind, shown(path), error.detail)
            return True
        return False

    def _follow(self, path: str) -> Kind | None:
        """Note what is wrong with a link, and say it; None if it leads to something."""
        try:
            os.close(syscalls.open_beneath(self._root, path, os.O_PATH))
        except FileNotFoundError:
            self._report.broken_links += 1
            self._report.errors.add(Kind.BROKEN_SYMLINK, shown(path))
            return Kind.BROKEN_SYMLINK
        except OSError as error:
            self._report.errors.add(Kind.STAT_FAILED, shown(path), error.strerror)
            return Kind.STAT_FAILED
        return None

    def _check_references(self, category: str) -> None:
        pending = [f"{category}/{_REFS}"]
        while pending:
            directory = pending.pop()
            self._give_up()
            for name, kind in self._listed(directory):
                path = f"{directory}/{name}"
                if kind == stat.S_IFDIR:
                    pending.append(path)
                elif kind == stat.S_IFLNK:
                    self._follow(path)
                else:
                    detail = _FILE_TYPES.get(kind, "Unknown")
                    self._report.errors.add(Kind.UNEXPECTED_FILE_TYPE, shown(path), detail)

    def _listed(self, directory: str) -> list[tuple[str, int]]:
        """Names and file types in ``directory``, sorted; [] if it is missing."""
        found = []
        try:
            fd = syscalls.open_beneath(self._root, directory, _DIRECTORY_FLAGS)
            try:
                for name in sorted(os.listdir(fd)):
                    # References may be removed while we look.
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        found.append((name, stat.S_IFMT(status.st_mode)))
            finally:
                os.close(fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise from_os_error(error, f"cannot list {shown(directory)} of the repository") from error
        return found

    # --- streams and images --------------------------------------------------------------------------------

    def _check_stream(self, path: str) -> None:
        name = path.removeprefix(f"{_STREAMS}/")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise _Corrupted(Kind.STREAM_OPEN_FAILED, "its name is not UTF-8") from None
        try:
            with self._repository.open_stream(name) as stream:
                objects, names = stream.object_refs, stream.named_refs
        except HostimageError as error:
            raise _Corrupted(Kind.STREAM_OPEN_FAILED, error.message) from error
        for id_ in objects:
            self._check_present(id_, path, Kind.MISSING_OBJECT_REF)
        for name, id_ in names.items():
            self._check_present(id_, path, Kind.MISSING_NAMED_REF, f"ref {name}: ")

    def _check_image(self, path: str) -> None:
        try:
            fd = syscalls.open_beneath(self._root, path, _FILE_FLAGS)
        except OSError as error:
            raise _Corrupted(Kind.IMAGE_OPEN_FAILED, error.strerror) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _Corrupted(Kind.IMAGE_READ_FAILED, "not a regular file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_IMAGE + 1)
        except OSError as error:
            raise _Corrupted(Kind.IMAGE_READ_FAILED, error.strerror) from error
        finally:
            os.close(fd)
        try:
            objects = Image(data, self._repository.algorithm).objects()
        except ErofsError as error:
            raise _Corrupted(Kind.IMAGE_INVALID, error.message) from error
        for id_ in sorted(objects):
            self._check_present(id_, path, Kind.IMAGE_MISSING_OBJECT)

    def _check_present(self, id_: ObjectId, path: str, kind: Kind, prefix: str = "") -> None:
        if id_ in self._present:
            return
        if id_[0] not in self._listed_objects and len(self._present) < _MAX_PRESENT:
            self._list_objects(id_[0])
            if id_ in self._present:
                return
        try:
            name = f"{OBJECTS}/{id_.pathname}"
            # Whatever is no file is for the kernel to open, or not.
            if not stat.S_ISREG(os.stat(name, dir_fd=self._root).st_mode):
                os.close(os.open(name, _FILE_FLAGS | os.O_CLOEXEC, dir_fd=self._root))
        except FileNotFoundError:
            self._report.missing_objects += 1
            self._report.errors.add(kind, shown(path), f"{prefix}{id_.hex()}")
        except OSError as error:
            self._report.errors.add(Kind.OBJECT_CHECK_FAILED, shown(path), f"{id_.hex()}: {error.strerror}")
        else:
            if len(self._present) < _MAX_PRESENT:
                self._present.add(id_)

    def _list_objects(self, byte: int) -> None:
        """Take note of the files in a directory of objects; whatever else is there, each asks for itself."""
        self._listed_objects.add(byte)
        algorithm, prefix = self._repository.algorithm, f"{byte:02x}"
        try:
            fd = os.open(f"{OBJECTS}/{prefix}", _DIRECTORY_FLAGS | os.O_CLOEXEC, dir_fd=self._root)
            try:
                with os.scandir(fd) as entries:
                    names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
            finally:
                os.close(fd)
        except OSError:
            return
        length, size = algorithm.hex_length - 2, algorithm.digest_size
        text = "".join(f"{prefix}{name}" for name in names if len(name) == length)
        with contextlib.suppress(ValueError):
            found = bytes.fromhex(text)
            # Upper case and white space, which are read too, are no names of objects.
            if found.hex() == text:
                self._present.update(found[at : at + size] for at in range(0, len(found), size))


class _Corrupted(Exception):
    """A stream or an image is not what it should be."""

    def __init__(self, kind: Kind, detail: object) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
