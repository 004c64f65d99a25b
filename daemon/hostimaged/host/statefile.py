"""Small files of state that others write too: read whole, never followed, never larger than they may be."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from hostimaged.errors import DamagedState, HostimageError, from_os_error
from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from pathlib import Path


def read_state_file(directory: int, name: str, limit: int) -> bytes | None:
    """The content of the regular file ``name`` in ``directory``, None if there is none.

    Raises ``DamagedState`` for more than ``limit`` bytes and for what is no file, ``StorageError`` for what
    cannot be read.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedState("it is not a regular file", file=name) from None
        raise from_os_error(error, f"cannot read {name}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DamagedState("it is not a regular file", file=name)
        data = b""
        while len(data) <= limit and (piece := os.read(fd, limit + 1 - len(data))):
            data += piece
    except OSError as error:
        raise from_os_error(error, f"cannot read {name}") from error
    finally:
        os.close(fd)
    if len(data) > limit:
        raise DamagedState(f"it is larger than {limit} bytes", file=name)
    return data


def read_document(path: Path, limit: int, version: int) -> dict[str, Any] | None:
    """The JSON object in the file at ``path``; None if it is missing, damaged or of another ``version``."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        document = json.loads(read_state_file(directory, path.name, limit) or b"null")
    except (HostimageError, ValueError, RecursionError):
        return None
    finally:
        os.close(directory)
    if not isinstance(document, dict) or document.get("version") != version:
        return None
    return document


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Put ``document``, with its version, in place of the file at ``path``, durably.

    Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        raise from_os_error(error, f"cannot write {path}") from error
