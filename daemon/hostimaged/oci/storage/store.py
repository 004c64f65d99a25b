"""One store: its images, and which layers it has. Facts: containers-storage, and composefs-rs 0.9's reader.

Not here: what is in a layer (``layer``), and which store an image is in (``source``).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeGuard

from hostimaged.errors import ImageNotFound, StorageError, from_os_error
from hostimaged.ids import DiffId
from hostimaged.oci.models import MAX_CONFIG, MAX_MANIFEST, parse_config
from hostimaged.system import locks, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from hostimaged.ids import SourceDigest

#: Digits of an id in a text.
_SHORT: Final = 12
_DIRECTORIES: Final = ("overlay", "overlay-images", "overlay-layers")
_IMAGES: Final = "overlay-images/images.json"
_LAYERS: Final = "overlay-layers/layers.json"
#: Some containers are forgotten at the next boot.
_CONTAINERS: Final = (
    "overlay-containers/containers.json",
    "overlay-containers/volatile-containers.json",
)
_LOCKS: Final = {
    _IMAGES: "overlay-images/images.lock",
    _LAYERS: "overlay-layers/layers.lock",
    **dict.fromkeys(_CONTAINERS, "overlay-containers/containers.lock"),
}
#: An image or a layer takes some KiB.
_MAX_INDEX: Final = 64 << 20
_MANIFEST: Final = "manifest"
#: Ids of images and layers.
_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
#: Seconds that a lock is waited for. podman holds it while it unpacks a layer.
DEFAULT_LOCK_TIMEOUT: Final = 60.0


#: Lists of what has layers.
_HAVE_LAYERS: Final = (_IMAGES, *_CONTAINERS)


class LayerFacts(NamedTuple):
    """The layer below, or "", the digest of its tar, or "", and the size of that, or -1."""

    parent: str
    digest: str
    size: int


class StoreMissing(ImageNotFound):
    """there is no containers-storage with the overlay driver at {root}"""


class StoreDamaged(StorageError):
    """containers-storage at {root}: {detail}"""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer as layers.json has it; ``size`` is that of its tar, -1 where it is not known."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a store: an entry of images.json. What it consists of is read when it is asked for."""

    store: Store
    id: str
    names: tuple[str, ...]
    #: Digest of its manifest in the form it came in; "" where it has none.
    digest: str
    #: Names of the files that come with it.
    data: tuple[str, ...]
    #: The layers that it is made of, each with what is below it; none for a list of images.
    tops: tuple[str, ...] = ()

    def manifest(self, digest: SourceDigest | None = None) -> bytes:
        """Its manifest as it is stored: OCI's or docker's; or the one of ``digest``, if that is kept.

        The caller compares. Raises ``StoreDamaged``.
        """
        name = f"{_MANIFEST}-{digest}" if f"{_MANIFEST}-{digest}" in self.data else _MANIFEST
        return self.store.image_data(self.id, name, MAX_MANIFEST)

    @property
    def called(self) -> str:
        """It for people: its names and the beginning of its id."""
        return " ".join([*self.names, f"({self.id[:_SHORT]})"])

    @property
    def digests(self) -> frozenset[str]:
        """Digests of the manifests that it came with: of a list it was chosen from, too."""
        kept = {name.removeprefix(f"{_MANIFEST}-") for name in self.data if name.startswith(f"{_MANIFEST}-")}
        return frozenset(kept | ({self.digest} if self.digest else set()))

    @property
    def complete(self) -> bool:
        """Whether it has a manifest, and all its layers are in the store. Raises as ``layers`` does.

        podman lists an image before what comes with it: one that was killed leaves half an image, without a
        name, which the next that stores it completes.
        """
        return _MANIFEST in self.data and all(self.layers().values())

    def config(self) -> bytes:
        """Its configuration. Raises ``StoreDamaged``."""
        return self.store.image_data(self.id, f"sha256:{self.id}", MAX_CONFIG)

    def layers(self) -> dict[DiffId, str | None]:
        """The ids of its layers in this store, lowest first; None for one that is elsewhere, or nowhere.

        Raises ``StoreDamaged``, and ``UnsupportedImage`` for a configuration that is none.
        """
        there = self.store.layers()
        wanted = parse_config(self.config()).diff_ids
        return {diff_id: there[diff_id].id if diff_id in there else None for diff_id in wanted}


