"""A real Debian 13 root with a kernel, as tar, as OCI layouts of one layer and of eight, gzip and zstd.

Made once per session (or once per ``HOSTIMAGE_TEST_CACHE``, for benchmarks run again and again).
"""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.layout import Layer, Layout, file_chunks
from hostimage_testing.tools import absent, require

PACKAGES = (
    "linux-image-amd64,systemd,systemd-sysv,dbus,polkitd,ca-certificates,python3-minimal,e2fsprogs,"
    "iproute2,iputils-ping,less,nano,openssh-client,locales,kbd"
)
LAYERS = 8
_MTIME = 1_700_000_000
_CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)


@dataclass(frozen=True)
class Debian:
    """``layout`` holds the images ``one-gzip``, ``one-zstd``, ``eight-gzip``, ``eight-zstd``."""

    tar: Path
    layer_tars: list[Path]
    layout: Path


def bootstrap(target: Path) -> None:
    """Make a Debian 13 root as a tar archive at ``target``."""
    program = require("mmdebstrap")
    if os.geteuid() != 0:
        absent("making a Debian root needs root")
    argv = [program, "--variant=apt", "--mode=root", f"--include={PACKAGES}", "--quiet", "trixie"]
    partial = target.with_suffix(".partial.tar")
    done = subprocess.run(
        [*argv, str(partial)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    if done.returncode != 0:
        absent(f"mmdebstrap failed: {done.stderr[-500:]}")
    partial.rename(target)


def prepare(directory: Path) -> Debian:
    """The Debian image below ``directory``; what is there already is used again."""
    directory.mkdir(parents=True, exist_ok=True)
    tar = directory / "rootfs.tar"
    if not tar.exists():
        bootstrap(tar)
    layer_tars = [directory / f"layer{n}.tar" for n in range(LAYERS)]
    if not layer_tars[-1].exists():
        split(tar, layer_tars[:-1])
        layer_tars[-1].write_bytes(update_layer())
    layout = directory / "layout"
    if not (layout / "complete").exists():
        _images(Layout(layout), tar, layer_tars)
        (layout / "complete").touch()
    return Debian(tar, layer_tars, layout)


def _images(layout: Layout, tar: Path, layer_tars: list[Path]) -> None:
    labels = {"org.opencontainers.image.version": "13"}
    for compression in ("gzip", "zstd"):
        one = layout.layer(file_chunks(tar), compression)
        layout.image(f"one-{compression}", [one], labels=labels)
        eight: list[Layer] = [layout.layer(file_chunks(path), compression) for path in layer_tars]
        layout.image(f"eight-{compression}", eight, labels=labels)


def split(tar: Path, targets: list[Path]) -> None:
    """Distribute the entries of ``tar``, in their order, over archives of about equal size."""
    share = tar.stat().st_size // len(targets) + 1
    with tarfile.open(tar, "r|") as source:
        numbered: Iterator[tuple[int, tarfile.TarInfo]] = ((m.offset // share, m) for m in source)
        for number, members in itertools.groupby(numbered, key=lambda pair: pair[0]):
            with tarfile.open(targets[number], "w", format=tarfile.PAX_FORMAT) as out:
                for _, member in members:
                    out.addfile(member, source.extractfile(member) if member.isreg() else None)


def update_layer() -> bytes:
    """The eighth layer: all that a layer can do to those below it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as out:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime, info.mode = kind, len(data), _MTIME, 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            out.addfile(info, io.BytesIO(data) if data else None)

        directory, symlink, hardlink = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
        add("./usr/share/doc/apt/.wh.copyright")
        add("./usr/share/doc/.wh.bash")
        add("./usr/share/doc/.wh.not-there")
        add("./usr/share/common-licenses/.wh..wh..opq")
        add("./usr/share/common-licenses/GPL-4", data=b"not yet\n" * 100)
        add("./etc/hostname", data=b"replaced\n")
        # A link's mode is 0777 on every Linux file system: no extracted tree could show another.
        add("./usr/share/doc/dpkg", symlink, linkname="apt", mode=0o777)
        add("./usr/bin/shell", hardlink, linkname="./usr/bin/bash")
        add("./usr/bin/new", mode=0o4755, uid=70000, gid=5, data=b"#!/bin/sh\n" * 50)
        add("./usr/bin/new-link", hardlink, linkname="./usr/bin/new")
        add("./usr/bin/capable", mode=0o755, data=b"x" * 65, pax_headers={
            "SCHILY.xattr.security.capability": _CAPABILITY.decode("utf-8", "surrogateescape"),
            "SCHILY.xattr.user.dropped": "yes",
            "mtime": "1700000001.123456789",
        })  # fmt: skip
        add("./usr/lib/pipe", tarfile.FIFOTYPE)
        add("./usr/lib/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("./usr/lib/disk", tarfile.BLKTYPE, devmajor=259, devminor=300)
        add("./usr/share/" + "n" * 255, data=b"long name")
        deep = "./usr/share"
        for level in range(30):
            deep += f"/directory-{level:02}"
            add(deep, directory, mode=0o755)
        add(deep + "/file", data=b"deep")
        add("./usr/share/latin-\udce9", data=b"a name that is not UTF-8")
        add("./usr", directory, mode=0o755, pax_headers={"mtime": "1700000002.5"})
    return buffer.getvalue()
