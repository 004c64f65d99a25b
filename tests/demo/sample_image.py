"""Builds a small OS image as an OCI image layout: five layers, compressed by gzip, zstd and not at all.

The same version gives the same tar bytes on every machine, so diff_ids never change; compressed bytes, and
with them the manifest digest, are the same wherever zlib and zstd are the same. Two versions of the image in
one layout share every layer but the last. Layers have what real ones have: hard links, symlinks, long names,
file capabilities, replaced and deleted files, a directory made opaque, a kernel.

usage: sample_image.py DIRECTORY [--version VERSION] [--tag TAG]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import struct
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Every time in the image: 2025-01-01T00:00:00Z.
EPOCH: Final = 1_735_689_600
KERNEL: Final = "6.12.0-sample"
_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
_MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
_SUFFIX: Final = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
_REF_NAME: Final = "org.opencontainers.image.ref.name"
#: cap_net_raw=ep in revision 2 of the kernel's struct vfs_cap_data.
_NET_RAW: Final = bytes.fromhex("0100000200200000000000000000000000000000").decode("ascii")
_WORDS: Final = ("the", "of", "kernel", "image", "layer", "root", "mount", "file", "object", "name", "digest")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the image: its blob and the tar inside; sizes in bytes."""

    title: str
    compression: str
    digest: str
    size: int
    diff_id: str
    tar_size: int


@dataclass(frozen=True, slots=True)
class SampleImage:
    """A built image; ``reference`` is how to pull it."""

    reference: str
    manifest_digest: str
    config_digest: str
    version: str
    layers: tuple[Layer, ...]


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _Hashing:
    """Passes on what is written, counting and hashing it."""

    def __init__(self, target: _Sink) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        self._target.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


