"""Differential fuzzing: random trees and layers given to us and to cfsctl, which must say the same.

usage: differential.py dumps|directories|layers [--seconds N] [--seed N]

``dumps``: dump files, good and odd, and the images V0 and V1 made of them, byte for byte.
``directories``: ids in V0, V1 and V2, of sha256 and sha512, of random trees on disk.
``layers``: random tars, as they are and damaged, and the corpora of the parsers of layers: accepted by both
with the same ids in all formats, or refused by both. What we refuse on purpose is in ``KNOWN_REFUSALS…``.

Every case depends on its seed and the corpora alone; ``--seed N --seconds 0`` runs the case of seed N. Exits
1 at the first difference, after printing its seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mutators
from hypothesis import HealthCheck, Phase, given, seed, settings

from hostimage_testing.dumps import dumped, materialise, mutated
from hostimage_testing.random_layers import RandomLayers
from hostimage_testing.tools import find
from hostimage_testing.trees import trees
from hostimaged.composefs.dumpfile import DumpfileError, parse, write
from hostimaged.composefs.erofs import Format, UnsupportedTree, build
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import Directory
from hostimaged.errors import HostimageError, UnsupportedImage
from hostimaged.ids import ConfigDigest, DiffId
from hostimaged.oci import images
from hostimaged.oci.filesystem import build_tree
from hostimaged.oci.images import layer_stream
from hostimaged.oci.layer_import import import_layer
from hostimaged.progress import Silent

HERE = Path(__file__).parent
CORPORA = [HERE / "corpus/layer", HERE / "corpus/tar"]
SHA256 = Algorithm.SHA256
#: Cases after which the repositories of layers are made anew: they are in memory.
FRESH = 300

#: What no tool makes and readers of tar disagree about, what no file system can hold, and our limits.
KNOWN_REFUSALS_OF_LAYERS = re.compile(
    "is no regular file and has content|a lone block of zeros|leads upwards|has a NUL byte"
    "|invalid link target|a name of over|a path of |sparse files|attribute is larger|invalid size"
    "|an empty path|ends after an extension header"
)
#: Of dump files: composefs-rs takes a hard link at / as an entry of the root, without any metadata.
KNOWN_REFUSALS_OF_DUMPS = re.compile(r"line \d+: / is not a directory")


class Difference(Exception):
    """The two do not say the same."""


class Peer:
    """cfsctl, run in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._program = find("cfsctl") or sys.exit("cfsctl is not installed")

    def __call__(self, *arguments: str | Path, data: bytes | None = None) -> bytes | None:
        """Standard output; None if it fails, which it must do by itself and soon."""
        done = subprocess.run(
            [self._program, *arguments],
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            timeout=120,
            check=False,
            cwd=self.directory,
        )
        if done.returncode < 0:
            raise Difference(f"cfsctl died of signal {-done.returncode}")
        return done.stdout if done.returncode == 0 else None


