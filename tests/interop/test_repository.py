"""Repositories of ours judged by cfsctl, and its own read by us."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing.tools import run
from hostimaged.composefs import fsverity, splitstream
from hostimaged.composefs.erofs import Format, Image, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, OldRepository, Repository, Verity
from hostimaged.composefs.splitstream import ContentType, Writer
from hostimaged.composefs.tree import Directory, External, Inline, Leaf, Stat
from hostimaged.errors import LockTimeout
from hostimaged.ids import ObjectId

pytestmark = pytest.mark.interop

both_algorithms = pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)

FSCK_OK = "meta.json: ok\nobjects: {objects} ok\nstreams: {streams} ok\nimages: {images} ok\nstatus: ok\n"


def make(path: Path, algorithm: Algorithm) -> Repository:
    return Repository.init(path, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0]


def fsck(cfsctl: str, path: Path, *, objects: int, streams: int = 0, images: int = 0) -> None:
    counts = {"objects": objects, "streams": streams, "images": images}
    expected = FSCK_OK.format_map({kind: f"{count}/{count}" for kind, count in counts.items()})
    assert run(cfsctl, "--repo", path, "--insecure", "fsck").out == expected


def sample_tar() -> bytes:
    """A layer with contents inline and external, large and small."""
    rng = random.Random(5)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, size in (("empty", 0), ("small", 64), ("large", 65), ("larger", 300_000), ("zeros", 5000)):
            member = tarfile.TarInfo(f"usr/{name}")
            member.size = size
            content = bytes(size) if name == "zeros" else rng.randbytes(size)
            tar.addfile(member, io.BytesIO(content))
        for number in range(3000):
            member = tarfile.TarInfo(f"usr/directory-{number}")
            member.type = tarfile.DIRTYPE
            member.mode = rng.randrange(0o1000)
            tar.addfile(member)
    return out.getvalue()


# --- what we write ------------------------------------------------------------------------------------------


@both_algorithms
@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
def test_metadata_is_the_same(
    cfsctl: str, tmp_path: Path, algorithm: Algorithm, image_format: Format
) -> None:
    version = str(int(image_format))
    run(cfsctl, "init", "--insecure", "--algorithm", algorithm.identifier, "--erofs-version", version,
        tmp_path / "theirs")  # fmt: skip
    formats = FormatSet(image_format)
    Repository.init(tmp_path / "ours", algorithm=algorithm, formats=formats, verity=Verity.OPPORTUNISTIC)[
        0
    ].close()
    assert (tmp_path / "ours/meta.json").read_bytes() == (tmp_path / "theirs/meta.json").read_bytes()
    repository, is_new = Repository.init(
        tmp_path / "theirs", algorithm=algorithm, formats=formats, verity=Verity.OPPORTUNISTIC
    )
    with repository:
        assert not is_new
    # And the other way round: it takes ours for its own.
    run(cfsctl, "init", "--insecure", "--algorithm", algorithm.identifier, "--erofs-version", version,
        tmp_path / "ours")  # fmt: skip


@both_algorithms
def test_an_empty_repository(cfsctl: str, tmp_path: Path, algorithm: Algorithm) -> None:
    make(tmp_path / "ours", algorithm).close()
    fsck(cfsctl, tmp_path / "ours", objects=0)


@both_algorithms
def test_fsck_of_objects_streams_and_images(cfsctl: str, tmp_path: Path, algorithm: Algorithm) -> None:
    path = tmp_path / "ours"
    content = b"content of a file" * 1000
    with make(path, algorithm) as repository:
        stored = repository.store_object(content)
        with repository.object_writer() as writer:
            writer.write(content[:5000])
            writer.write(content)
            streamed = writer.commit()
        layer = repository.new_stream(ContentType.LAYER)
        layer.inline(b"head")
        layer.external(stored.id, len(content))
        layer.external(streamed.id, len(content) + 5000)
        layer.inline(b"tail" * 200_000)
        layer_id = repository.write_stream("a-layer", layer, "a/layer")
        image_ids = [
            repository.write_image(
                build(sample_tree(stored.id, len(content)), f, algorithm), f"image/{f.label}"
            )
            for f in (Format.V1, Format.V2)
        ]
        config = repository.new_stream(ContentType.CONFIG)
        config.named_ref("layer", layer_id)
        config.named_ref("composefs.image.v1", image_ids[0])
        config.inline(b"{}")
        repository.write_stream("a-config", config)
    fsck(cfsctl, path, objects=6, streams=2, images=2)
    catted = subprocess.run(
        [cfsctl, "--repo", path, "cat", "refs/a/layer"], stdout=subprocess.PIPE, check=True, timeout=60
    ).stdout
    assert catted == b"head" + content + content[:5000] + content + b"tail" * 200_000
    listing = run(cfsctl, "--repo", path, "images").out
    assert "image/v1" in listing
    assert image_ids[0].hex()[:12] in listing
    objects = run(cfsctl, "--repo", path, "image-objects", image_ids[0].hex()).out
    assert objects.split() == [f"{algorithm.label}:{stored.id.hex()}"]
    # Only the config has no reference.
    collected = run(cfsctl, "--repo", path, "gc").out
    assert "1 removed" in collected
    assert "1 stream" in collected
    fsck(cfsctl, path, objects=5, streams=1, images=2)
    with Repository.open(path) as repository:
        assert repository.streams() == ["a-layer"]


def sample_tree(id_: ObjectId, size: int) -> Directory:
    stat = Stat(mode=0o755, uid=0, gid=0, mtime=0, nsec=0, xattrs={})
    usr: dict[bytes, Directory | Leaf] = {
        b"file": Leaf(stat, External(id_, size)),
        b"inline": Leaf(stat, Inline(b"few bytes")),
    }
    return Directory(stat, {b"usr": Directory(stat, usr)})


@both_algorithms
def test_cfsctl_finds_what_we_would_call_damage(cfsctl: str, tmp_path: Path, algorithm: Algorithm) -> None:
    """The judge is awake: a flipped bit in an object, and an object that is gone."""
    path = tmp_path / "ours"
    with make(path, algorithm) as repository:
        stored = repository.store_object(b"x" * 100)
        writer = repository.new_stream(ContentType.BLOB)
        writer.external(stored.id, 100)
        repository.write_stream("name", writer)
    file = path / "objects" / stored.id.pathname
    file.write_bytes(b"y" * 100)
    assert "object-digest-mismatch" in run(cfsctl, "--repo", path, "fsck", check=False).out
    file.unlink()
    assert "missing-object-ref" in run(cfsctl, "--repo", path, "fsck", check=False).out
    with Repository.open(path) as repository:
        assert repository.store_object(b"x" * 100).is_new
    fsck(cfsctl, path, objects=2, streams=1)


# --- what we read -------------------------------------------------------------------------------------------


@pytest.fixture(params=list(Algorithm), ids=lambda a: a.label)
def theirs(cfsctl: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Repository]:
    """A repository made and filled by cfsctl: an image with a reference, an imported one, a named layer."""
    path = tmp_path / "theirs"
    algorithm: Algorithm = request.param
    run(cfsctl, "init", "--insecure", "--algorithm", algorithm.identifier, path)
    root = tmp_path / "root"
    (root / "usr").mkdir(parents=True)
    (root / "usr/file").write_bytes(b"content" * 1000)
    (root / "usr/inline").write_bytes(b"few bytes")
    run(cfsctl, "--repo", path, "create-image", root, "made/by-cfsctl")
    (image,) = [p for p in (path / "images").iterdir() if p.name != "refs"]
    with image.open("rb") as file:
        subprocess.run(
            [cfsctl, "--repo", path, "import-image", "imported"], stdin=file, check=True, timeout=60,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    tar = sample_tar()
    digest = "sha256:" + hashlib.sha256(tar).hexdigest()
    subprocess.run(
        [cfsctl, "--repo", path, "oci", "import-layer", digest, "layer-name"], input=tar, check=True,
        stdout=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    with Repository.open(path) as repository:
        assert repository.algorithm is algorithm
        yield repository


def test_reading_their_repository(theirs: Repository) -> None:
    assert not theirs.secure
    assert theirs.formats == FormatSet(Format.V1)
    (image,) = theirs.images()
    assert theirs.image_refs() == {"imported": image, "made/by-cfsctl": image}
    assert theirs.image_refs("made") == {"by-cfsctl": image}
    tar = sample_tar()
    name = "oci-layer-sha256:" + hashlib.sha256(tar).hexdigest()
    assert theirs.streams() == [name]
    assert theirs.stream_refs() == {"layer-name": name}
    assert time.time() - 600 < (theirs.stream_modified("layer-name") or 0) <= time.time()
    stream_id = theirs.has_stream(name)
    assert stream_id is not None
    for id_ in (stream_id, *object_refs(theirs, name)):
        data = theirs.read_object(id_, 1 << 20)
        assert fsverity.digest(theirs.algorithm, data) == id_
        assert not theirs.store_object(data).is_new
    with os.fdopen(theirs.open_image(image), "rb") as file:
        for id_ in Image(file.read(), theirs.algorithm).objects():
            assert theirs.read_object(id_, 1 << 20) == b"content" * 1000
    assert theirs.used_bytes() > 300_000


def object_refs(repository: Repository, name: str) -> tuple[ObjectId, ...]:
    with repository.open_stream(name, expected=ContentType.LAYER) as stream:
        return stream.object_refs


def test_their_stream_is_the_tar(theirs: Repository) -> None:
    tar = sample_tar()
    (name,) = theirs.streams()
    with theirs.open_stream(name, theirs.has_stream(name), ContentType.LAYER) as stream:
        out = bytearray()
        splitstream.cat(stream, theirs, out.extend)
        assert bytes(out) == tar
        assert stream.size == len(tar)
        assert stream.named_refs == {}
        # In order of first use, 65 bytes and more.
        assert [theirs.object_size(id_) for id_ in stream.object_refs] == [65, 300_000, 5000]


def test_the_same_stream_has_the_same_bytes(theirs: Repository) -> None:
    """What our writer makes of the same chunks is theirs to the byte, so the stream ids agree."""
    (name,) = theirs.streams()
    expected = theirs.has_stream(name)
    assert expected is not None
    with theirs.open_stream(name) as stream, Writer(theirs.algorithm, stream.content_type) as writer:
        for chunk in stream.chunks():
            if isinstance(chunk, ObjectId):
                writer.external(chunk, theirs.object_size(chunk))
            else:
                for at in range(0, len(chunk), 700):
                    writer.inline(chunk[at : at + 700])
        ours = b"".join(writer.finish())
    assert ours == theirs.read_object(expected, 1 << 20)


def test_writing_into_their_repository(cfsctl: str, theirs: Repository) -> None:
    writer = theirs.new_stream(ContentType.BLOB)
    content = b"ours" * 1000
    writer.external(theirs.store_object(content).id, len(content))
    theirs.write_stream("ours", writer, "ours/ref")
    # 2 of the image, 4 of the layer, 2 of ours.
    fsck(cfsctl, theirs.path, objects=8, streams=2, images=1)


def test_their_lock(cfsctl: str, theirs: Repository) -> None:
    """``cfsctl transaction`` holds the shared lock: we share it, and do not get the exclusive one."""
    path = theirs.path
    theirs.close()
    with subprocess.Popen([cfsctl, "--repo", path, "transaction"], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    Repository.open(path, exclusive=True, lock_timeout=0).close()
                except LockTimeout as error:
                    assert f"pid {process.pid} (cfsctl)" in error.message  # noqa: PT017
                    break
                assert time.monotonic() < deadline, "cfsctl takes no lock"
            Repository.open(path, lock_timeout=0).close()
        finally:
            process.terminate()
    Repository.open(path, exclusive=True, lock_timeout=5).close()


def test_our_lock_keeps_their_collector_out(cfsctl: str, theirs: Repository) -> None:
    unreferenced = theirs.store_object(b"not named yet" * 100)
    collector = [cfsctl, "--repo", theirs.path, "gc"]
    with subprocess.Popen(collector, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while f"-> FLOCK  ADVISORY  WRITE {process.pid} " not in Path("/proc/locks").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline, "cfsctl does not ask for the lock"
            time.sleep(0.01)
        assert theirs.has_object(unreferenced.id)
        theirs.close()
        assert process.wait(60) == 0
    with Repository.open(theirs.path) as repository:
        assert not repository.has_object(unreferenced.id)


def test_an_old_repository(cfsctl: str, theirs: Repository) -> None:
    """Without meta.json we refuse what cfsctl upgrades, as our hint says."""
    path = theirs.path
    theirs.close()
    (path / "meta.json").unlink()
    with pytest.raises(OldRepository) as caught:
        Repository.open(path)
    assert "cfsctl" in caught.value.hint
    run(cfsctl, "--repo", path, "fsck")
    with Repository.open(path) as repository:
        assert repository.algorithm is theirs.algorithm
