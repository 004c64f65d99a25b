"""What is fuzzed: one function for each parser of bytes from outside.

A function takes any bytes and either returns or raises one of its target's errors; every other exception is a
finding, and so is a failed assertion, a descriptor left open, and a message that is not one printable line.
Known inputs are in ``corpus/<target>``; ``run.py`` finds new ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import boot_targets
import host_targets
import proxy_peer
import zstandard

from hostimaged.composefs import dumpfile, splitstream
from hostimaged.composefs.erofs import ErofsError, Format, Image, UnsupportedTree, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import MetadataError, Repository, Verity
from hostimaged.composefs.repository.metadata import IncompatibleRepository, Metadata
from hostimaged.composefs.splitstream import SplitStream
from hostimaged.composefs.tree import Directory, walk
from hostimaged.errors import (
    CorruptRepository,
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    Internal,
    InvalidReference,
    SignatureRejected,
    UnsupportedImage,
)
from hostimaged.ids import DiffId
from hostimaged.oci import gunzip, models, pulls
from hostimaged.oci.decompress import decompressed
from hostimaged.oci.entries import read_entries
from hostimaged.oci.filesystem import TreeBuilder
from hostimaged.oci.layer_import import import_layer
from hostimaged.oci.layout import LayoutSource
from hostimaged.oci.policy import requirement
from hostimaged.oci.reference import ImageReference, Transport, parse_named
from hostimaged.oci.registries import Registries, RegistriesError
from hostimaged.oci.storage import tarsplit
from hostimaged.oci.tar import MAX_SIZE, HeaderReader, padding
from hostimaged.oci.window import Window
from hostimaged.progress import Silent

SHA256 = Algorithm.SHA256
#: Bytes of output after which a decompressor or a stream is believed to go on in the same way.
MAX_OUTPUT = 8 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: its entry, the errors it may raise, and the longest input worth trying.

    ``keeps_descriptors`` says that it has a repository, which keeps its directories open.
    """

    name: str
    function: Callable[[bytes], None]
    errors: tuple[type[HostimageError], ...]
    max_length: int
    keeps_descriptors: bool


TARGETS: dict[str, Target] = {}


