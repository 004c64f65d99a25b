"""The check of a repository where other programs are no judge: fs-verity, helpers, bounds, cancelling."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hostimaged.composefs import fsck, fsck_objects, fsck_report, fsverity
from hostimaged.composefs.fsck_objects import ObjectCheck, Tally
from hostimaged.composefs.fsck_report import Finding, Findings, Kind, Report
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.errors import Cancelled, StorageError
from hostimaged.system import syscalls

SHA256 = Algorithm.SHA256
CONTENTS = [b"%d " % number * 3000 for number in range(40)]


def made(path: Path) -> Path:
    with Repository.init(path, algorithm=SHA256, verity=Verity.OPPORTUNISTIC)[0] as repository:
        for content in CONTENTS:
            repository.store_object(content)
    return path


def object_file(path: Path, number: int) -> Path:
    return path / "objects" / fsverity.digest(SHA256, CONTENTS[number]).pathname


def checked(path: Path, **options: Any) -> Report:
    with Repository.open(path) as repository:
        return fsck.check(repository, **options)


def kinds(report: Report) -> Counter[str]:
    return Counter(str(finding.kind) for finding in report.errors)


# --- fs-verity ----------------------------------------------------------------------------------------------


class Kernel:
    """Measures what it is told to; everything else has no fs-verity."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digests: dict[int, bytes | Exception] = {}
        monkeypatch.setattr(syscalls, "measure_verity", self.measure)

    def measure(self, fd: int, algorithm_id: int, digest_size: int) -> bytes:
        missing = syscalls.VerityMissing(errno.ENODATA, "No data available")
        found = self.digests.get(os.fstat(fd).st_ino, missing)
        if isinstance(found, Exception):
            raise found
        return found

    def enable(self, path: Path, found: bytes | Exception | None = None) -> None:
        if found is None:
            found = bytes.fromhex(path.parent.name + path.name)
        self.digests[path.stat().st_ino] = found


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(fsck_objects, "_WORTH", 60)  # helpers have the real kernel
    return Kernel(monkeypatch)


OTHER_HASH = ValueError("fs-verity digest of another hash")
UNSUPPORTED = syscalls.VerityUnsupported(errno.EOPNOTSUPP, "Operation not supported")


def test_secure(tmp_path: Path, kernel: Kernel) -> None:
    path = made(tmp_path / "composefs")
    kernel.enable(path / "meta.json", bytes(32))
    for number in range(len(CONTENTS)):
        kernel.enable(object_file(path, number))
    assert checked(path).ok
    # The kernel vouches for the content: reading will fail where it is damaged.
    object_file(path, 0).write_bytes(b"damaged")
    assert checked(path).ok
    kernel.enable(object_file(path, 1), bytes(32))
    kernel.enable(object_file(path, 2), OTHER_HASH)
    del kernel.digests[object_file(path, 3).stat().st_ino]
    report = checked(path)
    assert kinds(report) == {"object-digest-mismatch": 1, "object-verity-missing": 2}
    assert report.objects_corrupted == 3
    assert f"objects/{object_file(path, 1).parent.name}" in report.text()
    assert f"measured {'00' * 32}" in report.text()
    assert checked(path, metadata_only=True).ok


