"""The repository: opening and making one, its lock, its streams and images."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsverity import Algorithm, FsVerityError
from hostimaged.composefs.repository import names, opening
from hostimaged.composefs.repository.metadata import DEFAULT_FORMATS, Metadata, RepositoryMissing, Verity
from hostimaged.composefs.repository.names import NameTable, check_name, check_reference
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.composefs.repository.objects import ObjectMissing, ObjectStore
from hostimaged.composefs.repository.sharing import FileSharer, probe
from hostimaged.composefs.repository.upgrade import add_metadata
from hostimaged.composefs.splitstream import SplitStream, Writer
from hostimaged.errors import (
    CorruptRepository,
    ImageNotFound,
    PreconditionFailed,
    ReadOnly,
    from_os_error,
    printable,
)
from hostimaged.system import durable, locks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import TracebackType

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository.metadata import FormatSet
    from hostimaged.composefs.repository.objects import ObjectWriter
    from hostimaged.composefs.repository.sharing import Shareable
    from hostimaged.composefs.repository.stored import Sharing, Stored
    from hostimaged.composefs.repository.verity import VerityPolicy
    from hostimaged.ids import ObjectId

_STREAMS: Final = "streams"
_IMAGES: Final = "images"
_STREAM_REFS: Final = f"{_STREAMS}/{names.REFS}"
_IMAGE_REFS: Final = f"{_IMAGES}/{names.REFS}"
#: Finished streams up to this size are stored from memory, which avoids writing one that is there.
_STREAM_IN_MEMORY: Final = 8 << 20

DEFAULT_LOCK_TIMEOUT: Final = 60.0


class StreamMissing(ImageNotFound):
    """{stream} is not in the repository"""


class Repository:
    """A composefs repository, byte-compatible with composefs-rs 0.9; see ``init``, ``open`` and ``ensure``.

    Layout::

        PATH/                    0700; its flock is the lock of the repository
        |-- meta.json            version, algorithm, features, formats; with fs-verity: "secure"
        |-- objects/
        |   |-- 4e/67ea...       content, named by its fs-verity digest: files, streams, EROFS images
        |   `-- .tmp-object-*    left by a crash, only where O_TMPFILE is not supported
        |-- streams/
        |   |-- oci-layer-...    -> ../objects/4e/67ea...   a splitstream; its text says the stream id
        |   `-- refs/oci/...     -> ../../oci-manifest-...  root of the garbage collection
        |-- images/
        |   |-- 502b...          -> ../objects/50/2b...     an EROFS image, named by its digest
        |   `-- refs/...         -> ../502b...              root of the garbage collection
        `-- .symlink-*           a link on its way to its name; left by a crash

    Order of writing: objects, then the object of a stream or image, then ``syncfs``, then the name, then the
    reference. So a name that is seen leads to something whole, after a crash too. Links are replaced in one
    step and not synced: after a crash the last ones may be missing, never half there. ``sync`` makes them
    last.

    Locks, in this order: the job lock of the host (``HostPaths.job_lock``), the repository's. Shared from
    ``open`` to ``close``: it keeps collectors of any program from removing what is not referenced yet.
    Exclusive to remove objects: taken by ``open``, or by ``relock``, which drops the shared one in between,
    so that all facts must be read again. Who holds the shared lock may find new objects and names at any
    time, and lose references, but no object.

    Without a lock (``open_unlocked``, reading only): everything that is opened is whole, but may be removed
    between two looks. ``ObjectMissing`` and ``StreamMissing`` then mean "read again".

    A repository is *secure* if meta.json has fs-verity: then every object must have it, and is checked when
    it is opened. In an insecure one fs-verity is used where it can be and its absence is accepted;
    ``read_object`` checks the digest itself.

    Storing objects and reading is thread-safe. Methods raise ``NoSpace``, ``ReadOnly``, ``StorageError``,
    ``CorruptRepository`` and ``VerityMismatch``; those that take names ``InvalidArgs``. A failing method
    leaves nothing half-made; objects stored on the way stay, for the collector. A context manager.
    """

    __slots__ = ("_fd", "_names", "_objects", "_policy", "_sharer", "metadata", "path")

    #: Where it is, as the caller said.
    path: Path
    #: What meta.json says.
    metadata: Metadata

    def __init__(self, path: Path, fd: int, metadata: Metadata, policy: VerityPolicy) -> None:
        self.path = path
        self._fd = fd
        self.metadata = metadata
        self._policy = policy
        self._objects = ObjectStore(fd, metadata.algorithm, policy)
        self._sharer = FileSharer(self._objects, metadata.algorithm)
        self._names = NameTable(fd)

    # --- making and opening --------------------------------------------------------------------------------

    @classmethod
    def init(
        cls,
        path: str | os.PathLike[str],
        *,
        algorithm: Algorithm = Algorithm.SHA512,
        formats: FormatSet = DEFAULT_FORMATS,
        verity: Verity = Verity.REQUIRE,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        check: Callable[[], None] | None = None,
    ) -> tuple[Self, bool]:
        """Make a repository at ``path``, whose parent exists, and open it; says whether it is new.

        One that is there and was made with the same algorithm and formats is opened. Raises
        ``PreconditionFailed`` if it differs, ``OldRepository``, ``VerityUnavailable``, and as ``open`` does.
        """
        path = Path(path)
        wanted = Metadata.new(algorithm, formats)
        created = opening.make_directory(path)
        try:
            is_new = opening.write_metadata(path, wanted, verity)
        except BaseException:
            if created:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        if created:
            try:
                durable.sync_directory(path.parent)
            except OSError as error:
                raise from_os_error(error, "cannot make the repository") from error
        repository = cls.open(path, lock_timeout=lock_timeout, check=check)
        found = repository.metadata
        if not is_new and found != wanted:
            repository.close()
            raise PreconditionFailed(f"there is a repository at {path} already: it is {found}, not {wanted}")
        return repository, is_new

    @classmethod
    def ensure(
        cls,
        path: str | os.PathLike[str],
        *,
        algorithm: Algorithm = Algorithm.SHA512,
        formats: FormatSet = DEFAULT_FORMATS,
        verity: Verity = Verity.REQUIRE,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        check: Callable[[], None] | None = None,
    ) -> tuple[Self, bool]:
        """Open the repository at ``path`` as it is, or make one as ``init`` does; says whether it is new."""
        try:
            return cls.open(path, lock_timeout=lock_timeout, check=check), False
        except RepositoryMissing:
            pass
        try:
            return cls.init(
                path,
                algorithm=algorithm,
                formats=formats,
                verity=verity,
                lock_timeout=lock_timeout,
                check=check,
            )
        except PreconditionFailed:
            # Another program was faster, with other parameters: as good as one that was there before.
            return cls.open(path, lock_timeout=lock_timeout, check=check), False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        exclusive: bool = False,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        insecure: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Self:
        """Open the repository at ``path`` and hold its lock, waiting ``lock_timeout`` seconds at most.

        ``check`` is called while waiting, and may raise to give up.
        ``insecure`` accepts objects without fs-verity even where it is required. Raises
        ``RepositoryMissing``, ``OldRepository``, ``MetadataError``, ``IncompatibleRepository`` or
        ``LockTimeout``.
        """
        path = Path(path)
        fd = opening.open_directory(path)
        try:
            _lock(fd, path, exclusive=exclusive, timeout=lock_timeout, check=check)
            return cls._opened(path, fd, insecure=insecure)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open_unlocked(cls, path: str | os.PathLike[str]) -> Self:
        """Open the repository for looking only, without its lock: see the class about what may be assumed.

        Raises as ``open`` does, save for the lock.
        """
        path = Path(path)
        fd = opening.open_directory(path)
        try:
            return cls._opened(path, fd, insecure=False)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def upgrade(
        cls,
        path: str | os.PathLike[str],
        *,
        formats: FormatSet = DEFAULT_FORMATS,
        verity: Verity | None = None,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        check: Callable[[], None] | None = None,
    ) -> tuple[Self, bool]:
        """Open the repository at ``path``, giving one of the old format, which ``open`` refuses, its
        meta.json first; says whether it did.

        It becomes secure if its objects have fs-verity. Where only some have, ``verity`` must be
        ``OPPORTUNISTIC``; with ``REQUIRE`` all must. See ``repository.upgrade`` about crashes and errors.
        """
        path = Path(path)
        fd = opening.open_directory(path)
        try:
            _lock(fd, path, exclusive=False, timeout=lock_timeout, check=check)
            upgraded = add_metadata(fd, path, formats, verity)
            return cls._opened(path, fd, insecure=False), upgraded
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _opened(cls, path: Path, fd: int, *, insecure: bool) -> Self:
        metadata, policy = opening.read_metadata(fd, path)
        if insecure:
            policy = policy.relaxed()
        return cls(path, fd, metadata, policy)

    def close(self) -> None:
        """Close everything, which ends the lock. Twice is harmless."""
        self._objects.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def unlock(self) -> None:
        """Give the lock up until ``relock``; only what ``open_unlocked`` says holds meanwhile."""
        locks.unlock(self._fd)

    def relock(
        self,
        *,
        exclusive: bool,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Exchange the lock. No lock is held in between, nor after ``LockTimeout``: close the repository."""
        _lock(self._fd, self.path, exclusive=exclusive, timeout=lock_timeout, check=check)

    # --- facts ---------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor of its directory, for looking; it stays the repository's."""
        return self._fd

    @property
    def algorithm(self) -> Algorithm:
        """The hash of its objects."""
        return self.metadata.algorithm

    @property
    def formats(self) -> FormatSet:
        """The formats it wants EROFS images in."""
        return self.metadata.formats

    @property
    def secure(self) -> bool:
        """Whether every object must have fs-verity."""
        return self._policy.secure

    def check_writable(self) -> None:
        """Raises ``ReadOnly`` if nothing can, or may, be written here. Methods that set names do so too."""
        if flags := self.metadata.unknown_read_only_compatible:
            raise ReadOnly(f"the repository may only be read by this program: it has {', '.join(flags)}")
        try:
            # Root passes the second check on a read-only mount, hence the first.
            read_only = bool(os.fstatvfs(self._fd).f_flag & os.ST_RDONLY)
            writable = os.access(".", os.W_OK, dir_fd=self._fd, effective_ids=True)
        except OSError as error:
            raise from_os_error(error, f"cannot look at the repository at {self.path}") from error
        if read_only or not writable:
            raise ReadOnly(f"the repository at {self.path} cannot be written to")

    def used_bytes(self) -> int:
        """Bytes that its objects take on disk (blocks, not lengths); looks at every object."""
        return self._objects.used_bytes()

    def scan_objects(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file among the objects: its path below ``objects`` and its status, without a lock."""
        return self._objects.scan()

    # --- objects -------------------------------------------------------------------------------------------

    def store_object(self, buffer: Buffer) -> Stored:
        """Store content that is in memory. It is hashed first, and not written if it is there.

        Not synced, and no root of the garbage collection: see ``write_stream``.
        """
        self._require_flags()
        return self._objects.store(buffer)

    def object_writer(self) -> ObjectWriter:
        """Store content that comes in pieces, without holding it: ``write`` the pieces, then ``commit``."""
        self._require_flags()
        return self._objects.writer()

    def store_file(
        self, fd: int, size: int, sharing: Sharing, seen: Callable[[Buffer], object] | None = None
    ) -> Stored:
        """Store a file of another store, open read-only, of ``size`` bytes; ``seen`` gets all of them once.

        With a hard link it is that very file that becomes the object. Raises ``SharingImpossible`` where it
        would have to be copied and must not be, ``ChangedWhileRead``. See ``store_object``.
        """
        self._require_flags()
        return self._sharer.store(fd, size, sharing, seen)

    def can_share(self, store: Path) -> Shareable:
        """In which ways ``store_file`` need not copy files of the directory ``store``; it need not exist yet.

        Tried with a small file, of which nothing is left. Raises ``ReadOnly``.
        """
        self.check_writable()
        return probe(store, self._objects)

    def open_object(self, id_: ObjectId, /) -> int:
        """A descriptor of an object, the caller's to close; ``ObjectMissing`` if there is none."""
        return self._objects.open(id_)

    def open_verified(self, id_: ObjectId, /) -> int:
        """As ``open_object``, with the digest checked in any case: by the kernel, or by reading it all."""
        return self._objects.open_verified(id_)

    def read_object(self, id_: ObjectId, limit: int) -> bytes:
        """The content of an object, its digest checked. Raises ``LimitsExceeded`` beyond ``limit`` bytes."""
        return self._objects.read(id_, limit)

    def distrust(self, ids: Collection[ObjectId]) -> None:
        """From now on take these objects, which are known to be damaged, for missing.

        Reading them raises ``VerityMismatch``; storing one replaces it, in one step, and ends the distrust.
        """
        self._objects.distrusted.update(ids)

    @property
    def distrusted(self) -> frozenset[ObjectId]:
        """The objects that are taken for missing."""
        return frozenset(self._objects.distrusted)

    def has_object(self, id_: ObjectId) -> bool:
        """Whether there is a file of that name; it is not looked into."""
        return self._objects.size(id_) is not None

    def object_size(self, id_: ObjectId) -> int:
        """Bytes of an object. Raises ``ObjectMissing``."""
        size = self._objects.size(id_)
        if size is None:
            raise ObjectMissing(id=id_.hex())
        return size

    def sync(self) -> None:
        """Write everything, the names too, to the device: ``syncfs``."""
        try:
            durable.sync_filesystem(self._fd)
        except OSError as error:
            raise from_os_error(error, "cannot sync the repository") from error

    def _require_flags(self) -> None:
        """The part of ``check_writable`` that no system call tells: it is asked once per object."""
        if self.metadata.unknown_read_only_compatible:
            self.check_writable()

    def _check_trusted(self, link: str) -> None:
        """Raises ``VerityMismatch`` if ``link`` leads to an object that is known to be damaged."""
        if self._objects.distrusted and (text := self._names.read(link)) is not None:
            with contextlib.suppress(FsVerityError):
                self._objects.check_trusted(fsverity.parse_pathname(self.algorithm, text))

    # --- streams -------------------------------------------------------------------------------------------

    def new_stream(self, content_type: int) -> Writer:
        """A writer whose temporary files lie beside the repository's, not in memory or /tmp."""
        return Writer(self.algorithm, content_type, self._temporary_file)

    def _temporary_file(self) -> int:
        with self._objects.new_file() as file:
            return file.detach()

    def write_stream(self, name: str, writer: Writer, ref: str | None = None) -> ObjectId:
        """Store a finished stream as ``name`` and let the reference ``ref`` lead to it; its stream id.

        Everything is synced before the name appears. An existing name is pointed anew. Ends the writer,
        also when it raises.
        """
        with writer:
            check_name(name)
            if ref is not None:
                check_reference(ref)
            self.check_writable()
            parts = writer.finish()
            if writer.stored_size <= _STREAM_IN_MEMORY:
                stored = self._objects.store(b"".join(parts))
            else:
                with self._objects.writer() as object_writer:
                    for part in parts:
                        object_writer.write(part)
                    stored = object_writer.commit()
        self.sync()
        self._names.set(f"{_STREAMS}/{name}", f"{OBJECTS}/{stored.id.pathname}")
        if ref is not None:
            self._names.set(f"{_STREAM_REFS}/{ref}", f"{_STREAMS}/{name}")
        return stored.id

    def has_stream(self, name: str) -> ObjectId | None:
        """The stream id that ``name`` stands for, None if there is no such name.

        The object is not looked at. Raises ``CorruptRepository`` for a malformed name.
        """
        text = self._names.read(f"{_STREAMS}/{check_name(name)}")
        if text is None:
            return None
        if not text.startswith("../"):
            raise CorruptRepository(f"stream {printable(name)} does not lead to an object")
        return fsverity.parse_pathname(self.algorithm, text)

    def open_stream(self, name: str, id_: ObjectId | None = None, expected: int | None = None) -> SplitStream:
        """Open a stream: the object ``id_``, checked as any, or else what ``name`` leads to, unchecked.

        ``name`` may be ``refs/`` and a reference; with ``id_`` it only names the stream in errors. Raises
        ``StreamMissing``, ``ObjectMissing`` or ``SplitStreamError``; ``expected`` is the content type that
        the caller wants.
        """
        what = f"stream {name or (id_ or b'').hex()}"
        if id_ is None and "/" not in name:
            self._check_trusted(f"{_STREAMS}/{check_name(name)}")
        if id_ is not None:
            fd = self._objects.open(id_)
        elif (opened := self._names.open(f"{_STREAMS}/{check_reference(name)}")) is not None:
            fd = opened
        else:
            raise StreamMissing(stream=what)
        return SplitStream(fd, self.algorithm, name=what, expected=expected)

    def name_stream(self, name: str, ref: str) -> None:
        """Let the reference ``ref`` lead to the stream ``name``. Raises ``StreamMissing``.

        A reference that leads nowhere would make the garbage collector of composefs-rs fail.
        """
        check_reference(ref)
        self.check_writable()
        if not self._names.leads_somewhere(f"{_STREAMS}/{check_name(name)}"):
            raise StreamMissing(stream=f"stream {name}")
        self._names.set(f"{_STREAM_REFS}/{ref}", f"{_STREAMS}/{name}")

    def remove_stream_ref(self, ref: str) -> bool:
        """Remove a reference; says whether it was there."""
        check_reference(ref)
        self.check_writable()
        return self._names.remove(f"{_STREAM_REFS}/{ref}")

    def streams(self) -> list[str]:
        """The names of all streams, sorted."""
        return self._names.entries(_STREAMS)

    def stream_refs(self, prefix: str = "") -> dict[str, str]:
        """References below ``prefix``, a directory of them, to the names of their streams.

        The references are relative to ``prefix``. Dangling ones are among them.
        """
        return self._names.references(_below(_STREAM_REFS, prefix))

    def stream_modified(self, ref: str) -> float | None:
        """When a reference was last pointed, in seconds since the epoch; None if it is missing."""
        return self._names.modified(f"{_STREAM_REFS}/{check_reference(ref)}")

    # --- images --------------------------------------------------------------------------------------------

    def write_image(self, buffer: Buffer, ref: str | None = None) -> ObjectId:
        """Store an EROFS image and let the reference ``ref`` lead to it; its id.

        Everything is synced before the name appears, which composefs-rs does not do.
        """
        if ref is not None:
            check_reference(ref)
        self.check_writable()
        stored = self._objects.store(buffer)
        self.sync()
        link = f"{_IMAGES}/{stored.id.hex()}"
        self._names.set(link, f"{OBJECTS}/{stored.id.pathname}")
        if ref is not None:
            self._names.set(f"{_IMAGE_REFS}/{ref}", link)
        return stored.id

    def open_image(self, name: str) -> int:
        """A descriptor of an image, the caller's to close.

        ``name`` is the id in hex, which is checked as any object's, a reference without ``/``, or ``refs/``
        and a reference, which are not. Raises ``ImageNotFound``, ``VerityMismatch`` or ``FsVerityError``.
        """
        if "/" not in name:
            self._check_trusted(f"{_IMAGES}/{check_name(name)}")
        fd = self._names.open(f"{_IMAGES}/{check_reference(name)}")
        if fd is None and "/" not in name:
            fd = self._names.open(f"{_IMAGE_REFS}/{name}")
            if fd is not None:
                return fd
        if fd is None:
            raise ImageNotFound(f"image {printable(name)} is not in the repository")
        if "/" in name:
            return fd
        try:
            self._policy.verify(fd, fsverity.parse_hex(self.algorithm, name))
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"cannot check image {name}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def name_image(self, name: str, ref: str) -> None:
        """Let the reference ``ref`` lead to the image ``name``, an id in hex; as ``name_stream``.

        Raises ``ImageNotFound``.
        """
        check_reference(ref)
        self.check_writable()
        if not self._names.leads_somewhere(f"{_IMAGES}/{check_name(name)}"):
            raise ImageNotFound(f"image {printable(name)} is not in the repository")
        self._names.set(f"{_IMAGE_REFS}/{ref}", f"{_IMAGES}/{name}")

    def remove_image_ref(self, ref: str) -> bool:
        """Remove a reference; says whether it was there."""
        check_reference(ref)
        self.check_writable()
        return self._names.remove(f"{_IMAGE_REFS}/{ref}")

    def images(self) -> list[str]:
        """The ids, in hex, of all images, sorted."""
        return self._names.entries(_IMAGES)

    def image_refs(self, prefix: str = "") -> dict[str, str]:
        """References below ``prefix``, as ``stream_refs``, to the ids in hex of their images."""
        return self._names.references(_below(_IMAGE_REFS, prefix))


def _lock(fd: int, path: Path, *, exclusive: bool, timeout: float, check: Callable[[], None] | None) -> None:
    what = f"the repository at {path}"
    locks.lock(fd, exclusive=exclusive, timeout=timeout, what=what, check=check)


def _below(directory: str, prefix: str) -> str:
    return f"{directory}/{check_reference(prefix)}" if prefix else directory
