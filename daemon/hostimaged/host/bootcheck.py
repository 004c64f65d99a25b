"""What was promised for the next boot, checked after it (architecture.md, rule 10).

Whoever activates a menu writes down what the next boot is to start, in ``state/hostimaged/expected.json``::

    {"version": 1, "boot_id": "…", "time": 1767225600, "deployment": "<deployment id>"}

After the next boot that is compared with what runs, and the file goes; a deployment that does not run is
remembered for longer (``failedboots``). A staged menu that is there without its marker was not activated at
the last shutdown, as it should have been unless ``held-back.json`` names its deployment: that was to be
downloaded only::

    {"version": 1, "deployment": "<deployment id>"}

What is found is told in ``boot.json`` of the run directory, for the daemon::

    {"version": 1, "boot_id": "…", "time": …, "deployment": "<deployment id>", "message": "…"}
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.order import boot_counter
from hostimaged.errors import HostimageError, from_os_error, printable
from hostimaged.host import failedboots
from hostimaged.host.failedboots import FailedBoot
from hostimaged.host.read import read_host
from hostimaged.host.statefile import read_document, read_state_file, write_document
from hostimaged.ids import DeploymentId
from hostimaged.system.durable import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostimaged.host.booted import Booted
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session
    from hostimaged.system.paths import HostPaths

VERSION: Final = 1
#: A few short strings.
MAX_SIZE: Final = 4096
#: Of the results of a check: what was to run does not.
NOT_BOOTED: Final = "not-booted"
#: Characters of what the journal says that are told.
_CAUSE: Final = 300


@dataclass(frozen=True, slots=True)
class Expected:
    """What a boot is to start; ``boot_id``: the boot before it, during which that was decided."""

    deployment: DeploymentId
    boot_id: str


def expect(session: Session, deployment: DeploymentId) -> None:
    """Write down what the next boot is to start. Never raises: that it cannot be checked undoes nothing."""
    document = {"version": VERSION, "boot_id": session.boot_id, "time": session.now()}
    data = json.dumps(document | {"deployment": str(deployment)}).encode() + b"\n"
    with suppress(OSError):
        replace_file(session.paths.expected_boot, data)


def read_expected(paths: HostPaths) -> Expected | None:
    """What is written down; None if nothing is, or nothing that can be understood."""
    path = paths.expected_boot
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        document = json.loads(read_state_file(directory, path.name, MAX_SIZE) or b"null")
        if document["version"] != VERSION:
            return None
        return Expected(DeploymentId(document["deployment"]), str(document["boot_id"]))
    except (HostimageError, ValueError, KeyError, TypeError, RecursionError):
        return None
    finally:
        os.close(directory)


def hold_back(session: Session, deployment: DeploymentId, *, held: bool) -> None:
    """Write down whether what is staged waits for somebody to unlock it.

    Never raises: without it a reboot that does not activate it is told as a failure, and does no harm.
    """
    path = session.paths.held_back
    with suppress(OSError, HostimageError):
        if held:
            write_document(path, {"version": VERSION, "deployment": str(deployment)})
        else:
            path.unlink(missing_ok=True)


def _named_in(path: Path) -> str:
    """The deployment that a file names, "" if there is no such file."""
    return str((read_document(path, MAX_SIZE, VERSION) or {}).get("deployment", ""))


def check(paths: HostPaths, boot_id: str, now: int, cause: Callable[[], str]) -> dict[str, Any]:
    """Compare what runs with what was to run; ``cause`` gives what the last shutdown said of it.

    ``result`` is ``as-expected``, ``not-booted`` or ``not-activated``; the latter two have a ``deployment``
    and a ``message``. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError`` if that cannot be written.
    """
    expected = read_expected(paths)
    if expected is not None and expected.boot_id == boot_id:
        # Decided since the boot: it is for the next one to show.
        expected = None
    state = read_host(paths, None)
    found = _compare(state, expected, _named_in(paths.held_back))
    _remember(paths, state, found, now)
    try:
        if found is not None:
            deployment, result, message = found
            if said := printable(cause().strip())[-_CAUSE:]:
                message += f"; the last shutdown said: {said}"
            document = {"version": VERSION, "boot_id": boot_id, "time": now, "message": message}
            data = json.dumps(document | {"deployment": str(deployment)}).encode() + b"\n"
            replace_file(paths.boot_file, data)
        elif state.booted is not None and _named_in(paths.boot_file) == str(state.booted.id):
            # A soft reboot got there after all.
            paths.boot_file.unlink(missing_ok=True)
        if expected is not None:
            paths.expected_boot.unlink(missing_ok=True)
        if state.marker is None and not state.sets.unreadable:
            paths.held_back.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, "cannot write down how the boot went") from error
    if found is None:
        return {"result": "as-expected"}
    return {"result": result, "deployment": str(deployment), "message": message}


def _remember(
    paths: HostPaths, state: HostState, found: tuple[DeploymentId, str, str] | None, now: int
) -> None:
    """Keep in mind which deployment did not start, and that the one that runs did."""
    if state.booted is None:
        return
    failed = None
    if found is not None and found[1] == NOT_BOOTED:
        row = state.find(found[0])
        failed = FailedBoot(found[0], None if row is None else row.manifest_digest, now)
    failedboots.remember(paths, failedboots.read(paths), failed, state.booted.id)


def _failed(state: HostState, expected: DeploymentId, booted: Booted) -> bool:
    """Whether what was to be booted does not run, though the menu still has it first.

    Another tool may have changed the menu since that was written down.
    """
    if expected in (booted.id, booted.cmdline_id):
        return False
    live = state.sets.live
    if live is None or not live.entries or live.entries[0].id == expected:
        return True
    # systemd-boot itself puts one last whose tries are used up.
    return any(boot_counter(entry.file_name)[1] for entry in live.of(expected))


def _compare(
    state: HostState, expected: Expected | None, held_back: str
) -> tuple[DeploymentId, str, str] | None:
    """The deployment that should run or be the next to, which of the two failed, and what to tell of it."""
    booted = state.booted
    if booted is None:
        return None
    if expected is not None and _failed(state, expected.deployment, booted):
        text = (
            f"deployment {expected.deployment} was to be booted, and {booted.id} runs: another entry was "
            "chosen in the boot menu, or it did not start"
        )
        return expected.deployment, NOT_BOOTED, text
    staged, live = state.sets.staged, state.sets.live
    if staged is not None and state.marker is None:
        # After an activation that was cut short the old menu is there instead: its first is a known one.
        target = next(iter(staged.ids), None)
        known = () if live is None else live.ids
        if target is not None and target not in known and str(target) != held_back:
            row = state.find(target)
            digest = None if row is None else row.manifest_digest
            again = "upgrade" if digest is None else f"stage {digest}"
            text = (
                f"deployment {target} was staged, but not activated at the last shutdown; to stage it again: "
                f"hostimagectl {again}"
            )
            return target, "not-activated", text
    return None
