"""Repositories damaged in every way we could think of: our check against cfsctl's, finding by finding."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.layout import Layout
from hostimage_testing.tools import run
from hostimaged.composefs import __main__ as tool
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository
from hostimaged.composefs.splitstream import ContentType
from hostimaged.ids import ObjectId

pytestmark = pytest.mark.interop

#: After the path of these comes what is the same for everyone: ids, and the names of references. After that
#: of others, a reason in each program's own words.
EXACT = {
    "object-digest-mismatch",
    "object-verity-missing",
    "entry-not-symlink",
    "broken-symlink",
    "unexpected-file-type",
    "missing-object-ref",
    "missing-named-ref",
    "image-missing-object",
}
LAYER = (
    tars.directory(b"usr")
    + tars.file(b"usr/a", b"first " * 100)
    + tars.file(b"usr/b", b"second " * 3000)
    + tars.file(b"usr/c", b"third " * 60_000)
    + tars.file(b"usr/small", b"inline")
    + tars.END
)


@pytest.fixture(scope="session", params=list(Algorithm), ids=lambda a: a.label)
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Path:
    """A repository that cfsctl filled: an image of two layers and formats, and references of all kinds."""
    algorithm: Algorithm = request.param
    path = tmp_path_factory.mktemp("fsck") / "repository"
    layout = Layout(path.parent / "layout")
    layout.image("v1", [layout.layer(LAYER), layout.layer(tars.file(b"usr/d", b"4" * 5000) + tars.END)])
    run(cfsctl, "init", "--insecure", "--algorithm", algorithm.identifier, path)
    run(cfsctl, "--repo", path, "oci", "pull", f"oci:{layout.path}:v1", "a/tag:v1")
    run(cfsctl, "--repo", path, "--erofs-version", "2", "oci", "pull", f"oci:{layout.path}:v1", "another")
    [image, *_] = images(path)
    os.makedirs(path / "images/refs/some")
    os.symlink(f"../{image}", path / "images/refs/plain")
    os.symlink(f"../../{image}", path / "images/refs/some/name")
    return path


@pytest.fixture
def repository(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "repository", symlinks=True))


def objects(path: Path) -> list[Path]:
    return sorted(path.glob("objects/??/*"))


def files(path: Path) -> list[Path]:
    """The objects that are the contents of files."""
    return sorted(
        (
            found
            for found in objects(path)
            if found.read_bytes()[:5] in {b"first", b"secon", b"third", b"44444"}
        ),
        key=lambda found: found.read_bytes()[:1],
    )


def streams(path: Path, kind: str) -> list[Path]:
    return sorted(path.glob(f"streams/oci-{kind}-*"))


def images(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path / "images") if name != "refs")


def algorithm_of(path: Path) -> Algorithm:
    return Algorithm.from_identifier(json.loads((path / "meta.json").read_bytes())["algorithm"])


def theirs(cfsctl: str, path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(cfsctl, "--repo", path, "fsck", "--json", *options).out)
    return found


def ours(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    code = tool.main(["fsck", str(path), "--json", *options])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (code == 0) is report["ok"]
    return report


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its findings in a form that must be the same in both."""
    found: Counter[tuple[str, ...]] = Counter()
    for text in report["errors"]:
        prefix, kind, path, *rest = text.split(": ")
        assert prefix == "fsck"
        if kind == "object-check-failed":
            rest = rest[:1]
        elif kind not in EXACT:
            rest = []
        found[kind, path, *rest] += 1
    return report | {"errors": found}


def compare(cfsctl: str, capsys: pytest.CaptureFixture[str], path: Path) -> Counter[str]:
    """Compare both checks of ``path``; the findings by kind."""
    for options in (["--metadata-only"], []):
        mine = ours(capsys, path, *options)
        assert comparable(mine) == comparable(theirs(cfsctl, path, *options))
        assert list(mine) == list(theirs(cfsctl, path, *options)), "the keys, in order"
    text = run(cfsctl, "--repo", path, "fsck", check=False)
    tool.main(["fsck", str(path)])
    out = capsys.readouterr().out
    assert out.partition("status:")[0] == text.out.partition("status:")[0]
    assert len(out.splitlines()) == len(text.out.splitlines())
    return Counter(finding.split(": ")[1] for finding in mine["errors"])


