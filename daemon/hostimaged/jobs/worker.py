"""The worker process: does the work of one job and ends (``python -m hostimaged.jobs.worker``).

Started by ``hostimaged.jobs.process`` with a socket to the daemon. Before the first byte of input is read, it
ties its life to the daemon's and gives up all privileges that its profile does not need.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.errors import ErrorName
from hostimaged.errors import HostimageError, Internal, NoSpace, ReadOnly, from_os_error
from hostimaged.jobs.channel import Channel
from hostimaged.jobs.privileges import CAPABILITIES, Profile
from hostimaged.system import mounts, syscalls
from hostimaged.system.locks import FileLock
from hostimaged.system.paths import HostPaths

if TYPE_CHECKING:
    from hostimaged.jobs.operations import Operation, Order

#: Politeness towards everything else on the host.
_NICE: Final = 10

Work = Callable[[HostPaths, Any, Channel], dict[str, Any] | None]

#: Where the function for each kind of operation is; imported only by the worker that needs it.
WORK: Final[Mapping[str, str]] = {
    "bound": "hostimaged.jobs.host_work:pull_bound",
    "check": "hostimaged.jobs.work:check",
    "collect": "hostimaged.jobs.host_work:collect",
    "delete": "hostimaged.jobs.host_work:delete",
    "diff": "hostimaged.jobs.host_work:diff",
    "explain": "hostimaged.jobs.host_work:explain",
    "import": "hostimaged.jobs.store_work:import_stored",
    "kargs": "hostimaged.jobs.host_work:kernel_arguments",
    "pin": "hostimaged.jobs.host_work:pin",
    "policy": "hostimaged.jobs.work:set_policy",
    "pull": "hostimaged.jobs.work:pull",
    "recover": "hostimaged.jobs.host_work:recover",
    "repair": "hostimaged.jobs.host_work:repair",
    "rollback": "hostimaged.jobs.host_work:rollback",
    "scan": "hostimaged.jobs.work:scan",
    "soft-reboot": "hostimaged.jobs.host_work:soft_reboot",
    "stage": "hostimaged.jobs.host_work:stage",
    "switch": "hostimaged.jobs.work:pull",
    "unify": "hostimaged.jobs.store_work:unify",
    "unstage": "hostimaged.jobs.host_work:unstage",
    "upgrade": "hostimaged.jobs.host_work:upgrade",
    "verify": "hostimaged.jobs.host_work:verify",
}


def main(argv: Sequence[str] | None = None, work: Mapping[str, str] = WORK) -> int:
    """Run one order; exit code 0 if an outcome was reported, whatever it was."""
    parser = argparse.ArgumentParser(prog="hostimaged worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--profile", type=Profile, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--writable", type=Path, action="append", default=[])
    parser.add_argument("--esp", action="store_true")
    arguments = parser.parse_args(argv)
    live = _confine(arguments.profile, arguments.parent, arguments.writable, esp=arguments.esp)
    with socket.socket(fileno=arguments.fd) as sock:
        sock.set_inheritable(False)
        channel = Channel(sock)
        try:
            order = channel.read_order()
            if order.operation.profile != arguments.profile:
                raise Internal
            channel.watch()
            channel.result(_run(order, channel, work, live) or {})
        except HostimageError as error:
            if error.name is ErrorName.INTERNAL:
                _log_failure(error)
            channel.error(error.name, error.message)
        except OSError as error:
            _log_failure(error)
            known = from_os_error(error, "the job failed")
            channel.error(known.name, known.message)
        except Exception as error:  # noqa: BLE001 (the daemon is told, the journal gets the traceback)
            _log_failure(error)
            channel.error(ErrorName.INTERNAL, Internal().message)
    return 0


def _confine(profile: Profile, parent: int, writable: Sequence[Path], *, esp: bool) -> HostPaths:
    """Tie this process to the daemon, make ``writable`` writable for it, and give up privileges.

    Gives the running host, with what it takes more privileges to reach than are kept: its mount namespace, if
    the operation may need it, and with ``esp`` the EFI system partition, to be read.
    """
    syscalls.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the daemon is gone")
    os.nice(_NICE)
    for path in writable:
        # What fails here is told by the operation, as a read-only file system.
        with suppress(OSError):
            mounts.make_writable(path)
    paths = HostPaths.live()
    if profile is Profile.HOST:
        paths = _with_namespace(paths)
    if esp:
        paths = _with_esp(paths)
    syscalls.set_no_new_privs()
    syscalls.drop_capabilities(CAPABILITIES[profile])
    return paths


def _with_namespace(paths: HostPaths) -> HostPaths:
    """With the mount namespace of the host open; if that may not be, who needs it will tell."""
    if paths.host_namespace is not None:
        with suppress(OSError):
            fd = os.open(paths.host_namespace, os.O_RDONLY | os.O_CLOEXEC)
            return replace(paths, host_namespace=Path(f"/proc/self/fd/{fd}"))
    return paths


def _with_esp(paths: HostPaths) -> HostPaths:
    """With the EFI system partition open; if it cannot be, the operation tells that it is not mounted."""
    from hostimaged.host import espmount

    try:
        return espmount.seek(paths)
    except HostimageError:
        return replace(paths, esp_sought=True)


def _run(order: Order, channel: Channel, work: Mapping[str, str], live: HostPaths) -> dict[str, Any] | None:
    paths = live if order.root is None else HostPaths.scratch(Path(order.root))
    return perform(paths, order.operation, channel, work)


def perform(
    paths: HostPaths, operation: Operation, channel: Channel, work: Mapping[str, str] = WORK
) -> dict[str, Any] | None:
    """Do an operation on a host, under the job lock if it changes something; its result.

    Raises what it raises; ``NoSpace`` and ``ReadOnly`` tell of the file systems of the host.
    """
    module, _, function = work[operation.kind].partition(":")
    do: Work = getattr(import_module(module), function)
    lock = (
        FileLock(
            paths.job_lock,
            timeout=operation.lock_timeout,
            what=str(paths.job_lock),
            check=channel.check,
        )
        if operation.changes
        else nullcontext()
    )
    try:
        with lock:
            return do(paths, operation, channel)
    except (NoSpace, ReadOnly) as error:
        from hostimaged.host.space import with_places

        raise with_places(error, paths) from error


def _log_failure(error: BaseException) -> None:
    """The traceback, for the journal (logging is imported only here: most workers never need it)."""
    from hostimaged import log

    log.configure("info")
    log.get_logger("hostimaged.worker").error("worker.fail", exc_info=error)


if __name__ == "__main__":
    _code = main()
    sys.stderr.flush()
    # Nothing is left to do, and the daemon waits: taking the interpreter down takes 20 ms.
    os._exit(_code)
