"""Which systemd unit a process belongs to, by its control group."""

from __future__ import annotations

import os
import re
import select
from typing import Final

#: A path of control groups is at most PATH_MAX long; there is one line for each hierarchy, of a dozen.
_MAX_CGROUP: Final = 64 << 10
_MAX_STATUS: Final = 64 << 10
#: systemd.unit(5): characters of unit names; processes are only in services and scopes. 255: UNIT_NAME_MAX.
_UNIT: Final = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9:_.\\@-]+\.(?:service|scope)\Z")
_SLICE: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+\.slice\Z")


def unit_of_process(pid: int, uid: int) -> str:
    """The unit of the system's manager that the process ``pid`` of the user ``uid`` is in; "" if unknown.

    What users can name is below a unit that they cannot (``user@1000.service``, ``session-2.scope``), and
    that one is told: nobody chooses the answer for himself. A process that ended, or is another user's by
    now, because its number was used again, is unknown. Never raises.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, OverflowError, ValueError):
        return ""
    try:
        text = _read(f"/proc/{pid}/cgroup", _MAX_CGROUP)
        status = _read(f"/proc/{pid}/status", _MAX_STATUS)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if poll.poll(0):
            # It ended: what was read may be of another one.
            return ""
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return unit_of_cgroup(text) if uid in _uids(status) else ""


def unit_of_cgroup(text: str) -> str:
    """The unit in the content of a file ``/proc/PID/cgroup``; "" if there is none.

    The unified hierarchy counts, or systemd's own where the controllers have theirs (cgroups(7)).
    """
    paths = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "name=systemd" or (number, controllers) == ("0", ""):
            paths[controllers] = path
    for controllers in ("name=systemd", ""):
        for part in paths.get(controllers, "").split("/")[1:]:
            # systemd puts "_" before a name that would be one of the kernel's files.
            name = part.removeprefix("_")
            if _UNIT.match(name):
                return name
            if not _SLICE.match(name):
                break
    return ""


def _uids(status: str) -> set[int]:
    """Real, effective, saved and file system uid in the content of a file ``/proc/PID/status``."""
    for line in status.splitlines():
        if line.startswith("Uid:"):
            return {int(field) for field in line.split()[1:] if field.isdecimal()}
    return set()


def _read(path: str, limit: int) -> str:
    with open(path, "rb") as file:
        return file.read(limit).decode("utf-8", "replace")
