"""Where the time of a pull goes: its phases as they come, and each stage of the work alone in one thread.

usage: stages.py ROOT REFERENCE            REFERENCE is an oci: layout; ROOT is made, and removed again
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter

STARTED = perf_counter()

import hashlib  # noqa: E402 (the time that imports take is part of what is measured)

from hostimage_testing.host import scratch_host  # noqa: E402
from hostimaged.composefs import fsverity  # noqa: E402
from hostimaged.composefs.erofs import build  # noqa: E402
from hostimaged.composefs.repository import Repository, Verity  # noqa: E402
from hostimaged.oci.decompress import decompressed  # noqa: E402
from hostimaged.oci.entries import KeptEntries  # noqa: E402
from hostimaged.oci.filesystem import build_tree  # noqa: E402
from hostimaged.oci.layer_import import import_layer  # noqa: E402
from hostimaged.oci.layer_parts import LayerSplitter, Part  # noqa: E402
from hostimaged.oci.layers import plan_layers  # noqa: E402
from hostimaged.oci.layout import LayoutSource  # noqa: E402
from hostimaged.oci.models import parse_config, parse_manifest  # noqa: E402
from hostimaged.oci.pull import pull_image  # noqa: E402
from hostimaged.oci.reference import ImageReference  # noqa: E402
from hostimaged.progress import Silent  # noqa: E402
from hostimaged.system.paths import HostPaths  # noqa: E402

PIECE = 1 << 20
#: Points that come thousands of times.
OFTEN = ("layer.read", "layer.fetch", "layer.store")


def processor(who: int = RUSAGE_SELF) -> float:
    """Seconds of a processor used so far."""
    usage = getrusage(who)
    return usage.ru_utime + usage.ru_stime


class Phases(Silent):
    """Prints when the pull comes to each of its points."""

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point not in OFTEN:
            print(f"{perf_counter() - STARTED:8.3f} {processor():8.3f}  {point}")


def stage(name: str, work: Callable[[], object]) -> None:
    """Run and time ``work``."""
    begin, used = perf_counter(), processor()
    work()
    print(f"{perf_counter() - begin:8.3f} {processor() - used:8.3f}  {name}", flush=True)


class Material:
    """The layers of an image, at each step of the way to the repository."""

    def __init__(self, source: LayoutSource) -> None:
        self._source = source
        manifest = parse_manifest(source.manifest().raw)
        self.plans = plan_layers(manifest, parse_config(source.config(manifest.config)))
        self.contents: list[bytes] = []

    def blobs(self) -> Iterator[bytes]:
        """Read and verified."""
        for plan in self.plans:
            with self._source.blob(plan.descriptor) as chunks:
                yield from chunks

    def tars(self) -> Iterator[Iterator[bytes]]:
        """Each tar; its blob is not verified."""
        for plan in self.plans:
            path = Path(self._source._reference.path) / "blobs/sha256" / plan.descriptor.digest[7:]
            with path.open("rb", buffering=0) as file:
                yield decompressed(plan.media_type, iter(partial(file.read, PIECE // 4), b""))  # type: ignore[misc]

    def decompress(self) -> None:
        """Read and decompress."""
        for tar in self.tars():
            for _ in tar:
                pass

    def hash(self) -> None:
        """The digests of the tars, and what it takes to get them."""
        for tar in self.tars():
            sha256 = hashlib.sha256()
            for piece in tar:
                sha256.update(piece)

    def split(self, *, keep: bool) -> None:
        """Take the tars apart, and understand their headers."""
        for tar in self.tars():
            parts: list[bytes] = []

            def emit(part: Part, buffer: bytes, parts: list[bytes] = parts) -> None:
                if part is not Part.INLINE and keep:
                    parts.append(bytes(buffer))

            entries = KeptEntries().gather()
            LayerSplitter(lambda tar=tar: next(tar, None), emit).run(entries.add)  # type: ignore[misc,arg-type]
            self.contents += parts


def alone(root: Path, material: Material) -> None:
    """Each stage, in one thread; most include those before them."""
    stage("read and verify the blobs", lambda: sum(map(len, material.blobs())))
    stage("read and decompress", material.decompress)
    stage("read, decompress, sha256 of the tar", material.hash)
    stage("read, decompress, split, parse", lambda: material.split(keep=False))
    material.split(keep=True)
    algorithm = fsverity.Algorithm.SHA512
    contents = material.contents
    size = sum(map(len, contents))
    print(f"{'':19}{len(contents)} contents, {size >> 20} MiB")
    stage("fs-verity digests of contents", lambda: [fsverity.digest(algorithm, c) for c in contents])
    made, _ = Repository.init(root / "objects", verity=Verity.OPPORTUNISTIC)
    with made as repository:
        stage("digests, and new files", lambda: [repository.store_object(c) for c in contents])
        stage("digests, of files that are there", lambda: [repository.store_object(c) for c in contents])
        material.contents = contents = []
        stage("sync", repository.sync)
    made, _ = Repository.init(root / "layers", verity=Verity.OPPORTUNISTIC)
    with made as repository:
        ids = []

        def whole() -> None:
            for plan, tar in zip(material.plans, material.tars(), strict=True):
                ids.append(import_layer(repository, tar, plan.id, Silent()).stream_id)

        stage("all of it: layers imported", whole)
        trees = []
        stage("tree, from the streams", lambda: trees.append(build_tree(repository, ids)))
        images = []
        kind = repository.formats.default
        stage("EROFS image", lambda: images.append(build(trees[0], kind, algorithm)))
        stage("digest of it, file, sync", lambda: repository.write_image(images[0]))


def main() -> None:
    """Both tables."""
    root, reference = Path(sys.argv[1]), ImageReference.parse(sys.argv[2])
    try:
        # It is removed at the end: it must be ours.
        root.mkdir()
    except OSError as error:
        sys.exit(f"cannot make {root}: {error.strerror}")
    print(f"{'wall s':>8} {'CPU s':>8}\n{perf_counter() - STARTED:8.3f} {processor():8.3f}  imported")
    try:
        host = scratch_host(root)
        pull_image(
            HostPaths.scratch(root),
            reference,
            expect_digest=None,
            verity=Verity.OPPORTUNISTIC,
            lock_timeout=60.0,
            reporter=Phases(),
        )
        print(f"{'':8} {processor(RUSAGE_CHILDREN):8.3f}  helpers\n\neach alone")
        with LayoutSource(reference) as source:
            alone(host.physical_root, Material(source))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
