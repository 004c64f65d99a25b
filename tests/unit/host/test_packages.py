"""Package databases of images."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

import pytest

from hostimaged.boot.files import DirectoryFiles
from hostimaged.errors import UnsupportedImage
from hostimaged.host import packages
from hostimaged.host.packages import read_packages

STATUS = """Package: bash
Status: install ok installed
Architecture: amd64
Version: 5.2-1
Description: a shell
 Version: 9 is not the version

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: libc6
Status: hold ok installed
Architecture: i386
Multi-Arch: same
Version: 2.41-1
"""


def header(**values: str | int) -> bytes:
    """A package's header as rpm stores it."""
    tags = {"name": 1000, "version": 1001, "release": 1002, "epoch": 1003, "arch": 1022}
    index, data = b"", b""
    for key, value in values.items():
        if isinstance(value, int):
            data += b"\0" * (-len(data) % 4)
            index += struct.pack(">IIII", tags[key], 4, len(data), 1)
            data += struct.pack(">I", value)
        else:
            index += struct.pack(">IIII", tags[key], 6, len(data), 1)
            data += value.encode() + b"\0"
    return struct.pack(">II", len(values), len(data)) + index + data


def rpm(root: Path, *blobs: object, path: str = "usr/lib/sysimage/rpm/rpmdb.sqlite") -> None:
    file = root / path
    file.parent.mkdir(parents=True)
    database = sqlite3.connect(file)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)")
    database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(blob,) for blob in blobs])
    database.commit()
    database.close()


def test_dpkg(tmp_path: Path) -> None:
    assert read_packages(DirectoryFiles(tmp_path)) == {}
    file = tmp_path / "var/lib/dpkg/status"
    file.parent.mkdir(parents=True)
    file.write_text(STATUS)
    assert read_packages(DirectoryFiles(tmp_path)) == {
        "bash:amd64": frozenset({"5.2-1"}),
        "libc6:i386": frozenset({"2.41-1"}),
    }


def test_rpm(tmp_path: Path) -> None:
    rpm(
        tmp_path,
        header(name="bash", version="5.2", release="1.fc43", arch="x86_64"),
        header(name="kernel", version="6.1", release="1", arch="x86_64"),
        header(name="kernel", version="6.2", release="1", arch="x86_64"),
        header(name="perl", version="5", release="2", epoch=4, arch="noarch"),
        header(name="gpg-pubkey", version="a", release="b"),
        b"short",
        b"\xff" * 100,
        header(version="1"),
        "text",
    )
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert read_packages(DirectoryFiles(tmp_path)) == {
        "bash.x86_64": frozenset({"5.2-1.fc43"}),
        "kernel.x86_64": frozenset({"6.1-1", "6.2-1"}),
        "perl.noarch": frozenset({"4:5-2"}),
        "gpg-pubkey": frozenset({"a-b"}),
    }
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + b"\xff" * 5000, b"junk" * 100])
def test_a_database_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "usr/share/rpm/rpmdb.sqlite"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UnsupportedImage, match="cannot be read"):
        read_packages(DirectoryFiles(tmp_path))


def test_a_database_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_MAX_STEPS", 10)
    file = tmp_path / "var/lib/rpm/rpmdb.sqlite"
    file.parent.mkdir(parents=True)
    database = sqlite3.connect(file)
    database.execute(
        "CREATE VIEW Packages AS WITH RECURSIVE n(blob) AS (SELECT 1 UNION ALL SELECT blob + 1 FROM n)"
        " SELECT blob FROM n"
    )
    database.close()
    with pytest.raises(UnsupportedImage, match="interrupted"):
        read_packages(DirectoryFiles(tmp_path))


def test_more_packages_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_PACKAGES", 2)
    rpm(tmp_path, *(header(name=name, version="1", release="1") for name in "abc"))
    with pytest.raises(UnsupportedImage, match="more than 2"):
        read_packages(DirectoryFiles(tmp_path))
