"""The first inputs of each target, made from good samples: what fuzzing and minimising begin with.

usage: seeds.py [TARGET …]      writes to .cache/fuzz/TARGET
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boot_seeds
import host_seeds
import zstandard
from mutators import joined
from proxy_peer import FD_1, KEEP_OPEN, LOG, PIPE, UNASKED
from run import FOUND

from hostimage_testing import stores, tars
from hostimaged.composefs.dumpfile import write
from hostimaged.composefs.erofs import Format, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository.metadata import FormatSet, Metadata
from hostimaged.composefs.splitstream import ContentType, Writer
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Directory,
    External,
    ExternalNoVerity,
    Fifo,
    Inline,
    Leaf,
    Socket,
    Sparse,
    Stat,
    Symlink,
)
from hostimaged.ids import ObjectId
from hostimaged.oci import models

DATA = Path(__file__).parents[1] / "data/composefs"
ID = ObjectId(bytes(range(32)))
DIGEST = "sha256:" + 64 * "a"


def sample_tree() -> Directory:
    """A file of each kind, a hard link, shared and own xattrs."""
    stat = Stat(0o644, 0, 0, 5, 7, {b"user.shared": b"v" * 40})
    own = stat._replace(mtime=6, xattrs={b"security.capability": b"c" * 20, b"trusted.overlay.x": b""})
    hard = Leaf(stat, Inline(b"hard"))
    contents = {
        b"file": External(ID, 70_000),
        b"unverified": ExternalNoVerity(ID, 70_000),
        b"sparse": Sparse(1 << 33),
        b"null": CharDevice(259),
        b"gone": CharDevice(0),
        b"sda": BlockDevice(2048),
        b"fifo": Fifo(),
        b"socket": Socket(),
        b"link": Symlink(b"../target"),
        b"long": Symlink(b"t" * 900),
        b"data": Inline(b"d" * 512),
        b"empty": Inline(b""),
    }
    leaves = {name: Leaf(own if number % 2 else stat, c) for number, (name, c) in enumerate(contents.items())}
    inner = Directory(stat._replace(mtime=6), {**leaves, b"hard": hard})
    return Directory(stat, {b"usr": inner, b"hard": hard, b"run": Directory(stat, {})})


def small_tree() -> Directory:
    """A directory and a file."""
    stat = Stat(0o755, 0, 0, 0, 0, {})
    return Directory(stat, {b"usr": Directory(stat, {}), b"f": Leaf(stat, Inline(b"x"))})


def tar_seeds() -> Iterator[bytes]:
    usr = tars.directory(b"usr/", mtime=1000)
    yield usr + tars.END
    yield usr + tars.file(b"usr/f", b"x" * 99) + tars.file(b"usr/g", b"y" * 5) + tars.END
    yield usr + tars.gnu_long(b"L", b"usr/" + b"n" * 200) + tars.file(b"cut", b"z" * 600, magic=tars.GNU)
    records = {
        b"path": b"usr/p",
        b"mtime": b"5.25",
        b"SCHILY.xattr.user.x": b"v",
        b"uid": b"7",
        b"size": b"70",
    }
    yield usr + tars.pax(*records.items()) + tars.file(b"cut", b"q" * 70) + tars.END
    yield usr + tars.pax((b"comment", b"c"), kind=b"g") + tars.header(b"usr/l", 0, b"2", link=b"target")
    yield usr + tars.file(b"usr/f", b"x") + tars.header(b"usr/h", 0, b"1", link=b"usr/f") + tars.END
    yield usr + tars.file(b"usr/f", b"x") + tars.file(b"usr/.wh.f", b"") + tars.file(b"usr/.wh..wh..opq", b"")
    yield usr + tars.header(b"usr/c", 0, b"3", device=(1, 3)) + tars.header(b"usr/b", 0, b"4", device=(8, 0))
    yield usr + tars.header(b"usr/p", 0, b"6") + tars.header(b"usr/7", 3, b"7") + tars.padded(b"abc")
    yield usr + tars.file(
        b"usr/f", b"x", uid=tars.base256(2**31, 8), mtime=tars.base256(-5, 12), magic=tars.GNU
    )
    yield usr + tars.file(b"run", b"x" * 99, magic=tars.OLD) + tars.END
    yield (
        tars.directory(b"/") + usr + tars.directory(b"./run") + tars.file(b"run/x", b"") + tars.END + b"junk"
    )
    yield usr + tars.gnu_long(b"K", b"t" * 150) + tars.header(b"usr/l", 0, b"2", magic=tars.GNU) + tars.END
    yield usr + tars.header(b"f", 65, prefix=b"usr/dir") + tars.padded(b"x" * 65)


def compressible() -> bytes:
    return b"".join(b"line %d\n" % n for n in range(200))


def gzip_seeds() -> Iterator[bytes]:
    plain = gzip.compress(compressible(), mtime=0)
    yield plain
    yield gzip.compress(b"", mtime=0)
    yield gzip.compress(bytes(100_000), mtime=0) + gzip.compress(b"two", mtime=0)
    yield gzip.compress(random.Random(0).randbytes(300), 0, mtime=0)
    named = plain[:3] + b"\x1c" + plain[4:10] + b"\x03\0ext" + b"name\0comment\0" + plain[10:]
    yield named
    yield plain + b"\0" * 8


def zstd_seeds() -> Iterator[bytes]:
    for options in ({}, {"write_checksum": True}, {"write_content_size": False}):
        yield zstandard.ZstdCompressor(level=3, **options).compress(compressible())
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [
        stream.compress(b"a" * 3000) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for _ in range(10)
    ]
    several = b"".join(parts) + stream.flush()
    yield several
    yield several + struct.pack("<II", 0x184D2A50, 5) + b"skip!" + several
    yield zstandard.ZstdCompressor().compress(b"")
    yield zstandard.ZstdCompressor().compress(bytes(1_000_000))


def tar_split_seeds() -> Iterator[bytes]:
    sample = tars.directory(b"usr") + tars.file(b"usr/a", b"x" * 700) + tars.file(b"usr/b", b"y") + tars.END
    entries = stores.tar_split(sample)
    yield "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    for entry in entries[:2]:
        yield json.dumps(entry).encode()
    yield json.dumps(stores.content(b"\xff\xfe", b"raw")).encode()
    yield b'{"type":1,"name":"usr/b"}\n{"type":1,"name":"c","size":0}\n'
    yield b'{"type":2,"payload":null}\n\n{"type":2,"payload":""}'
    yield b'{"type":1,"name":"\\ud800","size":1}'
    yield b'{"type":1,"name":"a\\u0000","size":1}'
    yield b'{"type":1,"name":"a","size":1e3}'
    yield b'{"type":1,"name":"a","size":18446744073709551616}'
    yield b'{"type":1,"name":"a","size":9,"payload":"AAAA"}'
    yield b'{"type":2,"payload":"A*=="}'
    yield b'{"type":3}'
    yield b"[" * 3000


def _stream(algorithm: Algorithm, kind: int, parts: list[bytes | int], refs: tuple[str, ...] = ()) -> bytes:
    with Writer(algorithm, kind) as writer:
        for part in parts:
            if isinstance(part, bytes):
                writer.inline(part)
            else:
                writer.external(ObjectId(bytes([part % 251]) * algorithm.digest_size), part)
        for number, name in enumerate(refs):
            writer.named_ref(name, ObjectId(bytes([number]) * algorithm.digest_size))
        return b"".join(map(bytes, writer.finish()))


def stream_seeds() -> Iterator[bytes]:
    usr = tars.directory(b"usr/")
    for algorithm in Algorithm:
        yield _stream(
            algorithm, ContentType.LAYER, [usr, tars.header(b"usr/f", 99), 99, bytes(413), tars.END]
        )
        yield _stream(algorithm, ContentType.CONFIG, [100], ("composefs.image", DIGEST))
        yield _stream(algorithm, ContentType.BLOB, [b"text" * 100, 1000, b"", 1001, b"x"])
    yield _stream(Algorithm.SHA256, ContentType.MANIFEST, [])
    data = _stream(Algorithm.SHA256, 7, [b"q"])
    # As bootc up to 1.15 wrote it.
    start, end = data[16:24], data[24:32]
    yield start + end + bytes(2) + data[:11] + bytes((0, 1, 12)) + data[32:]
    yield joined(
        data[:32], data[96:112], [b"", b"", zstandard.compress(b""), zstandard.compress(bytes(20_000))]
    )


def erofs_seeds() -> Iterator[bytes]:
    for image_format in Format:
        yield bytes(build(small_tree(), image_format, Algorithm.SHA256))
    v2 = bytes(build(sample_tree(), Format.V2, Algorithm.SHA256))
    for version in Format:
        # The stubs of V0 and V1 make images large; most of their reader does without.
        yield v2[:12] + bytes([version]) + v2[13:]
    v1 = bytes(build(sample_tree(), Format.V1, Algorithm.SHA256))
    yield v1
    crowd = Directory(
        Stat(0o755, 0, 0, 0, 0, {}),
        {b"entry-%03d" % n: Leaf(Stat(0, 0, 0, 0, 0, {}), Fifo()) for n in range(300)},
    )
    yield bytes(build(crowd, Format.V2, Algorithm.SHA256))


def dump_seeds() -> Iterator[bytes]:
    yield b"".join(write(sample_tree()))
    yield b"".join(write(small_tree()))
    for path in DATA.glob("*.dump"):
        if path.stat().st_size < 4096:
            yield path.read_bytes()
    special = (DATA / "special.dump").read_bytes().splitlines(keepends=True)
    for at in range(0, len(special), 20):
        yield special[0] + b"".join(line for line in special[at : at + 20] if len(line) < 500)


def metadata_seeds() -> Iterator[bytes]:
    for algorithm in Algorithm:
        for formats in (
            FormatSet(Format.V1),
            FormatSet(Format.V2),
            FormatSet(Format.V2, (Format.V1, Format.V0)),
        ):
            yield Metadata.new(algorithm, formats).render()
    yield b'{"version":1,"algorithm":"fsverity-sha512-12","features":{"incompatible":["x"]}}'


def _descriptor(kind: str, **fields: object) -> dict[str, object]:
    return {"mediaType": kind, "digest": DIGEST, "size": 7} | fields


def manifest_seeds() -> Iterator[bytes]:
    config = _descriptor(models.CONFIG_TYPE)
    layers = [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", annotations={"a": "b"})]
    yield json.dumps(
        {"schemaVersion": 2, "mediaType": models.MANIFEST_TYPE, "config": config, "layers": layers}
    ).encode()
    yield json.dumps(
        {
            "schemaVersion": 2,
            "config": config,
            "layers": None,
            "annotations": None,
            "artifactType": "x/y",
            "subject": config,
        }
    ).encode()


def config_seeds() -> Iterator[bytes]:
    rootfs = {"type": "layers", "diff_ids": [DIGEST, DIGEST]}
    labels = {"Labels": {"org.opencontainers.image.version": "1"}, "Env": ["PATH=/"]}
    yield json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "2026-01-01T00:00:00Z",
            "config": labels,
            "rootfs": rootfs,
        }
    ).encode()
    yield json.dumps(
        {"config": None, "rootfs": {"diff_ids": None}, "history": [{"empty_layer": True}]}
    ).encode()


def index_seeds() -> Iterator[bytes]:
    name = {"annotations": {models.REF_NAME: "name"}}
    platform = {"platform": {"os": "linux", "architecture": "amd64"}}
    for kind in (models.MANIFEST_TYPE, models.INDEX_TYPE, models.DOCKER_MANIFEST_TYPE):
        yield json.dumps({"schemaVersion": 2, "manifests": [_descriptor(kind, **name)]}).encode()
    yield json.dumps(
        {
            "schemaVersion": 2,
            "manifests": [
                _descriptor(models.MANIFEST_TYPE, **name),
                _descriptor(models.INDEX_TYPE, **platform),
            ],
        }
    ).encode()
    yield b'{"schemaVersion":2,"manifests":null}'


def _reply(value: object, flags: int = 0, content: bytes = b"", **fields: object) -> bytes:
    text = json.dumps(
        {"success": True, "value": value, "pipeid": 5 if flags & PIPE else 0, "error": ""} | fields
    ).encode()
    piped = struct.pack("<H", len(content)) + content if flags & PIPE else b""
    return struct.pack("<BH", flags, len(text)) + text + piped


def proxy_seeds() -> Iterator[bytes]:
    config, blob = b"{}", b"blob"
    document = {
        "schemaVersion": 2,
        "config": {
            "mediaType": models.CONFIG_TYPE,
            "digest": "sha256:" + hashlib.sha256(config).hexdigest(),
            "size": 2,
        },
        "layers": [{"mediaType": "x", "digest": "sha256:" + hashlib.sha256(blob).hexdigest(), "size": 4}],
    }
    raw = json.dumps(document).encode()
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    opened = _reply("0.2.8") + _reply(1)
    fetched = opened + _reply(digest, PIPE, raw) + _reply(None)
    good = fetched + _reply(0, PIPE, config) + _reply(None) + _reply(4, PIPE | KEEP_OPEN, blob) + _reply(None)
    yield good + _reply(None)
    yield opened + _reply(DIGEST, PIPE, raw) + _reply(None) + _reply(0, PIPE, config) + _reply(None)
    yield _reply("0.2.8") + _reply(None, success=False, error="no space left on device", error_code="other")
    yield _reply("0.2.8") + _reply(None, success=False, error='unauthorized: "https://u:p@host/v2/?token=x"')
    yield _reply("0.1.0")
    yield _reply("0.2.8", pipeid=float("inf"))
    yield opened + _reply(DIGEST, PIPE | FD_1, raw)
    yield opened + _reply(DIGEST, UNASKED)
    log = b'time="2026" level=fatal msg="Error: \\"x\\" not found"'
    yield _reply("0.2.8") + struct.pack("<BH", LOG, len(log)) + log


def reference_seeds() -> Iterator[bytes]:
    names = (
        "docker://registry.example/os/base:latest",
        f"docker://localhost:5000/a@{DIGEST}",
        "registry://busybox",
        "oci:/var/lib/image:tag",
        "oci:/a//b/./c:@12",
        "oci-archive:/a.tar",
        "dir:/x",
        "docker-archive:/a.tar:busybox:1",
        f"docker-daemon:{DIGEST}",
        "docker-daemon:busybox:1",
        "containers-storage:localhost/os:1",
        "containers-storage:[overlay@/var/lib/c+/run/c]busybox@" + 64 * "b",
        "docker://é.example/x",
    )
    yield from map(str.encode, names)


def policy_seeds() -> Iterator[bytes]:
    accept = [{"type": "insecureAcceptAnything"}]
    signed = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]
    yield json.dumps({"default": accept}).encode()
    yield json.dumps({"default": [{"type": "reject"}], "transports": {
        "docker": {"registry.example": signed, "*.example": accept, "": accept},
        "oci": {"/var/lib": accept}, "containers-storage": {"": accept}}}).encode()  # fmt: skip


def registries_seeds() -> Iterator[bytes]:
    yield b"""unqualified-search-registries = ["x"]
