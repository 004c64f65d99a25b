"""The journal of a transaction: written before its first effect, removed after its last.

One file, ``state/hostimaged/transaction.json``: the job lock lets only one transaction run. It holds the plan
(what will be made, what will be activated) and digests of the facts the plan was made from, so that whoever
comes after a crash can tell "before", "after" and "another tool has acted" apart without remembering steps::

    {"version": 1, "operation": "stage", "target": "<deployment id>", "boot_id": "…", "time": 1767225600,
     "state_dir": true, "before": "<digest>", "after": "<digest>", "discard": ["<deployment id>"]}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import InvalidArgs, StorageError, from_os_error
from hostimaged.ids import DeploymentId
from hostimaged.system.durable import replace_file, sync_directory

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
#: A journal is a dozen short strings and a few deployment ids.
MAX_SIZE: Final = 64 << 10
#: More deployments than any host has.
MAX_DISCARDED: Final = 256
_MAX_TEXT: Final = 256
_MAX_TIME: Final = 1 << 52


class JournalError(StorageError):
    """the journal of the interrupted operation ({path}) {detail}"""


class Operation(StrEnum):
    """What a transaction does; the value is what the journal says."""

    STAGE = "stage"
    FINALIZE = "finalize"
    #: Every change of the live entries alone: rollback, order, kernel arguments, deletion.
    ACTIVATE = "activate"
    DEPLOY = "deploy"
    #: Removal of what nothing needs; ``discard`` are deployments of which something was left.
    COLLECT = "collect"
    #: A repository of old is brought to the present form.
    UPGRADE = "upgrade"


@dataclass(frozen=True, slots=True)
class Transaction:
    """What an operation was about to do.

    ``target`` is the deployment it is about; ``state_dir`` says that its state directory is made by it.
    ``before`` and ``after`` are digests of the live entries, for ``stage`` of the staged ones. ``discard``
    are deployments whose state directories go once it is committed. ``time`` is in seconds since the epoch.
    """

    operation: Operation
    boot_id: str
    time: int
    before: str
    after: str
    target: DeploymentId | None = None
    state_dir: bool = False
    discard: tuple[DeploymentId, ...] = ()

    def serialise(self) -> bytes:
        """The text of the journal."""
        document = {
            "version": VERSION,
            "operation": str(self.operation),
            "target": None if self.target is None else str(self.target),
            "boot_id": self.boot_id,
            "time": self.time,
            "state_dir": self.state_dir,
            "before": self.before,
            "after": self.after,
            "discard": [str(id_) for id_ in self.discard],
        }
        return json.dumps(document, indent=1).encode() + b"\n"


def read(path: Path) -> Transaction | None:
    """The journal at ``path``; None if no transaction was interrupted. Raises ``JournalError``."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"cannot be read: {error.strerror}", path=path) from None
    if len(raw) > MAX_SIZE:
        raise JournalError(f"is larger than {MAX_SIZE} bytes", path=path)
    return parse(raw, path)


def parse(raw: bytes, path: Path | str = "transaction.json") -> Transaction:
    """The transaction that ``raw`` describes; raises ``JournalError``, naming ``path``."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise JournalError("is damaged", path=path) from None
    if not isinstance(document, dict):
        raise JournalError("is damaged", path=path)
    if document.get("version") != VERSION:
        raise JournalError("was written by another version of this program", path=path)
    try:
        return _transaction(document)
    except (InvalidArgs, KeyError, TypeError, ValueError):
        raise JournalError("is damaged", path=path) from None


def _transaction(document: dict[str, Any]) -> Transaction:
    target, state_dir, discard = document["target"], document["state_dir"], document["discard"]
    if not isinstance(state_dir, bool) or not isinstance(discard, list) or len(discard) > MAX_DISCARDED:
        raise ValueError
    return Transaction(
        operation=Operation(document["operation"]),
        boot_id=_text(document["boot_id"]),
        time=_time(document["time"]),
        before=_text(document["before"]),
        after=_text(document["after"]),
        target=None if target is None else DeploymentId(_text(target)),
        state_dir=state_dir,
        discard=tuple(DeploymentId(_text(id_)) for id_ in discard),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise TypeError
    return value


def _time(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_TIME:
        raise TypeError
    return value


def write(path: Path, transaction: Transaction) -> None:
    """Make ``transaction`` the one under way, durably. Raises ``NoSpace``, ``ReadOnly``, ``StorageError``."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, transaction.serialise(), mode=0o600)
    except OSError as error:
        raise from_os_error(error, f"cannot write the journal {path}") from error


def remove(path: Path) -> None:
    """No transaction is under way any more, durably. Missing is fine."""
    try:
        os.unlink(path)
        sync_directory(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"cannot remove the journal {path}") from error
