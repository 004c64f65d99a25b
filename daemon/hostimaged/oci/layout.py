"""Image layouts on disk (``oci:DIRECTORY[:TAG]``), read directly: image-spec 1.1, image layout.

skopeo reads them as well, at the price of a process and a second digest run; this reader is for images that
need no signature check and no conversion. What a name means here is what it means to containers-image.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self

from hostimaged.errors import HostimageError, ImageNotFound, UnsupportedImage, from_os_error
from hostimaged.ids import BlobDigest, SourceDigest
from hostimaged.oci.models import (
    INDEX_TYPES,
    MANIFEST_TYPE,
    MANIFEST_TYPES,
    MAX_CONFIG,
    MAX_MANIFEST,
    REF_NAME,
    Descriptor,
    Index,
    Platform,
    parse_index,
)
from hostimaged.oci.source import FetchedManifest, verified

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from hostimaged.ids import OciDigest
    from hostimaged.oci.reference import ImageReference

_CHUNK: Final = 256 * 1024
#: Lists within lists; real ones have one or two levels, and a hostile one must end.
MAX_DEPTH: Final = 8

#: What the kernel calls a machine, in the terms of image platforms.
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "i686": "386",
    "i586": "386",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "loongarch64": "loong64",
}
#: Variants this machine runs, most wanted first, after an entry that names none.
_VARIANTS: Final = {"arm64": ("v8",), "arm": ("v7", "v6", "v5")}


class LayoutBlobs:
    """The blobs of a layout directory, whatever images are in it; ``reference`` says which, and is named in
    errors.

    Blobs are looked up beneath the directory by their digests alone. Raises ``ImageNotFound`` or
    ``StorageError``.
    """

    def __init__(self, reference: ImageReference) -> None:
        self._reference = reference
        self._directory = -1
        try:
            self._directory = os.open(reference.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ImageNotFound(f"{reference}: there is no directory {reference.path}") from None
        except OSError as error:
            raise from_os_error(error, f"{reference}: opening the image layout") from None

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob, verified by the end of the iteration."""
        fd = self._open(descriptor.as_digest(BlobDigest), "layer")
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield verified(_pieces(fd), descriptor, "layer")
        finally:
            os.close(fd)

    def has(self, descriptor: Descriptor) -> bool:
        """Whether there is a blob of that digest and size; it is not read."""
        try:
            fd = self._open(descriptor.as_digest(BlobDigest), "blob")
        except HostimageError:
            return False
        try:
            return os.fstat(fd).st_size == descriptor.size
        finally:
            os.close(fd)

    def document(self, digest: OciDigest, limit: int) -> bytes:
        """A blob of at most ``limit`` bytes that nothing is known of but its digest; not verified.

        Raises ``UnsupportedImage`` for a larger one.
        """
        fd = self._open(BlobDigest(str(digest)), "document")
        try:
            return _bounded(fd, limit, f"{self._reference}: document {digest}")
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the directory."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, digest: BlobDigest, what: str) -> int:
        try:
            # Beneath the layout, the blob is named by hex digits only; a link in its place is not followed.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(f"blobs/sha256/{digest.hex}", flags, dir_fd=self._directory)
        except FileNotFoundError:
            raise ImageNotFound(f"{self._reference}: {what} {digest} is missing from the layout") from None
        except OSError as error:
            raise from_os_error(error, f"{self._reference}: opening {what} {digest}") from None