[[registry]]
prefix = "*.example"
location = "h:5"
insecure = true
"""
    yield b"""[[registry]]
location = "registry.example/os"
blocked = false
[[registry.mirror]]
location = "m"
insecure = true
"""
    yield b'[[Registry]]\nLocation = "a"\n[aliases]\n"x" = "y/z"\n'
    yield b"[registries.search]\nregistries = []\n"


def pulled_seeds() -> Iterator[bytes]:
    row = {"reference": "docker://r/x", "manifest_digest": DIGEST, "source_digest": DIGEST, "time": 5}
    yield json.dumps({"version": 1, "pulls": [row, row | {"time": -1}, {}]}).encode()
    yield b'{"version": 2}'


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = (
    {
        "tar": tar_seeds,
        "layer": tar_seeds,
        "gzip": gzip_seeds,
        "zstd": zstd_seeds,
        "tar_split": tar_split_seeds,
        "stream": stream_seeds,
        "erofs": erofs_seeds,
        "dump": dump_seeds,
        "metadata": metadata_seeds,
        "manifest": manifest_seeds,
        "config": config_seeds,
        "index": index_seeds,
        "proxy": proxy_seeds,
        "reference": reference_seeds,
        "policy": policy_seeds,
        "registries": registries_seeds,
        "pulled": pulled_seeds,
    }
    | boot_seeds.SEEDS
    | host_seeds.SEEDS
)


def main() -> None:
    for name in sys.argv[1:] or SEEDS:
        (FOUND / name).mkdir(parents=True, exist_ok=True)
        for data in SEEDS[name]():
            (FOUND / name / f"seed-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)


if __name__ == "__main__":
    main()
