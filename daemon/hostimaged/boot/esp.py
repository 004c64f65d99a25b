"""Finding the EFI system partition of a running host, and where it is mounted.

Nothing is mounted here. The block devices below the physical root are asked of ``lsblk``, which takes types
of partitions from udev's database or else from the disk. Parsing its output and the table of mounts are plain
functions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import BootLoaderError, from_os_error
from hostimaged.system.process import find_program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Type of an EFI system partition, in a GPT and in an MBR.
GPT_TYPE: Final = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
MBR_TYPES: Final = frozenset({0x06, 0xEF})

#: Bytes of ``lsblk``'s output; 100 devices have 100 KiB.
MAX_OUTPUT: Final = 16 << 20
#: Levels of devices upon devices.
MAX_DEPTH: Final = 32
#: Seconds for ``lsblk``, which reads sysfs and udev's database only.
TIMEOUT: Final = 30
#: Bytes of the table of mounts; the kernel allows 100,000 mounts.
MAX_TABLE: Final = 64 << 20

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_COLUMNS: Final = "PATH,MAJ:MIN,TYPE,PARTTYPE,PTTYPE"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the table of mounts (proc_pid_mountinfo(5))."""

    device: tuple[int, int]
    root: bytes
    point: bytes
    options: frozenset[str]
    filesystem: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        """Whether the mount or its file system is read-only."""
        return "ro" in self.options or "ro" in self.super_options


@dataclass(frozen=True, slots=True)
class EspDevice:
    """The partition: path below ``/dev`` and device number."""

    path: str
    device: tuple[int, int]


def parse_mountinfo(data: bytes) -> list[Mount]:
    """Lines of a table of mounts in its order; a later one covers an earlier one at the same point.

    Lines of another form are passed over.
    """
    return [mount for line in data[:MAX_TABLE].split(b"\n") if (mount := _mount(line)) is not None]


def _mount(line: bytes) -> Mount | None:
    before, separator, after = line.partition(b" - ")
    first, last = before.split(b" "), after.split(b" ")
    if not separator or len(first) < 6 or len(last) < 3:
        return None
    device = _device(first[2].decode("ascii", "replace"))
    if device is None:
        return None
    return Mount(
        device=device,
        root=_unescaped(first[3]),
        point=_unescaped(first[4]),
        options=frozenset(os.fsdecode(first[5]).split(",")),
        filesystem=os.fsdecode(last[0]),
        source=os.fsdecode(_unescaped(last[1])),
        super_options=frozenset(os.fsdecode(last[2]).split(",")),
    )


def _unescaped(field: bytes) -> bytes:
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)


def _device(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    return (int(found[1]), int(found[2])) if found else None


def mount_at(mounts: list[Mount], point: bytes) -> Mount | None:
    """The mount that is seen at exactly this point."""
    return next((mount for mount in reversed(mounts) if mount.point == point), None)


def mount_of(mounts: list[Mount], device: tuple[int, int]) -> Mount | None:
    """An existing mount of the whole file system on a device; a writable one if there is one.

    One that another mount covers is not seen at its point, and not taken.
    """
    found = [m for m in mounts if m.device == device and m.root == b"/" and mount_at(mounts, m.point) is m]
    return min(found, key=lambda mount: mount.read_only, default=None)


def mount_below(mounts: list[Mount], path: Path) -> Mount | None:
    """The mount that a path without symbolic links lies on."""
    wanted = os.fsencode(path)
    best: Mount | None = None
    for mount in mounts:
        inside = wanted == mount.point or wanted.startswith(mount.point.rstrip(b"/") + b"/")
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def find_esp(mounts: list[Mount], physical_root: Path) -> EspDevice:
    """The EFI system partition on the disks below the physical root; the first one found.

    Raises ``BootLoaderError`` if there is none, ``ProgramMissing`` without ``lsblk``.
    """
    mount = mount_below(mounts, physical_root)
    if mount is None:
        raise BootLoaderError(f"nothing is mounted at {physical_root}")
    # btrfs has device numbers of its own making, so its source counts.
    major, minor = mount.device
    backing = mount.source if mount.source.startswith("/dev/") else f"/dev/block/{major}:{minor}"
    for disk in whole_disks(_lsblk("--inverse", backing)):
        found = esp_of(_lsblk(disk))
        if found is not None:
            return found
    raise BootLoaderError("no EFI system partition on the disks that hold the physical root")


def _lsblk(*arguments: str) -> dict[str, Any]:
    program = find_program("lsblk")
    try:
        done = subprocess.run(
            [program, "--json", "--output", _COLUMNS, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BootLoaderError(f"lsblk did not end within {TIMEOUT} s") from None
    except OSError as error:
        raise from_os_error(error, "lsblk") from None
    if done.returncode:
        raise BootLoaderError(f"lsblk failed: {done.stderr[:200].decode('utf-8', 'replace').strip()}")
    return parse_lsblk(done.stdout)


def parse_lsblk(data: bytes) -> dict[str, Any]:
    """The document that ``lsblk --json`` prints; raises ``BootLoaderError``."""
    if len(data) > MAX_OUTPUT:
        raise BootLoaderError(f"lsblk prints more than {MAX_OUTPUT} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BootLoaderError("lsblk does not print what it should")
    return document


def _walk(devices: object, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Devices and, right behind each, those below it."""
    if not isinstance(devices, list) or depth > MAX_DEPTH:
        return
    for device in devices:
        if isinstance(device, dict):
            yield device
            yield from _walk(device.get("children"), depth + 1)


def whole_disks(document: dict[str, Any]) -> list[str]:
    """Paths of the disks in the output of ``lsblk --inverse``, whose children are what a device lies on."""
    found = (
        device["path"]
        for device in _walk(document.get("blockdevices"))
        if device.get("type") in ("disk", "loop") and isinstance(device.get("path"), str)
    )
    return list(dict.fromkeys(found))


def esp_of(document: dict[str, Any]) -> EspDevice | None:
    """The first EFI system partition in the output of ``lsblk`` for a disk, also within a firmware RAID."""
    for device in _walk(document.get("blockdevices")):
        number = _device(str(device.get("maj:min", "")).strip())
        if number is not None and isinstance(device.get("path"), str) and _is_esp(device):
            return EspDevice(device["path"], number)
    return None


def _is_esp(device: dict[str, Any]) -> bool:
    kind = device.get("parttype")
    if not isinstance(kind, str):
        return False
    if device.get("pttype") == "dos":
        return re.fullmatch(r"(?:0x)?[0-9A-Fa-f]{1,2}", kind) is not None and int(kind, 16) in MBR_TYPES
    return kind.lower() == GPT_TYPE
