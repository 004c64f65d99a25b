"""A worker whose pulls and checks follow a script: the file the reference ``dir:PATH`` names, a JSON list.

Run as a program in place of ``hostimaged.jobs.worker``; everything around the work is the real thing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hostimaged import errors
from hostimaged.jobs import worker
from hostimaged.jobs.channel import Channel
from hostimaged.jobs.operations import Check, Operation, Pull, Scan, Switch, Upgrade
from hostimaged.progress import Phase
from hostimaged.system.paths import HostPaths

TICK = 0.005


def pull(paths: HostPaths, operation: Pull | Upgrade | Switch, channel: Channel) -> dict[str, Any]:
    """Follow the script, and scan."""
    result = follow(operation.reference, channel)
    scan(paths, Scan(), channel)
    return result


def check(_paths: HostPaths, operation: Check, channel: Channel) -> dict[str, Any]:
    """Follow the script."""
    return {"reference": operation.reference} | follow(operation.reference, channel)


def follow(reference: str, channel: Channel) -> dict[str, Any]:
    for step in json.loads(Path(reference.removeprefix("dir:")).read_text()):
        ((what, argument),) = step.items()
        if what == "result":
            return argument
        perform(what, argument, channel)
    raise AssertionError("a script ends with a result")


def perform(what: str, argument: Any, channel: Channel) -> None:
    """One step: a call of the reporter, or a deed."""
    if what in ("advance", "message"):
        getattr(channel, what)(argument)
    elif what in ("totals", "generating"):
        getattr(channel, what)(*argument)
    elif what == "phase":
        channel.phase(Phase(argument))
    elif what == "pause":
        channel.at("pausing")
        time.sleep(argument)
    elif what == "wait":
        while not Path(argument).exists():
            channel.at("waiting")
            time.sleep(TICK)
    else:
        misbehave(what, argument, channel)


def misbehave(what: str, argument: Any, channel: Channel) -> None:
    match what:
        case "touch":
            Path(argument).touch()
        case "stubborn":
            if argument == "SIGTERM":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(TICK)
        case "fail":
            raise getattr(errors, argument[0])(argument[1])
        case "crash":
            raise RuntimeError(argument)
        case "exit":
            os._exit(argument)
        case "kill":
            os.kill(os.getpid(), argument)
        case "raw":
            channel._socket.sendall(argument.encode())
        case "flood":
            channel._socket.sendall(b"x" * argument)
        case "pid":
            Path(argument + ".tmp").write_text(str(os.getpid()))
            os.rename(argument + ".tmp", argument)
        case "describe":
            lines = Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            facts = {key: status[key].strip() for key in ("CapEff", "CapBnd", "NoNewPrivs")}
            facts |= {"nice": os.nice(0), "fds": len(os.listdir("/proc/self/fd")), "env": sorted(os.environ)}
            Path(argument).write_text(json.dumps(facts))
        case _:
            raise AssertionError(f"unknown step {what}")


def scan(paths: HostPaths, _operation: Scan, channel: Channel) -> None:
    """The findings are in a file below the root, if it is there; with a ``wait`` for another file."""
    try:
        found = json.loads((paths.physical_root / "findings.json").read_text())
    except FileNotFoundError:
        found = {"repository": None, "images": [], "problems": []}
    if awaited := found.pop("wait", None):
        perform("wait", awaited, channel)
    channel.status(found)


def update(paths: HostPaths, operation: Upgrade | Switch, channel: Channel) -> dict[str, Any]:
    """Follow the script, if there is something to fetch."""
    if isinstance(operation, Upgrade) and operation.from_downloaded:
        return nothing(paths, operation, channel)
    return pull(paths, operation, channel)


def nothing(paths: HostPaths, _operation: Operation, channel: Channel) -> dict[str, Any]:
    """Change nothing, and scan."""
    scan(paths, Scan(), channel)
    return {"result": "unchanged"}


#: What follows a script; all else does nothing.
WORK = dict.fromkeys(worker.WORK, "__main__:nothing") | {
    "check": "__main__:check",
    "pull": "__main__:pull",
    "scan": "__main__:scan",
    "switch": "__main__:update",
    "upgrade": "__main__:update",
}

if __name__ == "__main__":
    sys.exit(worker.main(work=WORK))
