"""Layers as they are transferred, to the tar they hold.

Not here: digests (the source checks those of the blob, ``layer_import`` that of the tar).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hostimaged.composefs.fsverity import Buffer

#: Bytes a layer may have uncompressed, unless the caller knows better: a decompression bomb must end
#: somewhere before the disk is full. The largest OS images have layers of some GB.
DEFAULT_LIMIT: Final = 128 << 30


class Compression(Enum):
    """How a layer is compressed; its media type alone decides."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_OCI: Final = "application/vnd.oci.image.layer."
_DOCKER: Final = "application/vnd.docker.image.rootfs."

#: Every media type of a layer that holds a tar. Docker's remain where a manifest was copied unconverted.
TAR_LAYERS: Final[dict[str, Compression]] = {
    f"{_OCI}v1.tar": Compression.NONE,
    f"{_OCI}v1.tar+gzip": Compression.GZIP,
    f"{_OCI}v1.tar+zstd": Compression.ZSTD,
    f"{_OCI}nondistributable.v1.tar": Compression.NONE,
    f"{_OCI}nondistributable.v1.tar+gzip": Compression.GZIP,
    f"{_OCI}nondistributable.v1.tar+zstd": Compression.ZSTD,
    f"{_DOCKER}diff.tar": Compression.NONE,
    f"{_DOCKER}diff.tar.gzip": Compression.GZIP,
    f"{_DOCKER}diff.tar.zstd": Compression.ZSTD,
    f"{_DOCKER}foreign.diff.tar": Compression.NONE,
    f"{_DOCKER}foreign.diff.tar.gzip": Compression.GZIP,
}


def decompressed(
    media_type: str, chunks: Iterable[Buffer], *, limit: int = DEFAULT_LIMIT
) -> Iterator[Buffer]:
    """The uncompressed bytes of a layer, in pieces; pieces may be empty.

    All gzip members and zstd frames are decoded. Pieces of compressed layers have at most about 1 MiB,
    others come as they are. Raises ``UnsupportedImage`` for a type that is no tar, for damaged or truncated
    data, for bytes after the last member or frame, and for more than ``limit`` bytes.

    Data that cannot be decoded is first read to its end, where ``chunks`` raises if the bytes are not those
    that were asked for: that is then the true error.
    """
    compression = TAR_LAYERS.get(media_type)
    if compression is None:
        raise UnsupportedImage(f"layers of type {media_type[:200]!r} are not supported")
    source = iter(chunks)
    pieces = _decoder(compression)(source)
    total = 0
    while True:
        try:
            piece = next(pieces, None)
        except UnsupportedImage:
            for _ in source:
                yield b""
            raise
        if piece is None:
            return
        total += len(piece)
        if total > limit:
            raise UnsupportedImage(f"a layer has more than {limit} bytes uncompressed")
        yield piece


def _decoder(compression: Compression) -> Callable[[Iterator[Buffer]], Iterator[Buffer]]:
    # A worker imports only what its layers need.
    match compression:
        case Compression.NONE:
            return iter
        case Compression.GZIP:
            from hostimaged.oci.gunzip import gunzip

            return gunzip
        case Compression.ZSTD:
            from hostimaged.oci.unzstd import unzstd

            return unzstd