class LayoutSource(LayoutBlobs):
    """An image in a layout directory, as an ``ImageSource``.

    Opening resolves the name to one manifest for this machine. ``needs_conversion`` says that it is in
    docker's format, which this reader does not serve.
    """

    def __init__(self, reference: ImageReference) -> None:
        super().__init__(reference)
        try:
            self._manifest = self._resolve()
        except BaseException:
            self.close()
            raise
        self.needs_conversion = self._manifest.media_type != MANIFEST_TYPE

    def manifest(self) -> FetchedManifest:
        """The manifest for this machine."""
        raw = self._read(self._manifest, MAX_MANIFEST, "manifest")
        return FetchedManifest(raw, self._manifest.as_digest(SourceDigest))

    def config(self, descriptor: Descriptor) -> bytes:
        """The configuration, verified."""
        return self._read(descriptor, MAX_CONFIG, "image configuration")

    def _resolve(self) -> Descriptor:
        index = self._index()
        descriptor = self._named(index)
        for _ in range(MAX_DEPTH):
            if descriptor.media_type not in INDEX_TYPES:
                return descriptor
            descriptor = self._for_this_machine(
                parse_index(self._read(descriptor, MAX_MANIFEST, "image index"))
            )
        raise UnsupportedImage(f"{self._reference}: lists of images are nested more than {MAX_DEPTH} deep")

    def _index(self) -> Index:
        try:
            fd = os.open("index.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            raise ImageNotFound(f"{self._reference}: it is not an image layout: no index.json") from None
        except OSError as error:
            raise from_os_error(error, f"{self._reference}: opening index.json") from None
        try:
            return parse_index(_bounded(fd, MAX_MANIFEST, "index.json"))
        finally:
            os.close(fd)

    def _named(self, index: Index) -> Descriptor:
        inner = self._reference.inner
        if inner.startswith("@"):
            position = int(inner[1:])
            if position >= len(index.manifests):
                raise ImageNotFound(f"{self._reference}: the layout has {len(index.manifests)} entries")
            return self._usable(index.manifests[position])
        if inner:
            found = [entry for entry in index.manifests if entry.annotations.get(REF_NAME) == inner]
            if not found:
                raise ImageNotFound(f"{self._reference}: the layout has no image of that name")
            return self._usable(found[0])
        if len(index.manifests) != 1:
            raise ImageNotFound(f"{self._reference}: the layout has {len(index.manifests)} images, name one")
        return self._usable(index.manifests[0])

    def _usable(self, descriptor: Descriptor) -> Descriptor:
        if descriptor.media_type not in INDEX_TYPES | MANIFEST_TYPES:
            raise UnsupportedImage(f"{self._reference}: type {descriptor.media_type} is not that of an image")
        return descriptor

    def _for_this_machine(self, index: Index) -> Descriptor:
        """The entry of ``index`` that containers-image would take here."""
        wanted = wanted_platforms(os.uname().machine)
        best: tuple[int, Descriptor] | None = None
        for entry in index.manifests:
            rank = _rank(entry.platform, wanted)
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, entry)
        if best is None:
            machine = f"{wanted[0].os}/{wanted[0].architecture}"
            raise ImageNotFound(f"{self._reference}: the list has no image for {machine}")
        return self._usable(best[1])

    def _read(self, descriptor: Descriptor, limit: int, what: str) -> bytes:
        if descriptor.size > limit:
            raise UnsupportedImage(f"{self._reference}: {what} is larger than {limit} bytes")
        fd = self._open(descriptor.as_digest(BlobDigest), what)
        try:
            return b"".join(verified(_pieces(fd), descriptor, what))
        finally:
            os.close(fd)


def wanted_platforms(machine: str) -> tuple[Platform, ...]:
    """Platforms of images that run on ``machine`` (uname's term), best first."""
    architecture = _ARCHITECTURES.get(machine, machine)
    return tuple(
        Platform(os="linux", architecture=architecture, variant=variant)
        for variant in ("", *_VARIANTS.get(architecture, ()))
    )


def _rank(platform: Platform | None, wanted: tuple[Platform, ...]) -> int | None:
    """Place of ``platform`` among ``wanted``; one not named is the last resort, None does not fit."""
    if platform is None:
        return len(wanted)
    return wanted.index(platform) if platform in wanted else None


def _pieces(fd: int) -> Iterator[bytes]:
    try:
        while piece := os.read(fd, _CHUNK):
            yield piece
    except OSError as error:
        raise from_os_error(error, "reading the image layout") from None


def _bounded(fd: int, limit: int, what: str) -> bytes:
    found = bytearray()
    for piece in _pieces(fd):
        found += piece
        if len(found) > limit:
            raise UnsupportedImage(f"{what} is larger than {limit} bytes")
    return bytes(found)
