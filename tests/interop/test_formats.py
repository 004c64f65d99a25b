"""Dump files, images and digests against composefs-rs (cfsctl) and erofs-utils."""

from __future__ import annotations

import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies

from hostimage_testing.dumps import dumped, materialise, mutated
from hostimage_testing.tools import require, run
from hostimage_testing.trees import trees
from hostimaged.composefs.dumpfile import DumpfileError, parse, write
from hostimaged.composefs.erofs import Format, Image, build
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.composefs.tree import (
    Directory,
    External,
    ExternalNoVerity,
    Inline,
    Leaf,
    Node,
    Sparse,
    Stat,
    Symlink,
    walk,
)

pytestmark = pytest.mark.interop

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512
V0, V1, V2 = Format
ASSETS = Path(__file__).parents[1] / "data/composefs"
# Shrinking would run the peer some hundred times.
few = settings(max_examples=25, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def output(*argv: str | Path, data: bytes | None = None) -> bytes:
    """Standard output of a program that must succeed."""
    done = subprocess.run(argv, input=data, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def mkcomposefs(cfsctl: str, text: bytes, image_format: Format) -> bytes:
    return output(cfsctl, "mkcomposefs", "--from-file", f"--min-version={image_format}", "-", "-", data=text)


@pytest.mark.parametrize("image_format", [V0, V1], ids=["v0", "v1"])
@given(data=strategies.data())
@few
def test_images_of_random_trees(cfsctl: str, image_format: Format, data: strategies.DataObject) -> None:
    root = data.draw(trees(SHA256))
    text = dumped(root)
    expected = mkcomposefs(cfsctl, text, image_format)
    assert build(root, image_format, SHA256) == expected
    assert build(parse(text, SHA256), image_format, SHA256) == expected


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
@given(data=strategies.data())
@few
def test_reading_random_images(cfsctl: str, image_format: Format, data: strategies.DataObject) -> None:
    image = build(data.draw(trees(SHA256, no_verity=False)), image_format, SHA256)
    opened = Image(image, SHA256)
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        name = file.name
        assert output(cfsctl, "composefs-info", "dump", name) == b"".join(write(opened.tree()))
        objects = output(cfsctl, "composefs-info", "objects", name).decode().split()
        assert objects == [object_id.pathname for object_id in sorted(opened.objects())]
        measured = output(cfsctl, "composefs-info", "measure-file", name)
        assert measured.decode().strip() == digest(SHA256, image).hex()


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
@given(data=strategies.data())
@settings(few, max_examples=15)
def test_ids_of_random_directories(cfsctl: str, algorithm: Algorithm, data: strategies.DataObject) -> None:
    """V2 and sha512, which mkcomposefs does not make."""
    root = data.draw(trees(algorithm))
    with tempfile.TemporaryDirectory() as directory:
        materialise(root, Path(directory))
        common = [cfsctl, "--no-repo", "--hash", algorithm.label]
        text = output(*common, "create-dumpfile", "--no-propagate-usr-to-root", directory)
        tree = parse(text, algorithm)
        assert b"".join(write(tree)) == text
        for image_format in Format:
            version = f"--erofs-version={image_format}"
            expected = output(*common, version, "compute-id", "--no-propagate-usr-to-root", directory)
            assert digest(algorithm, build(tree, image_format, algorithm)).hex() == expected.decode().strip()


@pytest.mark.parametrize(
    "asset", sorted(p.name for p in ASSETS.glob("*.dump")), ids=lambda name: name.removesuffix(".dump")
)
def test_assets_of_c_composefs(cfsctl: str, asset: str) -> None:
    """Accepted or refused as composefs-rs does it, with the same image."""
    text = (ASSETS / asset).read_bytes()
    for image_format in (V0, V1):
        done = subprocess.run(
            [cfsctl, "mkcomposefs", "--from-file", f"--min-version={image_format}", "-", "-"],
            input=text, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            with pytest.raises(DumpfileError):
                parse(text, SHA256)
        else:
            assert build(parse(text, SHA256), image_format, SHA256) == done.stdout


SAMPLE = rb"""/ 0 40755 4 0 0 0 1000.0 - - -
/a 0 40755 3 0 0 0 1000.0 - - - user.a=b
/a/b 0 40755 2 0 0 0 1000.0 - - -
/a/b/c 5 100644 2 0 0 0 1000.0 - hello -
/a/l 7 120777 1 0 0 0 1000.0 /target - -
/again 0 @120000 - - - - 0.0 /a/b/c - -
/dev 0 20666 1 0 0 259 0.0 - - -
/hole 900 100777 1 0 0 0 0.0 - - - user.foo=
/obj 4096 100755 1 0 0 0 0.0 f0/f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1 - f0f7e1e58fdd31f5792222087377a4a976760c416ecdf5f426193e608681b7a1
/p 0 10644 1 0 0 0 7.8 - - -
""".splitlines(keepends=True)  # noqa: E501


@pytest.mark.parametrize("seed", range(4))
def test_odd_dump_files_are_judged_alike(cfsctl: str, seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(25):
        text = mutated(SAMPLE, rng)
        done = subprocess.run(
            [cfsctl, "mkcomposefs", "--from-file", "--min-version=1", "-", "-"],
            input=text, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            with pytest.raises(DumpfileError):
                parse(text, SHA256)
        else:
            assert build(parse(text, SHA256), V1, SHA256) == done.stdout
            accepted += 1
    assert accepted < 25


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
@given(data=strategies.data())
@few
def test_fsck_erofs(image_format: Format, data: strategies.DataObject) -> None:
    fsck = require("fsck.erofs")
    image = build(data.draw(trees(SHA256)), image_format, SHA256)
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        run(fsck, file.name)


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
def test_dump_erofs(image_format: Format, tmp_path: Path) -> None:
    dump = require("dump.erofs")
    root = parse(b"".join(SAMPLE), SHA256)
    image = tmp_path / "image"
    image.write_bytes(build(root, image_format, SHA256))
    superblock = run(dump, "-s", image).out
    stubs = 256 if image_format is not V2 else 0
    leaves = len({node for _, node in walk(root)})
    assert re.search(r"inode count: +(\d+)", superblock)[1] == str(leaves + stubs)  # type: ignore[index]
    for path, node in walk(root):
        if isinstance(node, Leaf) and isinstance(node.content, Sparse):
            continue
        shown = run(dump, f"--path={path.decode()}", image).out
        assert _shown(shown, "Links") == _links(root, node), path
        assert _shown(shown, "Uid") == "0"
        assert re.search(r"Access: (\d+)/", shown)[1] == f"{node.stat.mode:04o}"  # type: ignore[index]
    names = run(dump, "--ls", "--path=/a", image).out.split()
    assert {"b", "l"} <= set(names)


def _shown(text: str, key: str) -> str:
    found = re.search(rf"{key}: *(\d+)", text)
    assert found, text
    return found[1]


def _links(root: Directory, node: Node) -> str:
    if isinstance(node, Directory):
        return str(2 + sum(isinstance(child, Directory) for child in node.entries.values()))
    return str(sum(other is node for _, other in walk(root)))


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
def test_objects_and_streams_of_a_repository(cfsctl: str, algorithm: Algorithm, tmp_path: Path) -> None:
    stat = Stat(0o644, 0, 0, 0, 0, {})
    repository, _ = Repository.init(tmp_path / "repository", algorithm=algorithm, verity=Verity.OPPORTUNISTIC)
    images = {}
    with repository:
        stored = [repository.store_object(b"%d" % i * 1000).id for i in range(5)]
        root = Directory(stat._replace(mode=0o755), {})
        for number, object_id in enumerate(stored):
            kind = ExternalNoVerity if number % 2 else External
            root.entries[b"f%d" % number] = Leaf(stat, kind(object_id, 1000))
        for image_format in Format:
            image = build(root, image_format, algorithm)
            images[repository.write_image(image, ref=image_format.label).hex()] = Image(image, algorithm)
        with repository.new_stream(ContentType.BLOB) as writer:
            for object_id in stored:
                writer.inline(b"inline")
                writer.external(object_id, 1000)
            repository.write_stream("stream", writer)
    for name, opened in images.items():
        listed = output(cfsctl, "--repo", repository.path, "image-objects", name).decode().split()
        assert {line.rpartition(":")[2] for line in listed} == {i.hex() for i in opened.objects()}
        assert opened.objects() == set(stored)
    tool = [sys.executable, "-m", "hostimaged.composefs"]
    ours = output(*tool, "cat-stream", "--repo", repository.path, "stream")
    assert ours == output(cfsctl, "--repo", repository.path, "cat", "stream")


def test_the_tool(cfsctl: str, tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "hostimaged.composefs"]
    dumpfile, image, theirs = tmp_path / "dump", tmp_path / "image", tmp_path / "theirs"
    dumpfile.write_bytes(b"".join(SAMPLE))
    for image_format in (V0, V1):
        made = output(*tool, "mkfs", "--format", image_format.label, dumpfile, image)
        version = f"--min-version={image_format}"
        expected = output(cfsctl, "mkcomposefs", "--from-file", "--print-digest", version, dumpfile, theirs)
        assert made == expected
        assert image.read_bytes() == theirs.read_bytes()
        for command in ("dump", "objects"):
            assert output(*tool, command, image) == output(cfsctl, "composefs-info", command, image)
        assert output(*tool, "digest", image) == output(cfsctl, "composefs-info", "measure-file", image)


def large_tree(inodes: int) -> Directory:
    """A tree in the proportions of an OS."""
    rng = random.Random(7)
    names = (b"usr", b"bin", b"lib", b"etc")
    labels = [{b"security.selinux": b"system_u:object_r:%b_t:s0" % name} for name in names]

    def stat(mode: int) -> Stat:
        return Stat(mode, 0, 0, rng.randrange(1_500_000_000, 1_700_000_000), 0, rng.choice(labels))

    root = Directory(stat(0o755), {})
    directories = [root]
    for number in range(inodes - 1):
        entries = rng.choice(directories).entries
        kind = rng.random()
        if kind < 0.1:
            directory = Directory(stat(0o755), {})
            directories.append(directory)
            entries[b"directory-%d" % number] = directory
        elif kind < 0.2:
            entries[b"link-%d" % number] = Leaf(stat(0o777), Symlink(b"../target-%d" % number))
        elif kind < 0.3:
            entries[b"small-%d.conf" % number] = Leaf(stat(0o644), Inline(b"x" * 40))
        else:
            object_id = digest(SHA256, b"%d" % rng.randrange(inodes))
            content = External(object_id, rng.randrange(65, 1_000_000))
            entries[b"file-%d.so" % number] = Leaf(stat(0o644), content)
    return root


@pytest.mark.slow
def test_speed(cfsctl: str, tmp_path: Path) -> None:
    """From dump file to image of 100,000 inodes, beside mkcomposefs of composefs-rs."""
    dumpfile, image, theirs = tmp_path / "dump", tmp_path / "image", tmp_path / "theirs"
    with dumpfile.open("wb") as file:
        file.writelines(write(large_tree(100_000)))
    peer_options = ["--from-file", "--print-digest", "--min-version=1"]
    commands = {
        "ours": [sys.executable, "-m", "hostimaged.composefs", "mkfs", dumpfile, image],
        "cfsctl": [cfsctl, "mkcomposefs", *peer_options, dumpfile, theirs],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3):
        for name, command in commands.items():
            start = time.monotonic()
            output(*command)
            times[name].append(time.monotonic() - start)
    ours, peer = (statistics.median(times[name]) for name in ("ours", "cfsctl"))
    print(f"100,000 inodes: {ours:.2f} s, cfsctl {peer:.2f} s, ratio {ours / peer:.2f}")
    assert image.read_bytes() == theirs.read_bytes()
    # The aim is 4; the machines of the tests are noisy.
    assert ours < 8 * peer