class Store:
    """A store with the overlay driver, opened for reading.

    Layout::

        ROOT/
        |-- overlay/ID/diff/              the files of a layer
        |-- overlay/ID/lower              the layers below: l/LINK, separated by colons
        |-- overlay/l/LINK                -> ../ID/diff
        |-- overlay-layers/layers.json    layers, with the digests of their tars; layers.lock
        |-- overlay-layers/ID.tar-split.gz   how the tar is made of the files
        |-- overlay-images/images.json    images with their names; images.lock
        `-- overlay-images/ID/manifest    and =BASE64 of other names, such as that of the configuration

    Locks: podman and skopeo take record locks (fcntl(2)) on the lock files, exclusive ones even for many
    commands that only read, so they are held here no longer than an index is read. composefs-rs holds the
    flock of layers.lock for as long as it reads layers; so does ``reading_layers``. Files that go all the
    same while they are read are errors, and no layer is taken for whole unless its digest says so.

    Methods raise ``LockTimeout``, naming the file, and ``StoreDamaged``. Thread-safe. A context manager.
    """

    __slots__ = ("_check", "_fd", "_timeout", "root")

    #: Where it is.
    root: Path

    def __init__(self, root: Path, fd: int, timeout: float, check: Callable[[], None] | None) -> None:
        self.root = root
        self._fd = fd
        self._timeout = timeout
        self._check = check

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        check: Callable[[], None] | None = None,
    ) -> Self:
        """Open the store at ``root``. ``check`` is called while a lock is waited for, and may raise.

        Raises ``StoreMissing`` if there is none.
        """
        try:
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreMissing(root=root) from None
        except OSError as error:
            raise from_os_error(error, f"cannot open containers-storage at {root}") from error
        store = cls(root, fd, lock_timeout, check)
        if not all(store._is_directory(name) for name in _DIRECTORIES):
            store.close()
            raise StoreMissing(root=root)
        return store

    def _is_directory(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            os.close(
                os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            )
            return True
        return False

    def close(self) -> None:
        """Close it. Twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor of its directory; it stays the store's."""
        return self._fd

    # --- images --------------------------------------------------------------------------------------------

    def images(self) -> tuple[StoredImage, ...]:
        """All images, in the order of images.json. Entries that are none are left out."""
        return tuple(filter(None, map(self._image, self._index(_IMAGES))))

    def _image(self, entry: object) -> StoredImage | None:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            return None
        digest = entry.get("digest")
        return StoredImage(
            self,
            entry["id"],
            _texts(entry.get("names")),
            digest if isinstance(digest, str) else "",
            _texts(entry.get("big-data-names")),
            tuple(filter(_is_id, (entry.get("layer"), *_texts(entry.get("mapped-layers"))))),
        )

    def names(self) -> list[str]:
        """The names of all images, read without a lock: the list is replaced as a whole."""
        entries = (self._image(entry) for entry in self._parsed(_IMAGES))
        return [name for image in entries if image is not None for name in image.names]

    def find(self, name: str) -> StoredImage | None:
        """The image that ``name`` means: its id, with ``sha256:`` or without; one of its names; the end of
        one after a ``/``, with ``:latest`` where there is no tag; its repository and manifest's digest.

        In this order, and the first of several.
        """
        images = self.images()
        wanted = name.removeprefix("sha256:")
        latest = name if ":" in name else f"{name}:latest"
        tests: list[Callable[[StoredImage], bool]] = [
            lambda image: image.id == wanted,
            lambda image: name in image.names,
            lambda image: any(_ends_with(one, name) for one in image.names),
            lambda image: any(_ends_with(one, latest) for one in image.names),
            lambda image: _has_digest(image, name),
        ]
        for test in tests:
            for image in images:
                if test(image):
                    return image
        return None

    def image_data(self, image_id: str, name: str, limit: int) -> bytes:
        """A file that comes with an image, of at most ``limit`` bytes."""
        file = name if re.fullmatch(r"[a-z]+", name) else "=" + base64.b64encode(name.encode()).decode()
        return self._read(f"overlay-images/{image_id}/{file}", limit, f"image {image_id} has no {name}")

    # --- layers --------------------------------------------------------------------------------------------

    def layers(self) -> dict[DiffId, StoredLayer]:
        """All layers by the digests of their tars; those without one are left out."""
        found: dict[DiffId, StoredLayer] = {}
        for entry in self._index(_LAYERS):
            if not isinstance(entry, dict) or not _is_id(entry.get("id")):
                continue
            digest, size = entry.get("diff-digest"), entry.get("diff-size")
            if isinstance(digest, str) and _ID.match(digest.removeprefix("sha256:")):
                known = size if isinstance(size, int) and size >= 0 else -1
                found[DiffId("sha256:" + digest.removeprefix("sha256:"))] = StoredLayer(entry["id"], known)
        return found

    def containers(self) -> tuple[tuple[str, str], ...]:
        """All containers: the image of each, or "", and its layer."""
        entries = [entry for name in _CONTAINERS for entry in self._index(name) if isinstance(entry, dict)]
        return tuple((str(entry.get("image", "")), str(entry.get("layer", ""))) for entry in entries)

    @contextmanager
    def reading_layers(self) -> Iterator[None]:
        """Hold the lock that other readers and collectors of this kind respect, shared: see the class."""
        fd = self._lock_file(_LOCKS[_LAYERS])
        try:
            if fd >= 0:
                path = self.root / _LOCKS[_LAYERS]
                locks.lock(fd, exclusive=False, timeout=self._timeout, what=str(path), check=self._check)
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def layer_facts(self) -> dict[str, LayerFacts]:
        """What is known of each layer, by id: also of those that have no digest."""
        found: dict[str, LayerFacts] = {}
        for entry in self._index(_LAYERS):
            if isinstance(entry, dict) and _is_id(entry.get("id")):
                digest, size, parent = entry.get("diff-digest"), entry.get("diff-size"), entry.get("parent")
                found[entry["id"]] = LayerFacts(
                    parent if isinstance(parent, str) else "",
                    digest if isinstance(digest, str) else "",
                    size if isinstance(size, int) else -1,
                )
        return found

    def tops(self) -> frozenset[str]:
        """Ids of the layers that an image or a container has, those below them not included."""
        entries = [entry for name in _HAVE_LAYERS for entry in self._index(name)]
        found: set[str] = set()
        for entry in entries:
            if isinstance(entry, dict):
                found.update(_texts(entry.get("mapped-layers")))
                found.update(_texts([entry.get("layer")]))
        return frozenset(found)

    # --- files ---------------------------------------------------------------------------------------------

    def _index(self, name: str) -> list[Any]:
        fd = self._lock_file(_LOCKS[name])
        try:
            if fd >= 0:
                what = str(self.root / _LOCKS[name])
                locks.lock_record(fd, timeout=self._timeout, what=what, check=self._check)
            return self._parsed(name)
        finally:
            if fd >= 0:
                os.close(fd)

    def _parsed(self, name: str) -> list[Any]:
        raw = self._read(name, _MAX_INDEX, f"{name} is missing", missing=b"[]")
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            raise StoreDamaged(root=self.root, detail=f"{name} is damaged")
        return found

    def _lock_file(self, name: str) -> int:
        """A descriptor of a lock file; -1 where there is none: then no other program uses the store."""
        try:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise from_os_error(error, f"cannot open {self.root / name}") from error

    def _read(self, name: str, limit: int, absent: str, *, missing: bytes | None = None) -> bytes:
        try:
            fd = syscalls.open_beneath(self._fd, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            if missing is not None:
                return missing
            raise StoreDamaged(root=self.root, detail=absent) from None
        except OSError as error:
            raise from_os_error(error, f"cannot open {self.root / name}") from error
        try:
            with os.fdopen(fd, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise from_os_error(error, f"cannot read {self.root / name}") from error
        if len(data) > limit:
            raise StoreDamaged(root=self.root, detail=f"{name} is larger than {limit} bytes")
        return data


def _is_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _ID.match(value) is not None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f"/{end}")


def _has_digest(image: StoredImage, name: str) -> bool:
    """Whether ``name`` is ``repository@digest``, and the image has that digest and a name of the repository.

    A manifest of a list is there by the list's digest as well.
    """
    repository, at, digest = name.partition("@")
    if not at or (image.digest != digest and f"manifest-{digest}" not in image.data):
        return False
    return any(
        one.partition("@")[0] == repository or re.sub(r":[^/:]*\Z", "", one) == repository
        for one in image.names
    )
