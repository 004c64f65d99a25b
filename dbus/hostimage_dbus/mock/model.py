"""What the mock shows: properties of deployments and of the Manager, rows of images, the status document."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.mock.scenarios import IMAGE
from hostimage_dbus.names import API_VERSION, NO_OBJECT, deployment_path
from hostimage_dbus.transport import Variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hostimage_dbus.introspection import Interface

VERSION: Final = "0.0-mock"
BOOT_ID: Final = "00000000-0000-4000-8000-00000000000d"
_MIB: Final = 1 << 20
DOWNLOAD_SIZE: Final = 345 * _MIB
TOTAL_SIZE: Final = 1890 * _MIB

#: Ids, digests and versions of the deployments: running, the one before, and the update.
BOOTED: Final = "b0" * 32
PREVIOUS: Final = "a0" * 32
UPDATE: Final = "c0" * 32
_DIGESTS: Final = {key: "sha256:" + key for key in (BOOTED, PREVIOUS, UPDATE)}
_VERSIONS: Final = {PREVIOUS: "42.1", BOOTED: "42.2", UPDATE: "42.3"}
_MADE: Final = {PREVIOUS: 1_790_000_000, BOOTED: 1_792_000_000, UPDATE: 1_794_000_000}


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def default(signature: str) -> Any:
    """A value that says nothing, of one complete D-Bus type."""
    if signature.startswith("a{"):
        return {}
    if signature.startswith("a"):
        return []
    if signature.startswith("("):
        return [default(part) for part in complete_types(signature[1:-1])]
    return {"s": "", "o": NO_OBJECT, "g": "", "b": False, "d": 0.0, "v": Variant("s", "")}.get(signature, 0)


def complete_types(signature: str) -> list[str]:
    """``signature`` cut into its complete types."""
    parts, rest = [], signature
    while rest:
        end = _end(rest)
        parts.append(rest[:end])
        rest = rest[end:]
    return parts


def _end(signature: str) -> int:
    """Where the first complete type ends."""
    if signature[0] == "a":
        return 1 + _end(signature[1:])
    if signature[0] not in "({":
        return 1
    depth = 0
    for index, character in enumerate(signature):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return index + 1
    raise ValueError(f"{signature!r} is no signature")


def values(interface: Interface, known: Mapping[str, Any]) -> dict[str, Any]:
    """A value for every property of ``interface``: those in ``known``, and defaults."""
    return {name: known.get(name, default(member.signature)) for name, member in interface.properties.items()}


def update(state: str) -> dict[str, Variant]:
    """The property Update of the Manager; ``state`` "" is none."""
    if not state:
        return {}
    return {
        "image": Variant("s", IMAGE),
        "digest": Variant("s", _DIGESTS[UPDATE]),
        "version": Variant("s", _VERSIONS[UPDATE]),
        "timestamp": Variant("t", _MADE[UPDATE] * 1_000_000),
        "download-size": Variant("t", DOWNLOAD_SIZE if state == "available" else 0),
        "state": Variant("s", state),
    }


def manager(state: str) -> dict[str, Any]:
    """Properties of the Manager at the start; ``state`` is that of the update."""
    staged = state == "staged"
    return {
        "Version": VERSION,
        "ApiVersion": API_VERSION,
        "BootId": BOOT_ID,
        "State": "idle",
        "Booted": deployment_path(BOOTED),
        "Staged": deployment_path(UPDATE) if staged else NO_OBJECT,
        "RollbackTarget": deployment_path(PREVIOUS),
        "RebootRequired": staged,
        "TrackedImage": IMAGE,
        "Update": update(state),
        "LastCheck": [now(), "", ""],
        "UpdatePolicy": "check",
        "RepositorySize": [2 * TOTAL_SIZE, DOWNLOAD_SIZE],
        "ActiveJob": NO_OBJECT,
    }


def deployment(number: str) -> dict[str, Any]:
    """Properties of the deployment with the id ``number``."""
    return {
        "Id": number,
        "Image": IMAGE,
        "ImageDigest": _DIGESTS[number],
        "ConfigDigest": "sha256:" + number[::-1],
        "Version": _VERSIONS[number],
        "Timestamp": _MADE[number] * 1_000_000,
        "BootType": "bls",
        "BootEntries": [f"loader/entries/{number[:8]}.conf"],
        "KernelArguments": f"root=UUID=00000000-0000-4000-8000-000000000001 composefs={number} rw quiet",
        "Booted": number == BOOTED,
        "Staged": number == UPDATE,
        "IsRollback": number == PREVIOUS,
        "Verity": "ok",
        "SizeExclusive": DOWNLOAD_SIZE,
        "Order": [UPDATE, BOOTED, PREVIOUS].index(number),
    }


def images(state: str) -> list[dict[str, Variant]]:
    """Rows of ListImages; ``state`` is that of the update."""
    shown = [BOOTED, PREVIOUS] + ([UPDATE] if state in ("downloaded", "staged") else [])
    return [
        {
            "tag": Variant("s", f"localhost/hostimaged-{number[:8]}"),
            "manifest-digest": Variant("s", _DIGESTS[number]),
            "config-digest": Variant("s", "sha256:" + number[::-1]),
            "reference": Variant("s", IMAGE),
            "source-digest": Variant("s", _DIGESTS[number]),
            "pulled": Variant("t", _MADE[number]),
            "version": Variant("s", _VERSIONS[number]),
            "size": Variant("t", TOTAL_SIZE),
            "image-ids": Variant("as", [number * 2]),
            "artifact": Variant("b", False),
            "deployed": Variant("b", True),
        }
        for number in sorted(shown)
    ]


def pulled() -> dict[str, Any]:
    """What the Result of a pull, a check or an upgrade tells about the update."""
    return {
        "reference": Variant("s", IMAGE),
        "manifest-digest": Variant("s", _DIGESTS[UPDATE]),
        "source-digest": Variant("s", _DIGESTS[UPDATE]),
        "config-digest": Variant("s", "sha256:" + UPDATE[::-1]),
        "version": Variant("s", _VERSIONS[UPDATE]),
        "timestamp": Variant("t", _MADE[UPDATE] * 1_000_000),
        "download-size": Variant("t", DOWNLOAD_SIZE),
        "total-size": Variant("t", TOTAL_SIZE),
        "changed": Variant("b", True),
    }


def document(
    properties: Mapping[str, Any],
    deployments: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Variant]],
    jobs: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
) -> str:
    """The native status document, from properties of the Manager, of deployments, and of jobs."""
    text = {
        "schema": 1,
        "daemon": {
            "version": VERSION,
            "apiVersion": API_VERSION,
            "bootId": BOOT_ID,
            "state": properties["State"],
        },
        "repository": {
            "algorithm": "fsverity-sha512-12",
            "formats": ["v1"],
            "secure": True,
            "used": properties["RepositorySize"][0],
        },
        "trackedImage": properties["TrackedImage"],
        "unified": properties["Unified"],
        "images": [_plain(row) for row in rows],
        "host": {
            "bootloader": "systemd",
            "next": next((row["Id"] for row in deployments if row["Staged"]), BOOTED),
            "soft-rebooted": False,
            "transient-root": False,
            "verity-optional": False,
            "usr-overlay": "",
            "read-only": False,
        },
        "rollbackQueued": False,
        "deployments": [{_hyphens(key): value for key, value in row.items()} for row in deployments],
        "update": _plain(properties["Update"]) or None,
        "holds": [{"kind": kind, "until": 0, "reason": ""} for kind in properties["Holds"]],
        "jobs": [_job(job) for job in jobs],
        "results": [_result(job) for job in results[-20:]],
        "problems": [],
    }
    return json.dumps(text)


def _hyphens(name: str) -> str:
    """Name of a property as the document has it: IsRollback is is-rollback."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _plain(row: Mapping[str, Variant]) -> dict[str, Any]:
    return {key: value.value for key, value in row.items()}


def _job(job: Mapping[str, Any]) -> dict[str, Any]:
    names = ("Id", "Kind", "State", "Target", "Phase", "Background", "Created", "Started")
    return {name.lower(): job[name] for name in names} | {
        "progress": job["Progress"] if job["Progress"] >= 0 else None,
        "bytesDone": job["BytesDone"],
        "bytesTotal": job["BytesTotal"],
        "bytesCached": job["BytesCached"],
    }


def _result(job: Mapping[str, Any]) -> dict[str, Any]:
    names = ("Id", "Kind", "State", "Target", "Created", "Started", "Finished")
    name, message = job["Error"]
    return {key.lower(): job[key] for key in names} | {
        "error": {"name": name, "message": message} if name else None
    }