class Tree:
    """Writes the entries of one layer, all with one owner; paths are relative, contents bytes."""

    def __init__(self, archive: tarfile.TarFile, owner: tuple[int, int]) -> None:
        self._archive = archive
        self._owner = owner

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory."""
        self._add(path, tarfile.DIRTYPE, mode)

    def file(self, path: str, data: bytes, mode: int = 0o644, **xattrs: str) -> None:
        """A regular file; extended attributes as ``security_capability="…"``."""
        entry = self._entry(path, tarfile.REGTYPE, mode)
        entry.size = len(data)
        entry.pax_headers = {
            f"SCHILY.xattr.{name.replace('_', '.')}": value for name, value in xattrs.items()
        }
        self._archive.addfile(entry, io.BytesIO(data))

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._add(path, tarfile.SYMTYPE, 0o777, target)

    def hardlink(self, path: str, target: str) -> None:
        """One more name of ``target``, which this layer has already."""
        self._add(path, tarfile.LNKTYPE, 0o644, target)

    def whiteout(self, path: str) -> None:
        """Deletes what a lower layer has at ``path``."""
        parent, _, name = path.rpartition("/")
        self._add(f"{parent}/.wh.{name}", tarfile.REGTYPE, 0o000)

    def opaque(self, path: str) -> None:
        """Hides everything that lower layers have in the directory ``path``."""
        self.directory(path)
        self._add(f"{path}/.wh..wh..opq", tarfile.REGTYPE, 0o000)

    def _add(self, path: str, kind: bytes, mode: int, target: str = "") -> None:
        entry = self._entry(path, kind, mode)
        entry.linkname = target
        self._archive.addfile(entry)

    def _entry(self, path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(path)
        entry.type = kind
        entry.mode = mode
        entry.mtime = EPOCH
        entry.uid, entry.gid = self._owner
        return entry


def noise(seed: str, size: int) -> bytes:
    """``size`` bytes that do not compress, the same for the same seed."""
    return hashlib.shake_128(seed.encode()).digest(size)


def prose(seed: str, size: int) -> bytes:
    """``size`` bytes of words, which compress well."""
    words = (_WORDS[byte % len(_WORDS)] for byte in noise(seed, size // 3 + 1))
    return (" ".join(words) + "\n").encode()[:size].ljust(size, b"\n")


def _base(tree: Tree) -> None:
    """Directories, programs, a kernel."""
    for path in ("boot", "dev", "etc", "proc", "run", "sys", "sysroot", "tmp", "var"):
        tree.directory(path, 0o1777 if path == "tmp" else 0o755)
    for path in ("usr", "usr/bin", "usr/lib", "usr/share", "usr/share/doc", "usr/lib/modules"):
        tree.directory(path)
    for path in ("bin", "lib"):
        tree.symlink(path, f"usr/{path}")
    tree.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/shadow", b"root:!:20000::::::\n", 0o600)
    tree.file("etc/hostname", b"")
    tree.file("usr/lib/os-release", b"NAME=Sample\nID=sample\n")
    tree.symlink("etc/os-release", "../usr/lib/os-release")
    for number in range(200):
        tree.file(f"usr/bin/program-{number:03}", noise(f"program {number}", 20_000 + 97 * number), 0o755)
    tree.file("usr/bin/ping", noise("ping", 70_000), 0o755, security_capability=_NET_RAW)
    tree.file("usr/bin/su", noise("su", 60_000), 0o4755)
    tree.hardlink("usr/bin/program", "usr/bin/program-000")
    tree.directory(f"usr/lib/modules/{KERNEL}")
    tree.file(f"usr/lib/modules/{KERNEL}/vmlinuz", noise("kernel", 8 << 20))
    tree.file(f"usr/lib/modules/{KERNEL}/initramfs.img", noise("initramfs", 6 << 20), 0o600)


def _libraries(tree: Tree) -> None:
    """Larger files, and names that do not fit into a plain tar header."""
    for number in range(60):
        tree.file(f"usr/lib/lib{number:02}.so.1", noise(f"library {number}", 180_000 + 5_000 * number), 0o755)
        tree.symlink(f"usr/lib/lib{number:02}.so", f"lib{number:02}.so.1")
    deep = "usr/lib/" + "/".join(["a-directory-with-quite-a-long-name"] * 4)
    for depth in range(3, deep.count("/") + 2):
        tree.directory("/".join(deep.split("/")[:depth]))
    tree.file(f"{deep}/ünïcødé.conf", b"key = value\n")


def _documents(tree: Tree) -> None:
    """Many small files."""
    for group in range(20):
        tree.directory(f"usr/share/doc/package-{group:02}")
        for number in range(40):
            seed = f"document {group} {number}"
            tree.file(
                f"usr/share/doc/package-{group:02}/page-{number:02}.txt", prose(seed, 300 + 211 * number)
            )


def _changes(tree: Tree) -> None:
    """Files of lower layers replaced and deleted."""
    tree.whiteout("usr/bin/program-199")
    tree.whiteout("usr/share/doc/package-19")
    tree.opaque("usr/share/doc/package-18")
    tree.file("usr/share/doc/package-18/only.txt", b"what was here is hidden\n")
    tree.file("usr/bin/program-001", noise("program 1, patched", 30_000), 0o755)
    tree.directory("usr/lib/app")
    for number in range(12):
        tree.file(f"usr/lib/app/data-{number:02}.bin", noise(f"data {number}", 1 << 20))


def release_program() -> bytes:
    """A program, for Linux on x86-64, that prints /usr/lib/os-release; all that a container can run here."""
    code = bytes.fromhex(
        "b802000000"  # mov eax, 2 (open)
        "488d3d23000000"  # lea rdi, [rip+35]: the path behind the code
        "31f60f05"  # xor esi, esi; syscall
        "89c6bf0100000031d241ba00000100"  # sendfile(1, what was opened, NULL, 64 KiB)
        "b8280000000f05"  # mov eax, 40; syscall
        "31ffb83c0000000f05"  # exit(0)
    )
    code += b"/usr/lib/os-release\0"
    size = 120 + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 4096) + code


def _release(version: str) -> Callable[[Tree], None]:
    def write(tree: Tree) -> None:
        """What differs from version to version."""
        text = f'NAME=Sample\nID=sample\nVERSION_ID={version}\nPRETTY_NAME="Sample OS {version}"\n'
        tree.file("usr/lib/os-release", text.encode())
        tree.file("etc/issue", f"Sample OS {version}\n".encode())
        tree.file("usr/bin/release", release_program(), 0o755)
        tree.directory("usr/share/release")
        tree.file("usr/share/release/notes.txt", prose(f"notes of {version}", 100_000))
        tree.file("usr/share/release/update.bin", noise(f"update {version}", 3 << 20))

    return write


def build(
    directory: Path, *, version: str = "1", tag: str | None = None, owner: tuple[int, int] = (0, 0)
) -> SampleImage:
    """Write the image of ``version`` into the layout at ``directory``, made if need be.

    It gets the name ``tag``, the version by default; what had that name before has none then. Its files
    belong to user and group of ``owner``: only root can deploy what is another's.
    """
    (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    contents: list[tuple[str, str, Callable[[Tree], None]]] = [
        ("base", "gzip", _base),
        ("libraries", "zstd", _libraries),
        ("documents", "none", _documents),
        ("changes", "gzip", _changes),
        ("release", "zstd", _release(version)),
    ]
    layers = tuple(_layer(directory, *content, owner) for content in contents)
    config = _store(directory, _CONFIG_TYPE, _config(version, layers))
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": config,
        "layers": [
            {
                "mediaType": _LAYER_TYPE + _SUFFIX[layer.compression],
                "digest": layer.digest,
                "size": layer.size,
            }
            for layer in layers
        ],
    }
    descriptor = _store(directory, _MANIFEST_TYPE, manifest)
    name = tag or version
    _list(directory, descriptor, name)
    return SampleImage(f"oci:{directory}:{name}", descriptor["digest"], config["digest"], version, layers)


def _config(version: str, layers: tuple[Layer, ...]) -> dict[str, Any]:
    return {
        "created": "2025-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Labels": {
                "containers.bootc": "1",
                "ostree.bootable": "1",
                "org.opencontainers.image.version": version,
            }
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": "2025-01-01T00:00:00Z", "created_by": layer.title} for layer in layers],
    }


def _layer(
    directory: Path, title: str, compression: str, fill: Callable[[Tree], None], owner: tuple[int, int]
) -> Layer:
    temporary = directory / "blobs" / f".{title}.partial"
    with temporary.open("wb") as file:
        blob = _Hashing(file)
        with _compressed(blob, compression) as compressor:
            tar = _Hashing(compressor)
            with tarfile.open(fileobj=tar, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                fill(Tree(archive, owner))
    temporary.rename(_blob(directory, blob.digest))
    return Layer(title, compression, blob.digest, blob.size, tar.digest, tar.size)


@contextmanager
def _compressed(target: _Hashing, compression: str) -> Iterator[_Sink]:
    if compression == "none":
        yield target
    elif compression == "gzip":
        raw: IO[bytes] = target  # type: ignore[assignment]
        # No name and no time in the header: they would differ from run to run.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as file:
            yield file
    else:
        with zstandard.ZstdCompressor(level=3).stream_writer(target, closefd=False) as writer:
            yield writer


def _store(directory: Path, media_type: str, document: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(document, separators=(",", ":")).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    _blob(directory, digest).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _list(directory: Path, descriptor: dict[str, Any], tag: str) -> None:
    path = directory / "index.json"
    manifests = json.loads(path.read_text())["manifests"] if path.exists() else []
    manifests = [entry for entry in manifests if entry["annotations"][_REF_NAME] != tag]
    manifests.append(descriptor | {"annotations": {_REF_NAME: tag}})
    path.write_text(json.dumps({"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": manifests}))


def _blob(directory: Path, digest: str) -> Path:
    return directory / "blobs/sha256" / digest.removeprefix("sha256:")


def main() -> None:
    """Build the image that the command line names and print its reference."""
    parser = argparse.ArgumentParser(description="Build a sample OS image as an OCI image layout.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", default="1")
    parser.add_argument("--tag", help="name of the image in the layout (default: its version)")
    arguments = parser.parse_args()
    image = build(arguments.directory.absolute(), version=arguments.version, tag=arguments.tag)
    print(image.reference)


if __name__ == "__main__":
    main()
