"""``python -m hostimaged.composefs``: what it prints, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_testing.processes import python_environment
from hostimaged.composefs.__main__ import main
from hostimaged.composefs.dumpfile import parse
from hostimaged.composefs.erofs import Format, build
from hostimaged.composefs.fsverity import Algorithm, digest
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.splitstream import ContentType

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512


def dump_text(algorithm: Algorithm) -> bytes:
    lines = [b"/ 0 40755 2 0 0 0 1000.0 - - -\n"]
    for name in (b"b", b"a"):
        object_id = digest(algorithm, name)
        line = f" 7 100644 1 0 0 0 1000.0 {object_id.pathname} - {object_id.hex()}\n"
        lines.insert(1, b"/" + name + line.encode())
    return b"".join(lines)


@pytest.fixture
def dumpfile(tmp_path: Path) -> Path:
    path = tmp_path / "tree.dump"
    path.write_bytes(dump_text(SHA256))
    return path


def run(capfdbinary: pytest.CaptureFixture[bytes], *argv: str | Path) -> tuple[int, bytes, str]:
    code = main([str(arg) for arg in argv])
    out, err = capfdbinary.readouterr()
    return code, out, err.decode()


def test_digest(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 3000
    path.write_bytes(data)
    expected = digest(SHA256, data).hex().encode() + b"\n"
    assert run(capfdbinary, "digest", path) == (0, expected, "")
    expected = digest(SHA512, data).hex().encode() + b"\n"
    assert run(capfdbinary, "digest", "--algorithm", "sha512", path) == (0, expected, "")


@pytest.mark.parametrize("image_format", list(Format), ids=lambda f: f.label)
@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
def test_mkfs_dump_objects(
    tmp_path: Path, image_format: Format, algorithm: Algorithm, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = dump_text(algorithm)
    source, image = tmp_path / "tree.dump", tmp_path / "image"
    source.write_bytes(text)
    code, out, err = run(
        capfdbinary, "mkfs", "--format", image_format.label, "--algorithm", algorithm.label, source, image
    )
    expected = build(parse(text, algorithm), image_format, algorithm)
    assert (code, err) == (0, "")
    assert out.decode() == digest(algorithm, expected).hex() + "\n"
    assert image.read_bytes() == expected
    assert run(capfdbinary, "dump", image) == (0, text, "")
    assert run(capfdbinary, "dump", "--algorithm", algorithm.label, image) == (0, text, "")
    paths = sorted(digest(algorithm, name).pathname for name in (b"a", b"b"))
    assert run(capfdbinary, "objects", image) == (0, "".join(p + "\n" for p in paths).encode(), "")


def test_mkfs_makes_v1_with_sha256_by_default(
    dumpfile: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    code, out, err = run(capfdbinary, "mkfs", dumpfile, "-")
    assert code == 0
    assert out == build(parse(dumpfile.read_bytes(), SHA256), Format.V1, SHA256)
    assert err == digest(SHA256, out).hex() + "\n"


def tool(*argv: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "hostimaged.composefs", *map(str, argv)]
    return subprocess.run(
        command, input=data, capture_output=True, timeout=60, check=False, env=python_environment()
    )


def test_standard_input_and_output() -> None:
    made = tool("mkfs", "-", "-", data=dump_text(SHA256))
    assert made.returncode == 0, made.stderr
    assert tool("dump", "-", data=made.stdout).stdout == dump_text(SHA256)
    assert tool("digest", "-", data=made.stdout).stdout == made.stderr


def test_reader_that_leaves_early() -> None:
    lines = [b"/ 0 40755 2 0 0 0 0.0 - - -\n"]
    lines += [b"/%05d 0 100644 1 0 0 0 0.0 - - -\n" % i for i in range(10_000)]
    image = build(parse(lines, SHA256), Format.V2, SHA256)
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "hostimaged.composefs", "dump", "-"],
            input=image,
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            env=python_environment(),
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_errors_name_the_file_and_have_codes(
    dumpfile: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def failed(*argv: str | Path) -> tuple[int, str]:
        code, out, err = run(capfdbinary, *argv)
        assert out == b""
        assert err.count("\n") == 1
        return code, err

    missing = tmp_path / "missing"
    assert failed("digest", missing) == (1, f"digest: cannot read {missing}: No such file or directory\n")
    assert failed("dump", tmp_path) == (1, f"dump: cannot read {tmp_path}: Is a directory\n")
    assert failed("mkfs", dumpfile, missing / "x")[0] == 1
    assert failed("dump", dumpfile) == (26, f"dump: {dumpfile} is too short for a composefs image\n")
    code, err = failed("mkfs", "--algorithm", "sha512", dumpfile, tmp_path / "x")
    assert (code, err.startswith(f"mkfs: {dumpfile}, line 2: ")) == (2, True)
    dumpfile.write_text("/ 0 40755 2 0 0 0 0.0 - - -\n/d 0 20755 1 0 0 4294967296 0.0 - - -\n")
    assert failed("mkfs", dumpfile, tmp_path / "x")[0] == 30
    assert not (tmp_path / "x").exists()


def test_wrong_usage(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for argv in ([], ["unknown"], ["digest"], ["mkfs", "a", "b", "--format", "v3"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    capfdbinary.readouterr()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a stream that has inline and external parts, and a reference to it."""
    path = tmp_path / "repository"
    made, _ = Repository.init(path, verity=Verity.OPPORTUNISTIC)
    with made:
        stored = made.store_object(b"x" * 100_000)
        with made.new_stream(ContentType.BLOB) as writer:
            writer.inline(b"before ")
            writer.external(stored.id, 100_000)
            writer.inline(b" after")
            made.write_stream("some-stream", writer, ref="some/ref")
        with made.new_stream(ContentType.BLOB) as writer:
            writer.inline(b"all inline")
            made.write_stream("inline-stream", writer)
    return path


def test_cat_stream(repository: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    expected = b"before " + b"x" * 100_000 + b" after"
    assert run(capfdbinary, "cat-stream", "--repo", repository, "some-stream") == (0, expected, "")
    assert run(capfdbinary, "cat-stream", "--repo", repository, "refs/some/ref") == (0, expected, "")
    code, out, err = run(capfdbinary, "cat-stream", "--repo", repository, "other-stream")
    assert (code, out, "other-stream" in err) == (22, b"", True)


def test_cat_stream_of_a_file(repository: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    argv = ["cat-stream", "--algorithm", "sha512"]
    assert run(capfdbinary, *argv, repository / "streams/inline-stream") == (0, b"all inline", "")
    code, out, err = run(capfdbinary, *argv, repository / "streams/some-stream")
    assert (code, out) == (2, b"before ")
    assert "--repo" in err
    assert tool(*argv, "-", data=(repository / "streams/inline-stream").read_bytes()).stdout == b"all inline"