def test_nothing_wrong(cfsctl: str, capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    assert not compare(cfsctl, capsys, repository)
    assert tool.main(["fsck", str(repository)]) == 0
    assert capsys.readouterr().out == run(cfsctl, "--repo", repository, "fsck").out


# --- the ways ---------------------------------------------------------------------------------------------


def flip(file: Path, at: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def bind(path: Path) -> None:
    """A socket. Its path may be too long for one, so it is made elsewhere."""
    place = Path("/proc/self/cwd") / f"s{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
    os.rename(place, path)


def other_object(path: Path, name: str, content: bytes = b"x") -> None:
    file = path / "objects" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def link_stream(path: Path, name: str, data: bytes) -> None:
    """A stream of any bytes: its object is as it should be."""
    id_ = digest(algorithm_of(path), data)
    other_object(path, id_.pathname, data)
    os.symlink(f"../objects/{id_.pathname}", path / "streams" / name)


def link_image(path: Path, data: bytes) -> None:
    id_ = digest(algorithm_of(path), data)
    other_object(path, id_.pathname, data)
    os.symlink(f"../objects/{id_.pathname}", path / "images" / id_.hex())


def patched_stream(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(streams(path, "config")[0].read_bytes())
    raw[at : at + len(data)] = data
    link_stream(path, f"patched-{at}", bytes(raw))


def stream_with_names(path: Path, names: dict[str, ObjectId], refs: list[ObjectId]) -> None:
    with Repository.open(path) as repository, repository.new_stream(ContentType.BLOB) as writer:
        for name, id_ in names.items():
            writer.named_ref(name, id_)
        for id_ in refs:
            writer.external(id_, 100)
        repository.write_stream("of-mine", writer)


def nowhere(path: Path, count: int = 1) -> list[ObjectId]:
    size = algorithm_of(path).digest_size
    return [ObjectId(bytes([number] * size)) for number in range(1, count + 1)]


def other_hash(path: Path) -> None:
    raw = bytearray(streams(path, "config")[0].read_bytes())
    raw[14] = 3 - raw[14]
    link_stream(path, "other-hash", bytes(raw))


def patched_image(path: Path, at: int, data: bytes) -> None:
    raw = bytearray((path / "images" / images(path)[0]).read_bytes())
    raw[at : at + len(data)] = data
    link_image(path, bytes(raw))


def rest_of(path: Path) -> str:
    return "a" * (algorithm_of(path).hex_length - 2)


Damage = Callable[[Path], object]
#: Damages by name, each with findings of which at least these kinds must be among them (none: no finding).
WAYS: dict[str, tuple[Damage, set[str]]] = {
    "bit": (lambda p: flip(files(p)[0]), {"object-digest-mismatch"}),
    "bit in a large object": (lambda p: flip(files(p)[-1], 300_000), {"object-digest-mismatch"}),
    "object cut short": (lambda p: os.truncate(files(p)[2], 50_000), {"object-digest-mismatch"}),
    "object emptied": (lambda p: os.truncate(files(p)[1], 0), {"object-digest-mismatch"}),
    "object grown": (lambda p: os.truncate(files(p)[1], 1_000_000), {"object-digest-mismatch"}),
    "object missing": (lambda p: files(p)[1].unlink(), {"missing-object-ref", "image-missing-object"}),
    "directory of objects missing": (
        lambda p: shutil.rmtree(files(p)[1].parent),
        {"missing-object-ref", "image-missing-object"},
    ),
    "all objects missing": (lambda p: shutil.rmtree(p / "objects"), {"broken-symlink"}),
    "object is a directory": (lambda p: replace(files(p)[0], Path.mkdir), {"object-verity-failed"}),
    "object is a socket": (lambda p: replace(files(p)[0], bind), {"object-open-failed"}),
    "object is a dangling link": (
        lambda p: replace(files(p)[0], lambda q: os.symlink("nowhere", q)),
        {"object-open-failed", "missing-object-ref"},
    ),
    "object is a loop": (
        lambda p: replace(files(p)[0], lambda q: os.symlink(q.name, q)),
        {"object-open-failed", "object-check-failed"},
    ),
    "object is a link": (
        lambda p: (os.rename(files(p)[0], p / "objects/moved"), os.symlink("../moved", p / missing_file(p))),
        set(),
    ),
    "object is another": (
        lambda p: (
            files(p)[0].unlink(),
            os.symlink(f"../../{files(p)[0].relative_to(p)}", p / missing_file(p)),
        ),
        {"object-digest-mismatch"},
    ),
    "name too short": (lambda p: other_object(p, "00/" + rest_of(p)[1:]), {"object-invalid-name"}),
    "name too long": (lambda p: other_object(p, "00/" + rest_of(p) + "0"), {"object-invalid-name"}),
    "name no hex": (lambda p: other_object(p, "00/" + rest_of(p)[:-1] + "g"), {"object-invalid-name"}),
    "name not UTF-8": (
        lambda p: other_object(p, os.fsdecode(b"00/\xff" + b"a" * 61)),
        {"object-invalid-name"},
    ),
    "name with a line break": (lambda p: other_object(p, "00/a b"), {"object-invalid-name"}),
    "name in capitals": (
        lambda p: os.rename(files(p)[0], files(p)[0].parent / files(p)[0].name.upper()),
        {"missing-object-ref"},
    ),
    "wrong content": (lambda p: other_object(p, "00/" + rest_of(p)), {"object-digest-mismatch"}),
    "wrong content, in capitals": (
        lambda p: other_object(p, "00/" + rest_of(p).upper()),
        {"object-digest-mismatch"},
    ),
    "empty object of the wrong name": (
        lambda p: other_object(p, "fF/".lower() + rest_of(p), b""),
        {"object-digest-mismatch"},
    ),
    "strange directories of objects": (
        lambda p: [other_object(p, f"{name}/x") for name in ("gg", "0", "000", "AA")],
        set(),
    ),
    "left-over of a crash": (lambda p: (p / "objects/.tmp-object-abcdefghijkl").touch(), set()),
    "stream is a file": (lambda p: (p / "streams/file").touch(), {"entry-not-symlink"}),
    "stream is a directory": (lambda p: (p / "streams/directory").mkdir(), {"entry-not-symlink"}),
    "stream is a fifo": (lambda p: os.mkfifo(p / "streams/fifo"), {"entry-not-symlink"}),
    "stream dangles": (lambda p: os.symlink("../objects/00/00", p / "streams/x"), {"broken-symlink"}),
    "stream is a loop": (lambda p: os.symlink("x", p / "streams/x"), {"stat-failed"}),
    "stream beyond a file": (lambda p: os.symlink("../meta.json/x", p / "streams/x"), {"stat-failed"}),
    "stream leads to a directory": (
        lambda p: os.symlink("../objects", p / "streams/x"),
        {"stream-open-failed"},
    ),
    "stream leads to something else": (
        lambda p: os.symlink("../meta.json", p / "streams/x"),
        {"stream-open-failed"},
    ),
    "stream leads to a stream": (
        lambda p: os.symlink(streams(p, "config")[0].name, p / "streams/x"),
        set(),
    ),
    "stream not UTF-8": (
        lambda p: os.symlink(os.readlink(streams(p, "config")[0]), os.fsencode(p) + b"/streams/\xffx"),
        {"stream-open-failed"},
    ),
    "stream emptied": (lambda p: link_stream(p, "empty", b""), {"stream-open-failed"}),
    "stream of 32 bytes": (
        lambda p: link_stream(p, "short", streams(p, "config")[0].read_bytes()[:32]),
        {"stream-open-failed"},
    ),
    "layer missing": (
        lambda p: streams(p, "layer")[0].resolve().unlink(),
        {"broken-symlink", "missing-named-ref"},
    ),
    "config missing": (
        lambda p: streams(p, "config")[0].resolve().unlink(),
        {"broken-symlink", "missing-named-ref"},
    ),
    "manifest missing": (lambda p: streams(p, "manifest")[0].resolve().unlink(), {"broken-symlink"}),
    "magic": (lambda p: patched_stream(p, 0, b"T"), {"stream-open-failed"}),
    "version": (lambda p: patched_stream(p, 11, b"\1"), {"stream-open-failed"}),
    "flags": (lambda p: patched_stream(p, 12, b"\1\1"), set()),
    "hash of a stream": (other_hash, {"stream-open-failed"}),
    "block size": (lambda p: patched_stream(p, 15, b"\x0d"), {"stream-open-failed"}),
    "info backwards": (lambda p: patched_stream(p, 24, bytes(8)), {"stream-open-failed"}),
    "info outside": (lambda p: patched_stream(p, 24, b"\xff\xff"), {"stream-open-failed"}),
    "stream references outside": (lambda p: patched_stream(p, 40, b"\xff\xff"), {"stream-open-failed"}),
    "object references cut": (
        lambda p: patched_stream(p, 48, struct.pack("<QQ", 112, 113)),
        {"stream-open-failed"},
    ),
    "names not compressed": (
        lambda p: patched_stream(p, 80, struct.pack("<QQ", 112, 130)),
        {"stream-open-failed"},
    ),
    "content type": (lambda p: patched_stream(p, 96, b"whatever"), set()),
    "size of a stream": (lambda p: patched_stream(p, 104, b"\xff" * 8), set()),
    "references to nowhere": (
        lambda p: stream_with_names(p, {}, nowhere(p, 3)),
        {"missing-object-ref"},
    ),
    "names of nothing": (
        lambda p: stream_with_names(p, dict(zip("abc", nowhere(p, 3), strict=True)), []),
        {"missing-named-ref"},
    ),
    "names for one nothing": (
        lambda p: stream_with_names(p, dict.fromkeys(("a", "b:c", "d e"), nowhere(p)[0]), nowhere(p)),
        {"missing-named-ref", "missing-object-ref"},
    ),
    "dangling tag": (lambda p: os.symlink("../../nothing", p / "streams/refs/oci/x"), {"broken-symlink"}),
    "looping tag": (lambda p: os.symlink("x", p / "streams/refs/oci/x"), {"stat-failed"}),
    "tag to anything": (lambda p: os.symlink("../../../meta.json", p / "streams/refs/oci/x"), set()),
    "files among tags": (
        lambda p: [(p / "streams/refs/x").touch(), os.mkfifo(p / "streams/refs/oci/y")],
        {"unexpected-file-type"},
    ),
    "other files among tags": (
        lambda p: [
            bind(p / "images/refs/some/x"),
            os.mknod(p / "images/refs/null", 0o20600, os.makedev(1, 3)),
        ],
        {"unexpected-file-type"},
    ),
    "deep references": (
        lambda p: (
            os.makedirs(p / "streams/refs/a/b/c/d/e"),
            os.symlink("nothing", p / "streams/refs/a/b/c/d/e/f"),
            os.makedirs(p / "images/refs/empty/of/all"),
        ),
        {"broken-symlink"},
    ),
    "no references": (
        lambda p: (shutil.rmtree(p / "streams/refs"), shutil.rmtree(p / "images/refs")),
        set(),
    ),
    "no streams": (lambda p: shutil.rmtree(p / "streams"), set()),
    "no images": (lambda p: shutil.rmtree(p / "images"), set()),
    "image missing": (
        lambda p: (p / "images" / images(p)[0]).resolve().unlink(),
        {"broken-symlink", "missing-named-ref"},
    ),
    "image is a file": (lambda p: (p / "images/file").touch(), {"entry-not-symlink"}),
    "image dangles": (lambda p: os.symlink("../objects/00/00", p / "images/x"), {"broken-symlink"}),
    "image is a loop": (lambda p: os.symlink("x", p / "images/x"), {"stat-failed"}),
    "image leads to a directory": (lambda p: os.symlink("../streams", p / "images/x"), {"image-read-failed"}),
    "image leads to a socket": (
        lambda p: (bind(p / "socket"), os.symlink("../socket", p / "images/x")),
        {"image-open-failed"},
    ),
    "image leads to something else": (
        lambda p: os.symlink("../meta.json", p / "images/x"),
        {"image-invalid"},
    ),
    "image of any name": (
        lambda p: os.symlink(os.readlink(p / "images" / images(p)[0]), p / "images/any"),
        set(),
    ),
    "image emptied": (lambda p: link_image(p, b""), {"image-invalid"}),
    "image cut short": (
        lambda p: link_image(p, (p / "images" / images(p)[0]).read_bytes()[:2000]),
        {"image-invalid"},
    ),
    "composefs header": (lambda p: patched_image(p, 0, b"\xff"), {"image-invalid"}),
    "superblock": (lambda p: patched_image(p, 1024, b"\xff"), {"image-invalid"}),
    "root": (lambda p: patched_image(p, 1024 + 14, b"\xff\xff"), {"image-invalid"}),
    "image unlike its name": (
        lambda p: flip((p / "images" / images(p)[0]).resolve(), 1024),
        {"image-invalid", "object-digest-mismatch"},
    ),
}


def missing_file(path: Path) -> str:
    """The path of the object that is referred to and not there."""
    with Repository.open(path) as repository:
        for name in repository.streams():
            with repository.open_stream(name) as stream:
                for id_ in stream.object_refs:
                    if not repository.has_object(id_):
                        return f"objects/{id_.pathname}"
    raise AssertionError


@pytest.fixture(autouse=True)
def short_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_one_damage(cfsctl: str, capsys: pytest.CaptureFixture[str], repository: Path, way: str) -> None:
    damage, expected = WAYS[way]
    damage(repository)
    found = compare(cfsctl, capsys, repository)
    assert expected <= set(found)
    assert bool(expected) is bool(found)


@pytest.mark.parametrize("seed", range(15))
def test_many_damages(cfsctl: str, capsys: pytest.CaptureFixture[str], repository: Path, seed: int) -> None:
    rng = random.Random(seed)
    done = 0
    for way in rng.sample(sorted(WAYS), 12):
        try:
            WAYS[way][0](repository)
        except (OSError, IndexError, AssertionError):
            continue  # what it damages has been removed by another
        done += 1
    assert done > 3
    assert compare(cfsctl, capsys, repository)


#: Damages at which cfsctl 0.9.4 panics, waits for ever, or looks outside of the repository.
DIFFERENCES: dict[str, tuple[Damage, Counter[str]]] = {
    "a range without end": (
        lambda p: patched_stream(p, 24, b"\xff" * 8),
        Counter({"stream-open-failed": 1}),
    ),
    "object is a fifo": (
        lambda p: replace(files(p)[0], os.mkfifo),
        Counter({"object-verity-failed": 1}),
    ),
    "object is a device without end": (
        lambda p: replace(files(p)[0], lambda q: os.mknod(q, 0o20600, os.makedev(1, 5))),
        Counter({"object-verity-failed": 1}),
    ),
    "stream leads to a fifo": (
        lambda p: (os.mkfifo(p / "fifo"), os.symlink("../fifo", p / "streams/x")),
        Counter({"stream-open-failed": 1}),
    ),
    "image leads to a fifo": (
        lambda p: (os.mkfifo(p / "fifo"), os.symlink("../fifo", p / "images/x")),
        Counter({"image-read-failed": 1}),
    ),
    "stream leads out": (
        lambda p: os.symlink(streams(p, "config")[0].resolve(), p / "streams/x"),
        Counter({"broken-symlink": 1}),
    ),
    "image leads out": (lambda p: os.symlink("/dev/zero", p / "images/x"), Counter({"broken-symlink": 1})),
    "tag leads out": (
        lambda p: os.symlink("/etc/passwd", p / "streams/refs/x"),
        Counter({"broken-symlink": 1}),
    ),
    # The chunks are not read, but where they are said to be, there must be something.
    "chunks outside": (
        lambda p: patched_stream(p, 72, b"\xff\xff"),
        Counter({"stream-open-failed": 1}),
    ),
}


@pytest.mark.parametrize("way", DIFFERENCES)
def test_damage_that_cfsctl_does_not_take(
    capsys: pytest.CaptureFixture[str], repository: Path, way: str
) -> None:
    damage, expected = DIFFERENCES[way]
    damage(repository)
    assert Counter(text.split(": ")[1] for text in ours(capsys, repository)["errors"]) == expected


def test_a_line_for_each_finding(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    """Names cannot forge a report, nor reach the terminal."""
    other_object(repository, "00/x\n  - fsck: nothing\x1b[2J")
    os.symlink("nowhere", repository / "streams/\r\u2028x")
    assert tool.main(["fsck", str(repository)]) != 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 8
    assert out.isascii()
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize("directory", ["objects/00", "streams", "images", "streams/refs", "images/refs"])
def test_what_should_be_a_directory_is_none(
    cfsctl: str, capsys: pytest.CaptureFixture[str], repository: Path, directory: str
) -> None:
    """Only this ends a check: neither program reports anything."""
    shutil.rmtree(repository / directory, ignore_errors=True)
    (repository / directory).touch()
    assert run(cfsctl, "--repo", repository, "fsck", "--json", check=False).code != 0
    assert tool.main(["fsck", str(repository), "--json"]) != 0
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    assert f"cannot {'open' if directory == 'objects/00' else 'list'} {directory}" in shown.err


@pytest.mark.parametrize("text", [b"", b"{", b'{"version": 2, "algorithm": "fsverity-sha256-12"}', None])
def test_metadata_that_keeps_one_out(
    cfsctl: str, capsys: pytest.CaptureFixture[str], repository: Path, text: bytes | None
) -> None:
    (repository / "meta.json").unlink()
    if text is not None:
        (repository / "meta.json").write_bytes(text)
    assert run(cfsctl, "--repo", repository, "--no-upgrade", "fsck", check=False).code != 0
    assert tool.main(["fsck", str(repository)]) != 0
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("fsck: ")
    assert (repository / "meta.json").exists() is (text is not None), "a check changes nothing"