def test_what_the_kernel_does_not_give_out_is_damaged(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is what it was, and a block on the disk is not: that shows when it is read."""
    path = made(tmp_path / "composefs")
    kernel.enable(path / "meta.json", bytes(32))
    for number in range(len(CONTENTS)):
        kernel.enable(object_file(path, number))
    damaged = object_file(path, 5).stat().st_ino
    readv = os.readv

    def read(fd: int, buffers: list[bytearray]) -> int:
        if os.fstat(fd).st_ino == damaged:
            raise OSError(errno.EIO, "Input/output error")
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", read)
    report = checked(path)
    (finding,) = report.errors
    assert (finding.kind, finding.detail) == (Kind.OBJECT_VERITY_FAILED, "Input/output error")
    assert finding.path == f"objects/{fsverity.digest(SHA256, CONTENTS[5]).pathname}"


def test_secure_repository_on_a_file_system_without(tmp_path: Path, kernel: Kernel) -> None:
    path = made(tmp_path / "composefs")
    kernel.enable(path / "meta.json", bytes(32))
    for number in range(len(CONTENTS)):
        kernel.enable(object_file(path, number), UNSUPPORTED)
    assert kinds(checked(path)) == {"object-verity-missing": len(CONTENTS)}


def test_insecure(tmp_path: Path, kernel: Kernel) -> None:
    path = made(tmp_path / "composefs")
    kernel.enable(object_file(path, 0))
    object_file(path, 0).write_bytes(b"the kernel says that this is right")
    kernel.enable(object_file(path, 1), bytes(32))
    kernel.enable(object_file(path, 2), OTHER_HASH)
    object_file(path, 3).write_bytes(b"damaged")
    report = checked(path)
    assert kinds(report) == {"object-digest-mismatch": 2}
    found = fsverity.digest(SHA256, b"damaged").hex()
    assert {finding.detail for finding in report.errors} == {f"measured {'00' * 32}", f"measured {found}"}


def test_unsupported_is_asked_once(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "composefs")
    asked = []

    def measure(fd: int, algorithm_id: int, digest_size: int) -> bytes:
        asked.append(fd)
        raise UNSUPPORTED

    monkeypatch.setattr(syscalls, "measure_verity", measure)
    assert checked(path).ok
    assert len(asked) == 2  # meta.json, and an object


def test_unreadable_object(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "composefs")
    bad = object_file(path, 5).stat().st_ino
    real = os.readv

    def readv(fd: int, buffers: list[bytearray]) -> int:
        if os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers)

    monkeypatch.setattr(os, "readv", readv)
    report = checked(path)
    assert [finding.detail for finding in report.errors] == ["Input/output error"]
    assert kinds(report) == {"object-verity-failed": 1}


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 3 << 18])
@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_sizes(tmp_path: Path, algorithm: Algorithm, size: int) -> None:
    path = tmp_path / "composefs"
    with Repository.init(path, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0] as repository:
        repository.store_object(os.urandom(size))
    assert checked(path).ok


# --- helpers ------------------------------------------------------------------------------------------------


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Helpers are started at once; they are listed in the result."""
    monkeypatch.setattr(fsck_objects, "_WORTH", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return started


def damage(path: Path) -> None:
    for number in range(0, len(CONTENTS), 7):
        object_file(path, number).write_bytes(b"damaged")
    (path / "objects/07").mkdir(exist_ok=True)
    (path / "objects/07" / os.fsdecode(b"\xff\n")).touch()


def test_helpers_find_the_same(
    tmp_path: Path, helped: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "composefs")
    damage(path)
    with Repository.open(path) as repository:
        # Nothing is done here, but handing out and gathering.
        check = ObjectCheck(repository.fileno(), SHA256, secure=False)
        with check:
            check.begin()
            for _, thread in check._helpers:
                thread.join()
            tally = check.finish()
    assert len(helped) == 2
    assert all(process.returncode is not None for process in helped)
    monkeypatch.setattr(fsck_objects, "_WORTH", 60)
    alone = checked(path)
    assert len(helped) == 2
    assert (tally.checked, tally.corrupted) == (alone.objects_checked, alone.objects_corrupted) == (41, 7)
    assert list(tally.findings) == list(alone.errors)


def test_secure_helpers(tmp_path: Path, helped: list[subprocess.Popen[bytes]]) -> None:
    """They are told: on this file system no object has fs-verity."""
    path = made(tmp_path / "composefs")
    with Repository.open(path) as repository:
        check = ObjectCheck(repository.fileno(), SHA256, secure=True)
        with check:
            check.begin()
            tally = check.finish()
    assert tally.corrupted == len(CONTENTS)
    assert {finding.kind for finding in tally.findings} == {Kind.OBJECT_VERITY_MISSING}


def test_killed_helpers_cost_nothing(tmp_path: Path, helped: list[subprocess.Popen[bytes]]) -> None:
    path = made(tmp_path / "composefs")
    damage(path)
    with Repository.open(path) as repository:
        check = ObjectCheck(repository.fileno(), SHA256, secure=False)
        with check:
            check.begin()
            for process in helped:
                process.kill()
            tally = check.finish()
    assert (tally.checked, tally.corrupted) == (41, 7)


def test_helpers_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "composefs")
    monkeypatch.setattr(fsck_objects, "_WORTH", 0)

    def popen(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", popen)
    report = checked(path)
    assert (report.ok, report.objects_checked) == (True, 40)


def test_helpers_and_a_directory_that_is_none(tmp_path: Path, helped: list[subprocess.Popen[bytes]]) -> None:
    """Who meets it gives up; the error is ours to raise."""
    path = made(tmp_path / "composefs")
    free = next(byte for byte in range(256) if not (path / f"objects/{byte:02x}").exists())
    (path / f"objects/{free:02x}").touch()
    with pytest.raises(StorageError, match=f"cannot open objects/{free:02x} of the repository"):
        checked(path)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_cancelling(tmp_path: Path, helped: list[subprocess.Popen[bytes]], calls: int) -> None:
    path = made(tmp_path / "composefs")
    left = calls

    def give_up() -> None:
        nonlocal left
        if not left:
            raise Cancelled
        left -= 1

    with pytest.raises(Cancelled):
        checked(path, give_up=give_up)
    assert all(process.returncode is not None for process in helped)


# --- reports ------------------------------------------------------------------------------------------------


def test_tally_survives_the_pipe() -> None:
    tally = Tally(checked=5)
    tally.corrupt(Kind.OBJECT_INVALID_NAME, "objects/00/\ufffd\n\u2028", "no digest")
    tally.corrupt(Kind.OBJECT_VERITY_MISSING, "objects/00/ab")
    line = tally.encode()
    assert line.count(b"\n") == 1
    again = Tally.decode(line)
    assert (again.checked, again.corrupted, again.findings.count) == (5, 2, 2)
    assert list(again.findings) == list(tally.findings)


def test_findings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck_report, "MAX_FINDINGS", 3)
    findings = Findings()
    for number in range(5):
        findings.add("kind", f"path-{number}")
    more = Findings([Finding("other", "path", "detail")], 7)
    findings.extend(more)
    more.extend(findings)
    assert (findings.count, len(findings.kept)) == (12, 3)
    assert (more.count, len(more.kept)) == (19, 3)
    report = Report(has_metadata=True, objects_checked=12, objects_corrupted=12, errors=findings)
    assert report.text().splitlines()[-5:] == [
        "status: 12 error(s)",
        "  - fsck: kind: path-0",
        "  - fsck: kind: path-1",
        "  - fsck: kind: path-2",
        "  - fsck: 9 more",
    ]
    assert report.as_dict()["errors"][-1] == "fsck: 9 more"


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        (None, Kind.METADATA_PARSE_FAILED, "it was there a moment ago"),
        (b"{}", Kind.METADATA_PARSE_FAILED, "meta.json of the repository is malformed"),
        (
            b'{"version": 2, "algorithm": "fsverity-sha256-12"}',
            Kind.METADATA_ALGORITHM_MISMATCH,
            "expected fsverity-sha256-12, repository opened as sha256",
        ),
        (
            b'{"version": 1, "algorithm": "fsverity-sha512-12"}',
            Kind.METADATA_ALGORITHM_MISMATCH,
            "expected fsverity-sha512-12, repository opened as sha256",
        ),
    ],
)
def test_metadata_changed_since(tmp_path: Path, text: bytes | None, kind: Kind, detail: str) -> None:
    path = made(tmp_path / "composefs")
    with Repository.open(path) as repository:
        (path / "meta.json").unlink()
        if text is not None:
            (path / "meta.json").write_bytes(text)
        report = fsck.check(repository, metadata_only=True)
    [finding] = report.errors
    assert finding.kind == kind
    assert finding.detail.startswith(detail)
    assert report.has_metadata is (kind is Kind.METADATA_ALGORITHM_MISMATCH)
    assert report.text().startswith("meta.json: error\n")


def test_references_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the shared lock may remove them."""
    path = made(tmp_path / "composefs")
    (path / "streams/refs/a").mkdir(parents=True)
    (path / "streams/refs/a/b").symlink_to("nowhere")
    real = os.listdir

    def listdir(where: Any) -> list[str]:
        found = real(where)
        if found == ["b"]:
            (path / "streams/refs/a/b").unlink()
            (path / "streams/refs/a").rmdir()
        return found

    monkeypatch.setattr(os, "listdir", listdir)
    assert checked(path).ok