def target(
    *errors: type[HostimageError], max_length: int, keeps_descriptors: bool = False
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a function as the target of its name."""

    def register(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = function.__name__
        TARGETS[name] = Target(name, function, errors, max_length, keeps_descriptors)
        return function

    return register


def execute(tried: Target, data: bytes) -> None:
    """Run a target on one input; raises for a finding."""
    before = _open_descriptors()
    with _strays() as strays:
        try:
            tried.function(data)
        except tried.errors as error:
            _check_error(error)
    if strays:
        raise AssertionError("an exception that nobody handles, in a thread or a destructor") from strays[0]
    after = _open_descriptors()
    assert tried.keeps_descriptors or before == after, (
        f"descriptors left open or closed: {before} before, {after} after"
    )


@contextlib.contextmanager
def _strays() -> Iterator[list[BaseException]]:
    """Exceptions that end a thread, or that Python can raise nowhere."""
    found: list[BaseException] = []

    def take(happened: Any) -> None:
        found.append(happened.exc_value)

    kept = threading.excepthook, sys.unraisablehook
    threading.excepthook = sys.unraisablehook = take
    try:
        yield found
    finally:
        threading.excepthook, sys.unraisablehook = kept


def _check_error(error: HostimageError) -> None:
    assert not isinstance(error, Internal)
    assert error.message.isprintable(), ascii(error.message)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@functools.cache
def scratch() -> Path:
    """A directory for this process, removed at its end."""
    keep = tempfile.TemporaryDirectory(prefix="hostimage-fuzz-")
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[object] = []


def pieces(data: bytes) -> Iterator[bytes]:
    """``data`` in pieces of sizes that depend on it."""
    step = 1 + zlib.crc32(data) % 1500
    return (data[at : at + step] for at in range(0, len(data), step))


# --- layers ---


@target(UnsupportedImage, max_length=16 << 10)
def tar(data: bytes) -> None:
    """Headers and contents, whole and in pieces: the same, and nothing of the archive is lost."""
    whole = _read_tar([data])
    try:
        in_pieces = _read_tar(pieces(data))
    except UnsupportedImage as error:
        raise AssertionError("refused in pieces only") from error
    assert whole == in_pieces


def _read_tar(chunks: Iterable[bytes]) -> list[tuple[Any, ...]]:
    inline = bytearray()
    length = 0
    buffers = iter(chunks)
    window = Window(lambda: next(buffers, None), inline.extend)
    reader = HeaderReader(window.inline)
    found: list[tuple[Any, ...]] = []
    while (header := reader.read()) is not None:
        content = b""
        rest = header.size + padding(header.size)
        if header.is_external:
            content = b"".join(bytes(part) for part in window.content_parts(header.size))
            length += len(content)
            rest -= header.size
        if rest and not window.inline(rest):
            raise UnsupportedImage("cut off")
        found.append((*header, hash(content)))
    window.inline_rest()
    return [*found, (len(inline) + length, bytes(inline))]


_repository: list[Repository] = []
_imports = 0


def _fresh_repository() -> Repository:
    """A repository that does not grow without end."""
    global _imports  # noqa: PLW0603 - the state of a process that runs one target
    _imports += 1
    if not _repository or _imports % 1000 == 0:
        for old in _repository:
            old.close()
        place = tempfile.mkdtemp(dir=scratch())
        _repository[:] = [Repository.init(f"{place}/r", algorithm=SHA256, verity=Verity.OPPORTUNISTIC)[0]]
    return _repository[0]


@target(UnsupportedImage, max_length=16 << 10, keeps_descriptors=True)
def layer(data: bytes) -> None:
    """Import, read back, tree, image: a layer that is taken comes back bit for bit."""
    repository = _fresh_repository()
    diff_id = DiffId.of_hash(hashlib.sha256(data).hexdigest())
    done = import_layer(repository, pieces(data), diff_id, Silent())
    parts: list[bytes] = []
    with repository.open_stream("", done.stream_id) as stream:
        splitstream.cat(stream, repository, lambda piece: parts.append(bytes(piece)))
    assert b"".join(parts) == data
    with repository.open_stream("", done.stream_id) as stream:
        entries = list(read_entries(stream.chunks()))
    assert len(entries) == done.entries
    builder = TreeBuilder()
    for entry in entries:
        builder.apply(entry)
    image_format = list(Format)[zlib.crc32(data) % 3]
    image = build(builder.finish(), image_format, SHA256)
    Image(image, SHA256).check()


def _decoded(kind: str, chunks: Iterable[bytes]) -> bytes:
    found = bytearray()
    for piece in decompressed(f"application/vnd.oci.image.layer.v1.tar+{kind}", chunks, limit=MAX_OUTPUT):
        # Read ahead by one piece is what bounds the memory of a layer that expands.
        assert len(piece) <= 2 << 20
        found += piece
    return bytes(found)


@target(UnsupportedImage, max_length=8 << 10)
def gzip(data: bytes) -> None:
    """Both libraries decode the same, as zlib does member by member; but isal takes some codes it refuses."""
    results: list[bytes | str] = []
    for library in (zlib, gunzip._library):
        kept, gunzip._library = gunzip._library, library
        try:
            results.append(_decoded("gzip", pieces(data)))
        except UnsupportedImage as error:
            results.append(error.message)
        finally:
            gunzip._library = kept
    # What zlib refuses is compared no further: isal lets incomplete sets of Huffman codes pass.
    if isinstance(results[0], str):
        raise UnsupportedImage(results[0])
    assert not isinstance(results[1], str), "zlib takes it, isal refuses it"
    rest, expected = data, b""
    while rest:
        member = zlib.decompressobj(31)
        expected += member.decompress(rest)
        rest = member.unused_data
    assert {bytes(r) for r in results if isinstance(r, bytes)} == {expected}


@target(UnsupportedImage, max_length=8 << 10)
def zstd(data: bytes) -> None:
    """What is decoded is what the library's own stream reader gives."""
    found = _decoded("zstd", pieces(data))
    context = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    with context.stream_reader(data, read_across_frames=True) as reader:
        assert reader.read(MAX_OUTPUT + 1) == found


@target(UnsupportedImage, max_length=8 << 10)
def tar_split(data: bytes) -> None:
    """The lines of tar-split data, whole and in pieces: the same parts, none of them empty."""
    packed = zlib.compress(data, 1, wbits=31)
    whole = list(tarsplit.parse([packed]))
    try:
        in_pieces = list(tarsplit.parse(pieces(packed)))
    except UnsupportedImage as error:
        raise AssertionError("refused in pieces only") from error
    assert whole == in_pieces
    for part in whole:
        if isinstance(part, bytes):
            assert part
            continue
        assert part.name
        assert b"\0" not in part.name
        assert 0 < part.size <= MAX_SIZE
        assert part.checksum is None or 0 <= part.checksum < 1 << 64


# --- the repository ---


@target(CorruptRepository, UnsupportedImage, max_length=8 << 10)
def stream(data: bytes) -> None:
    """A splitstream: tables, chunks, the entries of a layer in it."""
    with _memory_file(data) as file, SplitStream(os.dup(file.fileno()), _algorithm(data)) as opened:
        length = 0
        for chunk in opened.chunks():
            assert len(chunk) <= 32 << 20
            length += len(chunk)
            if length > MAX_OUTPUT:
                break
        builder = TreeBuilder()
        for entry in islice(read_entries(opened.chunks()), 2000):
            builder.apply(entry)
        assert not opened.named_refs or opened.stream_refs


def _algorithm(data: bytes) -> Algorithm:
    # Of the header, so that half of all changes are not thrown away there.
    return Algorithm.SHA512 if data[14:15] == b"\x02" else SHA256


def _memory_file(data: bytes) -> Any:
    file = open(os.memfd_create("fuzz"), "wb", buffering=0)  # noqa: SIM115 - a descriptor
    file.write(data)
    return file


@target(ErofsError, max_length=48 << 10)
def erofs(data: bytes) -> None:
    """Everything a reader does, and what is done with what was read."""
    for question in (Image.check, Image.objects):
        with contextlib.suppress(ErofsError):
            question(Image(data, SHA256))
    with contextlib.suppress(ErofsError):
        Image.detect(data)
    _use_tree(Image(data, SHA256).tree(), data)


def _use_tree(root: Directory, data: bytes) -> bytes:
    """Write a tree as a dump file, and as an image that has the same tree."""
    text = b"".join(dumpfile.write(root))
    image_format = list(Format)[zlib.crc32(data) % 3]
    try:
        image = build(root, image_format, SHA256)
    except UnsupportedTree:
        return text
    try:
        again = Image(image, SHA256).tree()
    except ErofsError as error:
        if not any(known in error.message for known in ("whiteout with hard links", "more than")):
            raise AssertionError("an image of ours is refused") from error
        return text
    assert build(again, image_format, SHA256) == image
    return text


@target(dumpfile.DumpfileError, max_length=4 << 10)
def dump(data: bytes) -> None:
    """A dump file that is taken is written in a form that stays the same."""
    root = dumpfile.parse(data, SHA256)
    text = _use_tree(root, data)
    # Negative times are written in a form that nobody reads.
    if all(node.stat.mtime >= 0 for _, node in walk(root)):
        assert b"".join(dumpfile.write(dumpfile.parse(text, SHA256))) == text


@target(MetadataError, IncompatibleRepository, max_length=2 << 10)
def metadata(data: bytes) -> None:
    """meta.json of a repository."""
    found = Metadata.parse(data)
    again = Metadata.parse(found.render())
    assert again == found
    found.check()
    assert found.formats.in_order()
    assert str(found)


# --- what describes images ---


@target(UnsupportedImage, max_length=4 << 10)
def manifest(data: bytes) -> None:
    """An image manifest."""
    found = models.parse_manifest(data)
    assert found.total_size >= 0
    assert found.config_digest.hex
    assert all(blob.blob.hex for blob in found.layers)
    assert found.is_container in (True, False)


@target(UnsupportedImage, max_length=4 << 10)
def config(data: bytes) -> None:
    """An image configuration."""
    found = models.parse_config(data)
    assert len(found.diff_ids) <= models.MAX_LAYERS
    assert isinstance(found.version, str)


@target(UnsupportedImage, ImageNotFound, DigestMismatch, max_length=4 << 10)
def index(data: bytes) -> None:
    """An index, as such and as that of a layout."""
    directory = scratch() / "layout"
    (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (directory / "index.json").write_bytes(data)
    found = models.parse_index(data)
    nested = hashlib.sha256(data).hexdigest()
    (directory / "blobs/sha256" / nested).write_bytes(data)
    try:
        for name in ("", ":name", "@1", ":" + "x/y"):
            try:
                with LayoutSource(ImageReference(Transport.OCI, f"{directory}{name}")) as source:
                    source.manifest()
            except (UnsupportedImage, ImageNotFound, DigestMismatch):
                pass
    finally:
        (directory / "blobs/sha256" / nested).unlink()
    assert len(found.manifests) <= models.MAX_INDEX


@target(HostimageError, max_length=8 << 10)
def proxy(data: bytes) -> None:
    """Replies of skopeo, and what comes through its pipes."""
    with proxy_peer.scripted_skopeo(data, scratch()) as source:
        source.open("docker://registry.example/os:latest")
        fetched = source.manifest()
        found = models.parse_manifest(fetched.raw)
        source.config(found.config)
        for descriptor in found.layers[:2]:
            with source.blob(descriptor) as chunks:
                for _ in chunks:
                    pass


# --- what people and hosts write ---


@target(InvalidReference, max_length=5000)
def reference(data: bytes) -> None:
    """An image reference; its normal form means the same."""
    found = ImageReference.parse(data.decode("utf-8", "surrogateescape"))
    assert ImageReference.parse(str(found)) == found
    assert len(str(found).encode()) <= 3 * len(data) + 64
    if found.path:
        assert found.path.startswith("/")
        assert ".." not in found.path.split("/")
    if found.named is not None:
        assert parse_named(str(found.named)) == found.named


_REFERENCES = tuple(
    map(
        ImageReference.parse,
        (
            "docker://registry.example/os/base:latest",
            "docker://registry.example:5000/os@sha256:" + 64 * "0",
            "docker-daemon:busybox:1",
            "oci:/var/lib/image:tag",
            "containers-storage:localhost/os:1",
        ),
    )
)


@target(SignatureRejected, max_length=4 << 10)
def policy(data: bytes) -> None:
    """policy.json."""
    file = scratch() / "policy.json"
    file.write_bytes(data)
    for name in _REFERENCES:
        found = requirement(file, name)
        assert found.types
        assert not (found.rejects and found.accepts_anything)


@target(RegistriesError, max_length=4 << 10)
def registries(data: bytes) -> None:
    """registries.conf."""
    file = scratch() / "registries.conf"
    file.write_bytes(data)
    found = Registries.load(file, scratch() / "none")
    for name in _REFERENCES:
        if name.named is not None:
            assert found.verifies(name.named) in (True, False)


@target(pulls.PullsError, max_length=4 << 10)
def pulled(data: bytes) -> None:
    """pulls.json; what was understood of it is kept when a row is added."""
    file = scratch() / "pulls.json"
    file.write_bytes(data)
    rows = pulls.load(file)
    if rows:
        pulls.record(file, rows[0])
        assert rows[0] in pulls.load(file)


# --- what boots, and the state of hosts ---

for _function, _errors, _length in (*boot_targets.FUNCTIONS, *host_targets.FUNCTIONS):
    target(*_errors, max_length=_length)(_function)
