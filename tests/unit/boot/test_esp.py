"""Finding the EFI system partition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostimaged.boot import esp
from hostimaged.boot.esp import EspDevice, esp_of, find_esp, mount_at, mount_below, mount_of, parse_mountinfo
from hostimaged.errors import BootLoaderError, ProgramMissing

TABLE = rb"""
22 1 0:20 / / ro,relatime shared:1 - overlay composefs:aaaa ro,lowerdir=x
30 22 259:3 / /sysroot ro,relatime shared:2 - ext4 /dev/nvme0n1p3 rw
31 22 259:3 /state/os/default/var /var rw - ext4 /dev/nvme0n1p3 rw
32 22 259:1 / /efi\040x rw shared:9 master:3 - vfat /dev/nvme0n1p1 rw,fmask=0177
33 22 259:1 / /boot/efi ro - vfat /dev/nvme0n1p1 rw
34 22 0:99 / /covered rw - tmpfs tmpfs rw
35 22 259:9 / /covered rw - ext4 /dev/x rw
not a line
36 22 x:y / /z rw - ext4 /dev/x rw
"""


def part(path: str, number: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "maj:min": number, "type": "part", "parttype": None, "pttype": "gpt"} | more


ESP = part("/dev/vda1", "252:1", parttype="C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
ROOT = part("/dev/vda2", "252:2", parttype="4f68bce3-e8cd-4db1-96e7-fbcaf984b709")


def disk(*children: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"path": "/dev/vda", "maj:min": "252:0", "type": "disk", "parttype": None, "pttype": "gpt"}
    return {"blockdevices": [own | {"children": list(children)} | more]}


def test_the_table_of_mounts() -> None:
    mounts = parse_mountinfo(TABLE)
    assert len(mounts) == 7
    efi = mount_at(mounts, b"/efi x")
    assert efi is not None
    assert (efi.device, efi.filesystem, efi.source, efi.read_only) == (
        (259, 1),
        "vfat",
        "/dev/nvme0n1p1",
        False,
    )
    root = mount_at(mounts, b"/")
    assert root is not None
    assert (root.source, root.read_only) == ("composefs:aaaa", True)
    assert mount_at(mounts, b"/no") is None


def test_a_mount_of_the_whole_partition_is_found() -> None:
    mounts = parse_mountinfo(TABLE)
    assert mount_of(mounts, (259, 1)) is mount_at(mounts, b"/efi x"), "the writable one"
    assert mount_of(mounts, (259, 3)) is mount_at(mounts, b"/sysroot")
    assert mount_of(mounts, (0, 99)) is None, "covered"
    assert mount_of(mounts, (8, 1)) is None


def test_what_a_path_lies_on() -> None:
    mounts = parse_mountinfo(TABLE)
    for path, point in {"/sysroot/state": b"/sysroot", "/sysroot": b"/sysroot", "/sysroots": b"/"}.items():
        found = mount_below(mounts, Path(path))
        assert found is not None
        assert found.point == point
    assert mount_below([], Path("/")) is None


def test_the_partition_by_its_type() -> None:
    assert esp_of(disk(ROOT, ESP)) == EspDevice("/dev/vda1", (252, 1))
    assert esp_of(disk(ROOT)) is None
    for kind, found in {"0xef": True, "0x6": True, "ef": True, "0x83": False, "zz": False}.items():
        mbr = part("/dev/vda1", "252:1", pttype="dos", parttype=kind)
        assert (esp_of(disk(mbr)) is not None) is found, kind
    in_gpt = part("/dev/vda1", "252:1", parttype="0xef")
    assert esp_of(disk(in_gpt)) is None


def test_within_a_firmware_raid() -> None:
    raid = {
        "path": "/dev/md126",
        "maj:min": "9:126",
        "type": "raid1",
        "pttype": "gpt",
        "children": [ROOT, ESP],
    }
    assert esp_of(disk(raid)) == EspDevice("/dev/vda1", (252, 1))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"blockdevices": None},
        {"blockdevices": [5, {"children": 7}]},
        {"blockdevices": [ESP | {"path": 5}]},
        {"blockdevices": [ESP | {"maj:min": "x"}]},
        {"blockdevices": [ESP | {"parttype": ["x"]}]},
    ],
)
def test_output_of_another_form(document: dict[str, Any]) -> None:
    assert esp_of(document) is None
    assert esp.whole_disks(document) == []


def test_output_that_is_none() -> None:
    for data in (b"", b"[]", b"[" * 100_000, b'{"a":', b"\xff"):
        with pytest.raises(BootLoaderError, match="lsblk"):
            esp.parse_lsblk(data)


def fake_lsblk(directory: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name which answers by its last argument, and fails for others."""
    for name, answer in answers.items():
        (directory / name.replace("/", "_")).write_text(json.dumps(answer))
    program = directory / "lsblk"
    program.write_text(
        "#!/bin/sh\n"
        "for last; do :; done\n"
        f'cat "{directory}/$(echo "$last" | tr / _)" || {{ echo no such device >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_the_disks_below_the_physical_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upwards = {
        "blockdevices": [
            {"path": "/dev/mapper/root", "type": "crypt", "children": [
                {"path": "/dev/vdb2", "type": "part", "children": [{"path": "/dev/vdb", "type": "disk"}]},
                {"path": "/dev/vda2", "type": "part", "children": [{"path": "/dev/vda", "type": "disk"}]},
            ]},
        ]
    }  # fmt: skip
    answers = {
        "/dev/mapper/root": upwards,
        "/dev/vdb": disk(ROOT),
        "/dev/vda": disk(ESP),
        "/dev/block/8:1": {"blockdevices": [{"path": "/dev/vdb", "type": "disk"}]},
    }
    fake_lsblk(tmp_path, answers, monkeypatch)
    crypt = parse_mountinfo(b"1 0 253:0 / /sysroot rw - xfs /dev/mapper/root rw")
    assert find_esp(crypt, Path("/sysroot")) == EspDevice("/dev/vda1", (252, 1))
    with pytest.raises(BootLoaderError, match="no EFI system partition"):
        find_esp(parse_mountinfo(b"1 0 8:1 / / rw - xfs root rw"), Path("/sysroot"))
    with pytest.raises(BootLoaderError, match="no such device"):
        find_esp(parse_mountinfo(b"1 0 8:2 / / rw - xfs root rw"), Path("/sysroot"))
    with pytest.raises(BootLoaderError, match="mounted"):
        find_esp([], Path("/sysroot"))


def test_without_lsblk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match="lsblk"):
        find_esp(parse_mountinfo(b"1 0 8:1 / / rw - xfs root rw"), Path("/sysroot"))