def random_tree(number: int, algorithm: Algorithm, **options: bool) -> Directory:
    """The tree of a seed."""
    found: list[Directory] = []

    @seed(number)
    @settings(max_examples=2, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(trees(algorithm, **options))
    def draw(root: Directory) -> None:
        found.append(root)

    draw()
    # Hypothesis tries the smallest tree first.
    return found[-1]


def dumps(number: int, peer: Peer, tally: Counter[str]) -> None:
    """One tree as a dump file, and a few that are odd in some place."""
    rng = random.Random(number)
    text = dumped(random_tree(number, SHA256))
    lines = text.splitlines(keepends=True)
    for case in (text, *(mutated(lines, rng) for _ in range(4))):
        image_format = rng.choice([Format.V0, Format.V1])
        arguments = ("mkcomposefs", "--from-file", f"--min-version={image_format}", "-", "-")
        expected = peer(*arguments, data=case)
        ours: bytes | None = None
        try:
            ours = bytes(build(parse(case, SHA256), image_format, SHA256))
        except (DumpfileError, UnsupportedTree) as error:
            if expected is not None and KNOWN_REFUSALS_OF_DUMPS.search(error.message):
                tally["refused by us on purpose"] += 1
                continue
        if ours != expected:
            raise Difference(_sides(ours, expected))
        tally["same image" if ours else "refused by both"] += 1


def directories(number: int, peer: Peer, tally: Counter[str]) -> None:
    """One tree on disk."""
    algorithm = list(Algorithm)[number % 2]
    root = random_tree(number, algorithm)
    with tempfile.TemporaryDirectory(dir=peer.directory) as directory:
        materialise(root, Path(directory))
        common = ("--no-repo", "--hash", algorithm.label)
        text = peer(*common, "create-dumpfile", "--no-propagate-usr-to-root", directory)
        if text is None:
            raise Difference("cfsctl does not read the directory")
        tree = parse(text, algorithm)
        if b"".join(write(tree)) != text:
            raise Difference("the dump file of the directory is written differently")
        for image_format in Format:
            version = f"--erofs-version={image_format}"
            theirs = peer(*common, version, "compute-id", "--no-propagate-usr-to-root", directory)
            ours = digest(algorithm, build(tree, image_format, algorithm)).hex()
            if theirs is None or theirs.decode().strip() != ours:
                raise Difference(f"{image_format.label}: {ours}, cfsctl {theirs!r}")
            tally[f"same id, {image_format.label}"] += 1


class Layers:
    """Layers into two repositories for each hash, of which only cfsctl writes layers into the second."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._directory = directory
        self._repositories: dict[tuple[str, Algorithm], Repository] = {}
        self._cases = 0
        found = [path for corpus in CORPORA for path in sorted(corpus.iterdir())]
        # What was wrong once comes first.
        found.sort(key=lambda path: not path.name.startswith("regression"))
        self._corpus = [path.read_bytes() for path in found]
        stack.callback(self._close)

    def _close(self) -> None:
        while self._repositories:
            _, repository = self._repositories.popitem()
            repository.close()
            shutil.rmtree(repository.path)

    def _repository(self, whose: str, algorithm: Algorithm) -> Repository:
        found = self._repositories.get((whose, algorithm))
        if found is None:
            place = self._directory / f"{whose}-{algorithm.label}"
            found, _ = Repository.init(place, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)
            self._repositories[whose, algorithm] = found
        return found

    def __call__(self, number: int, peer: Peer, tally: Counter[str]) -> None:
        """The layers of one image."""
        self._cases += 1
        if self._cases % FRESH == 0:
            self._close()
        rng = random.Random(number)
        algorithm = rng.choice(list(Algorithm))
        tar_files = self._tar_files(number, rng)
        ours = self._import(algorithm, tar_files)
        theirs = self._peer(peer, algorithm, tar_files)
        if isinstance(ours, list) and theirs is not None:
            if ours != theirs:
                raise Difference(f"ids {ours}, cfsctl {theirs}")
            tally["same ids"] += 1
        elif isinstance(ours, list):
            raise Difference("taken by us, refused by cfsctl")
        elif theirs is None:
            tally["refused by both"] += 1
        elif KNOWN_REFUSALS_OF_LAYERS.search(ours):
            tally["refused by us on purpose"] += 1
        else:
            raise Difference(f"taken by cfsctl, refused by us: {ours}")

    def _tar_files(self, number: int, rng: random.Random) -> list[bytes]:
        if number < len(self._corpus):
            return [self._corpus[number]]
        kind = rng.random()
        if kind < 0.3 and self._corpus:
            return [_damaged(rng.choice(self._corpus), rng)]
        source = RandomLayers(number)
        found = [source.layer(rng.randrange(1, 60)) for _ in range(rng.randrange(1, 4))]
        if kind < 0.7:
            at = rng.randrange(len(found))
            found[at] = _damaged(found[at], rng)
        return found

    def _import(self, algorithm: Algorithm, tar_files: list[bytes]) -> list[str] | str:
        """The ids of the image in all formats, or why there is none."""
        repository = self._repository("ours", algorithm)
        try:
            streams = [
                import_layer(repository, [data], _diff_id(data), Silent()).stream_id for data in tar_files
            ]
            root = build_tree(repository, streams)
            return [digest(algorithm, build(root, format_, algorithm)).hex() for format_ in Format]
        except UnsupportedImage as error:
            return error.message

    def _peer(self, peer: Peer, algorithm: Algorithm, tar_files: list[bytes]) -> list[str] | None:
        repository = self._repository("theirs", algorithm)
        common = ("--repo", repository.path)
        for data in tar_files:
            if peer(*common, "oci", "import-layer", str(_diff_id(data)), data=data) is None:
                return None
        name = _describe(repository, [_diff_id(data) for data in tar_files])
        found = []
        for image_format in Format:
            out = peer(*common, f"--erofs-version={image_format}", "oci", "compute-id", f"@{name}")
            if out is None:
                return None
            found.append(out.decode().strip().rpartition(":")[2])
        return found


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """A tar with a few changes, most with right checksums."""

    def change(part: bytes, limit: int) -> bytes:
        changed = bytearray(part)
        for _ in range(rng.randrange(1, 4)):
            kind = rng.randrange(4)
            at = rng.randrange(len(changed)) if changed else 0
            if kind == 0 and changed:
                changed[at] = rng.randrange(256)
            elif kind == 1 and changed:
                changed[at] = rng.choice(b"\0 /.+-0127x\xff")
            elif kind == 2:
                # A field of a header, or what stands in another header there.
                start, end = rng.choice(
                    [(100, 108), (124, 136), (136, 148), (156, 157), (257, 265), (329, 345)]
                )
                changed[start:end] = rng.choice(
                    [bytes(end - start), rng.randbytes(end - start), b"7" * (end - start)]
                )
            elif changed:
                changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed[:limit])

    return mutators.tar(data, change, len(data) + 512, rng)


def _diff_id(data: bytes) -> DiffId:
    return DiffId.of_hash(hashlib.sha256(data).hexdigest())


def _describe(repository: Repository, layers: list[DiffId]) -> ConfigDigest:
    """Store the configuration of an image whose layers are there, which is all that its tree is made from."""
    config = {"rootfs": {"type": "layers", "diff_ids": [str(layer) for layer in layers]}, "config": {}}
    raw = json.dumps(config | {"architecture": "amd64", "os": "linux"}).encode()
    name = ConfigDigest.of_hash(hashlib.sha256(raw).hexdigest())
    with repository.new_stream(ContentType.CONFIG) as writer:
        writer.external(repository.store_object(raw).id, len(raw))
        for layer in layers:
            found = repository.has_stream(layer_stream(layer))
            if found is None:
                raise Difference("cfsctl stored no layer")
            writer.named_ref(str(layer), found)
        repository.write_stream(images.config_stream(name), writer)
    return name


def _sides(ours: bytes | None, theirs: bytes | None) -> str:
    if ours is None:
        return "refused by us, taken by cfsctl"
    if theirs is None:
        return "taken by us, refused by cfsctl"
    at = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    return f"images of {len(ours)} and {len(theirs)} bytes differ at {at}"


def campaign(kind: str, first: int, seconds: float, directory: Path) -> Counter[str]:
    """Cases from seed ``first`` on, at least one, until the time is over; what happened how often."""
    tally: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        cases: dict[str, Callable[[int, Peer, Counter[str]], None]] = {
            "dumps": dumps,
            "directories": directories,
            "layers": Layers(stack, directory),
        }
        peer, case, number = Peer(directory), cases[kind], first
        while number == first or time.monotonic() < end:
            try:
                case(number, peer, tally)
            except Exception as error:
                error.add_note(f"{kind}, seed {number}")
                raise
            number += 1
    tally["cases"] = number - first
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=["dumps", "directories", "layers"])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Many small files, soon removed: in memory, unless somebody wants them elsewhere.
    in_memory = arguments.kind == "layers" and "TMPDIR" not in os.environ and os.path.isdir("/dev/shm")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if in_memory else None) as directory:
        try:
            tally = campaign(arguments.kind, arguments.seed, arguments.seconds, Path(directory))
        except (Difference, HostimageError) as error:
            print(f"DIFFERENT {' '.join(error.__notes__)}: {error}")
            return 1
    figures = ", ".join(f"{count} {what}" for what, count in sorted(tally.items()))
    print(f"{arguments.kind}: from seed {arguments.seed}, {time.monotonic() - start:.0f} s: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
