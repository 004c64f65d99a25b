"""The update policy that somebody chose: how far updates go without being asked.

One small file, ``state/hostimaged/policy.json``, which stays over boots and updates::

    {"version": 1, "policy": "download"}
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hostimaged.errors import DamagedState, from_os_error
from hostimaged.host.statefile import read_state_file
from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from hostimaged.system.paths import HostPaths

VERSION: Final = 1
#: The file is one short line.
MAX_SIZE: Final = 4096


class UpdatePolicy(StrEnum):
    """What happens by itself when there is an update, each with what comes before it."""

    NONE = "none"
    CHECK = "check"
    DOWNLOAD = "download"
    STAGE = "stage"


def read(paths: HostPaths) -> UpdatePolicy | None:
    """What was chosen, None if nobody has yet.

    Raises ``DamagedState`` for a file that is not as it should be, ``StorageError`` for one that cannot be
    read.
    """
    path = paths.update_policy
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, f"cannot read {path}") from error
    try:
        data = read_state_file(directory, path.name, MAX_SIZE)
    finally:
        os.close(directory)
    return None if data is None else _parse(data, path.name)


def _parse(data: bytes, name: str) -> UpdatePolicy:
    try:
        document = json.loads(data)
        if document["version"] != VERSION:
            raise DamagedState("it is of another version", file=name)
        return UpdatePolicy(document["policy"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedState("it holds no update policy", file=name) from None


def write(paths: HostPaths, policy: UpdatePolicy) -> None:
    """Choose ``policy``, durably. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``."""
    path = paths.update_policy
    data = json.dumps({"version": VERSION, "policy": str(policy)}).encode() + b"\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise from_os_error(error, f"cannot write {path}") from error
