"""Layers imported by us and by cfsctl: same objects, same bytes back, same image ids; same refusals."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from hostimage_testing import tars
from hostimage_testing.layout import LAYER_TYPE, Layer, Layout
from hostimage_testing.random_layers import RandomLayers
from hostimage_testing.tools import Finished, run
from hostimaged.composefs import erofs, splitstream
from hostimaged.composefs.erofs import Format
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.errors import UnsupportedImage
from hostimaged.ids import DiffId
from hostimaged.oci.decompress import decompressed
from hostimaged.oci.filesystem import build_tree
from hostimaged.oci.images import layer_stream
from hostimaged.oci.layer_import import import_layer
from hostimaged.progress import Silent

pytestmark = pytest.mark.interop

USR = tars.directory(b"usr/", mtime=1000)


def diff_id(data: bytes) -> DiffId:
    return DiffId.of_hash(hashlib.sha256(data).hexdigest())


def objects(repository: Path) -> set[str]:
    base = repository / "objects"
    return {str(path.relative_to(base)) for path in base.glob("*/*")}


@dataclass
class Reference:
    """A repository that only cfsctl touches."""

    program: str
    path: Path
    layout: Layout

    def __call__(self, *arguments: str, check: bool = True, data: bytes | None = None) -> Finished:
        argv = [self.program, "--repo", str(self.path), *arguments]
        if data is None:
            return run(*argv, check=check)
        done = subprocess.run(argv, input=data, capture_output=True, check=check, timeout=120)
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    def pull(self, layers: list[Layer], *, check: bool = True) -> bool:
        self.layout.image("image", layers)
        return self("oci", "pull", f"oci:{self.layout.path}:image", "image", check=check).code == 0

    def image_id(self, format_: Format) -> str:
        found = self("--erofs-version", str(int(format_)), "oci", "compute-id", "image").out
        return found.strip().rpartition(":")[2]


def made(cfsctl: str, directory: Path, algorithm: Algorithm) -> Reference:
    path = directory / "reference"
    run(cfsctl, "--repo", path, "init", "--insecure", "--algorithm", algorithm.identifier, path)
    return Reference(cfsctl, path, Layout(directory / "layout"))


@pytest.fixture(params=list(Algorithm), ids=lambda algorithm: algorithm.label)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    found: Algorithm = request.param
    return found


@pytest.fixture
def reference(cfsctl: str, tmp_path: Path, algorithm: Algorithm) -> Reference:
    return made(cfsctl, tmp_path, algorithm)


@pytest.fixture
def ours(tmp_path: Path, algorithm: Algorithm) -> Iterator[Repository]:
    repository, _ = Repository.init(tmp_path / "ours", algorithm=algorithm, verity=Verity.OPPORTUNISTIC)
    with repository:
        yield repository


def imported(repository: Repository, layout: Layout, layers: list[Layer]) -> list[str]:
    """Import the layers of a layout; the ids of the image made of them, V1 and V2."""
    streams = []
    for layer in layers:
        with layout.blob_path(layer.descriptor["digest"]).open("rb") as file:
            chunks = iter(lambda: file.read(100_000), b"")
            pieces = decompressed(layer.descriptor["mediaType"], chunks)
            done = import_layer(repository, pieces, DiffId(layer.diff_id), Silent())
        streams.append(done.stream_id)
    root = build_tree(repository, streams)
    images = [erofs.build(root, format_, repository.algorithm) for format_ in (Format.V1, Format.V2)]
    return [digest(repository.algorithm, image).hex() for image in images]


def agree(reference: Reference, ours: Repository, layers: list[Layer]) -> None:
    """Both import the layers, and get the same contents and images."""
    ids = imported(ours, reference.layout, layers)
    reference.pull(layers)
    assert ids == [reference.image_id(Format.V1), reference.image_id(Format.V2)]
    for layer in layers:
        info = json.loads(reference("oci", "layer", "--json", layer.diff_id).out)
        with ours.open_stream(layer_stream(DiffId(layer.diff_id))) as stream:
            assert stream.size == info["size"]
            assert len(stream.object_refs) == info["splitstream"]["externalObjects"]
            assert {id_.pathname for id_ in stream.object_refs} <= objects(reference.path)


# --- random images ---


@pytest.mark.parametrize("seed", range(10))
def test_random_images(cfsctl: str, tmp_path: Path, seed: int) -> None:
    algorithm = list(Algorithm)[seed % 2]
    reference = made(cfsctl, tmp_path, algorithm)
    source = RandomLayers(seed)
    tar_files = [source.layer(120) for _ in range(1 + seed % 4)]
    compressions = ["gzip", "zstd", "none"]
    layers = [reference.layout.layer(tar, compressions[(seed + n) % 3]) for n, tar in enumerate(tar_files)]
    repository, _ = Repository.init(tmp_path / "ours", algorithm=algorithm, verity=Verity.OPPORTUNISTIC)
    with repository:
        agree(reference, repository, layers)


@pytest.mark.parametrize("seed", range(3))
def test_layers_give_the_same_objects(reference: Reference, ours: Repository, seed: int) -> None:
    data = RandomLayers(100 + seed).layer(150)
    done = import_layer(ours, [data], diff_id(data), Silent())
    reference("oci", "import-layer", str(done.diff_id), data=data)
    streams = {done.stream_id.pathname}
    link = (reference.path / "streams" / layer_stream(done.diff_id)).readlink()
    streams.add("/".join(link.parts[-2:]))
    # The streams themselves may be compressed by different versions of zstd.
    assert objects(ours.path) - streams == objects(reference.path) - streams


# --- one repository, two programs ---


def test_each_reads_what_the_other_imported(reference: Reference, ours: Repository) -> None:
    data = RandomLayers(7).layer(200)
    done = import_layer(ours, [data], diff_id(data), Silent())
    with_ours = Reference(reference.program, ours.path, reference.layout)
    argv = [reference.program, "--repo", str(ours.path), "oci", "layer", str(done.diff_id)]
    assert subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout == data
    assert "status: ok" in with_ours("fsck").out

    reference("oci", "import-layer", str(done.diff_id), data=data)
    parts: list[bytes] = []
    with Repository.open(reference.path) as theirs:
        with theirs.open_stream(layer_stream(done.diff_id)) as stream:
            splitstream.cat(stream, theirs, lambda piece: parts.append(bytes(piece)))
        again = import_layer(theirs, [data], done.diff_id, Silent())
    assert b"".join(parts) == data
    assert (again.objects_new, again.bytes_new) == (0, 0)


# --- what both accept ---


def zstd_frames(data: bytes) -> bytes:
    """Frames and skippable frames, as in zstd:chunked."""
    frame = zstandard.ZstdCompressor().compress
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"skip!"
    return skippable + b"".join(frame(data[at : at + 3000]) + skippable for at in range(0, len(data), 3000))


def gzip_members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[at : at + 3000]) for at in range(0, len(data), 3000))


@pytest.mark.parametrize(("suffix", "compress"), [("gzip", gzip_members), ("zstd", zstd_frames)])
def test_many_members(
    reference: Reference, ours: Repository, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    data = RandomLayers(3).layer(100)
    descriptor = reference.layout.blob(compress(data), f"{LAYER_TYPE}+{suffix}")
    agree(reference, ours, [Layer(descriptor, str(diff_id(data)))])


ACCEPTED = {
    "absolute names": tars.directory(b"/opt/") + tars.file(b"/opt/f", b"x" * 100),
    "devices": tars.header(b"usr/null", 0, b"3", device=(1, 3))
    + tars.header(b"usr/sda", 0, b"4", device=(8, 0)),
    "whiteout device": tars.header(b"usr/gone", 0, b"3", device=(0, 0)),
    "setuid": tars.file(b"usr/sudo", b"x", mode=0o4755) + tars.file(b"usr/wall", b"x", mode=0o102755),
    "names that are not UTF-8": tars.file(b"usr/\xff\xfe\x80", b"x"),
    "uid 2^31 in pax": tars.pax((b"uid", b"2147483648"), (b"gid", b"4294967295")) + tars.file(b"usr/f", b"x"),
    "uid 2^31 in binary": tars.file(b"usr/f", b"x", uid=tars.base256(2**31, 8), magic=tars.GNU),
    "negative time in binary": tars.file(b"usr/f", b"x", mtime=tars.base256(-12345, 12)),
    "very negative time": tars.file(b"usr/f", b"x", mtime=tars.base256(-(2**40), 12)),
    "time beyond 2038": tars.file(b"usr/f", b"x", mtime=2**31),
    "time beyond 2106": tars.pax((b"mtime", b"4294967296.000000001")) + tars.file(b"usr/f", b"x"),
    "old header": tars.file(b"usr/f", b"x" * 99, magic=tars.OLD),
    "contiguous": tars.header(b"usr/f", 3, b"7") + tars.padded(b"abc"),
    "odd padding": tars.file(b"usr/f", b"x" * 99, fill=b"\xaa"),
    "no end marker": tars.file(b"usr/f", b"x"),
    "symlink of 1024 bytes": tars.pax((b"linkpath", b"t" * 1024)) + tars.header(b"usr/l", 0, b"2"),
    "fifo": tars.header(b"usr/fifo", 0, b"6"),
    "numbers with signs": tars.file(b"usr/f", b"x", mode=b"+0000644"),
    "global header in between": tars.pax((b"path", b"usr/lost"))
    + tars.pax(kind=b"g")
    + tars.file(b"usr/f", b"x"),
    "opaque after content": tars.file(b"usr/f", b"x") + tars.file(b"usr/.wh..wh..opq", b""),
    "file for a directory": tars.directory(b"usr/d")
    + tars.file(b"usr/d/f", b"x")
    + tars.file(b"usr/d", b"y"),
    "2000 levels": b"".join(tars.pax((b"path", b"d/" * n)) + tars.directory(b"x") for n in range(1, 2001)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_with_the_same_ids(cfsctl: str, tmp_path: Path, case: str) -> None:
    reference = made(cfsctl, tmp_path, Algorithm.SHA512)
    data = USR + ACCEPTED[case] + (b"" if case == "no end marker" else tars.END)
    repository, _ = Repository.init(tmp_path / "ours", verity=Verity.OPPORTUNISTIC)
    with repository:
        agree(reference, repository, [reference.layout.layer(data)])


def test_65536_hard_links(cfsctl: str, tmp_path: Path) -> None:
    reference = made(cfsctl, tmp_path, Algorithm.SHA512)
    links = (tars.header(b"usr/l%d" % n, 0, b"1", link=b"usr/f") for n in range(65536))
    data = USR + tars.file(b"usr/f", b"x" * 100) + b"".join(links) + tars.END
    repository, _ = Repository.init(tmp_path / "ours", verity=Verity.OPPORTUNISTIC)
    with repository:
        agree(reference, repository, [reference.layout.layer(data, "zstd")])


# --- what is refused ---


REFUSED_BY_BOTH = {
    "negative time in pax": tars.pax((b"mtime", b"-5")) + tars.file(b"usr/f", b"x"),
    "sum of signed bytes": tars.header(b"usr/\xff", checksum=int.from_bytes(b"\x0f")),
    "sparse": tars.header(b"usr/f", 0, b"S", magic=tars.GNU),
    "pax sparse": tars.pax((b"GNU.sparse.map", b"0,1")) + tars.file(b"usr/f", b"x"),
    "unknown type": tars.header(b"usr/f", 0, b"V"),
    "upwards": tars.file(b"usr/../f", b"x"),
    "upwards link": tars.file(b"usr/f", b"x") + tars.header(b"usr/l", 0, b"1", link=b"usr/../usr/f"),
    "missing parent": tars.file(b"opt/f", b"x"),
    "symlink as parent": tars.header(b"lib", 0, b"2", link=b"usr") + tars.file(b"lib/f", b"x"),
    "missing link target": tars.header(b"usr/l", 0, b"1", link=b"usr/f"),
    "run is a link": tars.header(b"run", 0, b"2", link=b"usr"),
    "two long names": tars.gnu_long(b"L", b"usr/f") * 2 + tars.file(b"x", b"x"),
    "size beyond the stream": tars.header(b"usr/f", 1_000_000),
    "device without number": tars.header(b"usr/f", 0, b"3", magic=tars.OLD),
    "extensions over a MiB": tars.gnu_long(b"L", b"x" * (1 << 20)) + tars.file(b"x", b"x"),
    "no end marker and no content": tars.file(b"usr/f", b""),
    "no /usr": None,
}
#: Readers of tar disagree about these, or no file system can hold the result.
REFUSED_BY_US = {
    "content of a hard link": tars.file(b"usr/f", b"x")
    + tars.header(b"usr/l", 9, b"1", link=b"usr/f")
    + bytes(512),
    "content of a directory": tars.header(b"usr/d", 5, b"5") + bytes(512),
    "lone zero block": bytes(512) + tars.file(b"usr/f", b"x"),
    "upwards at the end": tars.directory(b"usr/.."),
    "name of 256 bytes": tars.pax((b"path", b"usr/" + b"n" * 256)) + tars.file(b"x", b"x"),
    "NUL in a name": tars.pax((b"path", b"usr/a\0b")) + tars.file(b"x", b"x"),
    "empty symlink": tars.header(b"usr/l", 0, b"2"),
    "symlink of 4096 bytes": tars.pax((b"linkpath", b"t" * 4096)) + tars.header(b"usr/l", 0, b"2"),
    "attribute of 65536 bytes": tars.pax((b"SCHILY.xattr.user.x", b"v" * 65536)) + tars.file(b"usr/f", b"x"),
    "2001 levels": b"".join(tars.pax((b"path", b"d/" * n)) + tars.directory(b"x") for n in range(1, 2002)),
    "sparse name only": tars.pax((b"GNU.sparse.name", b"usr/s")) + tars.file(b"usr/f", b"x"),
}


def layer_data(case: str, body: bytes | None) -> bytes:
    if body is None:
        return tars.file(b"f", b"x") + tars.END
    return USR + body + (b"" if case.startswith(("size beyond", "no end marker")) else tars.END)


@pytest.mark.parametrize("case", [*REFUSED_BY_BOTH, *REFUSED_BY_US])
def test_refused(cfsctl: str, tmp_path: Path, case: str) -> None:
    reference = made(cfsctl, tmp_path, Algorithm.SHA512)
    both = case in REFUSED_BY_BOTH
    data = layer_data(case, REFUSED_BY_BOTH[case] if both else REFUSED_BY_US[case])
    layer = reference.layout.layer(data)
    repository, _ = Repository.init(tmp_path / "ours", verity=Verity.OPPORTUNISTIC)
    with repository, pytest.raises(UnsupportedImage):
        imported(repository, reference.layout, [layer])
    assert reference.pull([layer], check=False) is not both
