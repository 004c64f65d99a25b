"""Serving a host on the bus, until told to stop.

The bus name is taken first; everything that takes time to import comes after it.
"""

from __future__ import annotations

import sys

# ruff: noqa: E402
# asyncio takes it where it is there, and it takes 2 MB: this daemon encrypts nothing.
sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from hostimage_dbus.names import BUS_NAME
from hostimage_dbus.transport import BusClosed, BusError, Connection, Limits
from hostimaged.errors import HostimageError, from_os_error
from hostimaged.system.boot import read_boot_id
from hostimaged.system.locks import FileLock
from hostimaged.system.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hostimaged.bus.service import Service
    from hostimaged.system.paths import HostPaths

#: The service subscribes to signals of the bus, and of services that tell of a few properties.
_LIMITS: Final = Limits(signal=64 << 10)


def serve(paths: HostPaths) -> int:
    """Serve the host until SIGTERM or SIGINT; exit code 0 then, 1 for a failure told on standard error."""
    try:
        with _only_daemon(paths):
            asyncio.run(_serve(paths))
    except (HostimageError, BusError) as error:
        print(f"hostimaged: {error.message}", file=sys.stderr)
        return 1
    return 0


def _only_daemon(paths: HostPaths) -> FileLock:
    """The lock that keeps a second daemon from the same root."""
    try:
        paths.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"cannot make {paths.run_dir}") from error
    return FileLock(paths.daemon_lock, timeout=0, what=f"{paths.daemon_lock} (one daemon per host)")


async def _serve(paths: HostPaths) -> None:
    """Serve until SIGTERM or SIGINT; raises ``BusError`` if there is no bus, or the name is taken."""
    notifier = Notifier()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    connection = await Connection.connect(limits=_LIMITS)
    try:
        await connection.request_name(BUS_NAME)
        notifier.ready("starting")
        # Calls that come meanwhile wait in the connection. In a thread, because importing takes long.
        prepare = await asyncio.to_thread(_prepare, paths)
        async with asyncio.TaskGroup() as tasks:
            helpers = [
                tasks.create_task(_watchdog(notifier)),
                tasks.create_task(_until_lost(connection)),
            ]
            async with _until_left() as calls:
                service = prepare(connection, tasks, calls, notifier)
                service.start()
                notifier.status("idle")
                await stop.wait()
                notifier.stopping()
                await service.stop()
            for helper in helpers:
                helper.cancel()
    except BaseExceptionGroup as errors:
        if errors.subgroup(BusClosed) is None:
            raise
        raise await connection.closed() from None
    finally:
        await connection.close()


class _Left(Exception):
    """The context is left."""


@asynccontextmanager
async def _until_left() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that are cancelled when the context is left: nobody waits for what they wait for."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise _Left
    except* _Left:
        pass


def _prepare(
    paths: HostPaths,
) -> Callable[[Connection, asyncio.TaskGroup, asyncio.TaskGroup, Notifier], Service]:
    """Import, and read settings and history; gives what makes the service of them."""
    from hostimage_dbus.introspection import load_shipped
    from hostimaged import config, log
    from hostimaged.bus.bootfailure import read_boot_failure
    from hostimaged.bus.holds import Holds
    from hostimaged.bus.policy import Policy
    from hostimaged.bus.service import Service
    from hostimaged.bus.sizes import Sizes
    from hostimaged.bus.updates import Updates
    from hostimaged.bus.verified import Verified
    from hostimaged.jobs.history import History
    from hostimaged.jobs.process import WorkerSettings

    settings, problems = config.load(paths.settings)
    log.configure(settings.log_level)
    interfaces = load_shipped()
    boot_id = read_boot_id(paths.boot_id)
    history = History(paths.jobs_file, boot_id)
    history.load()
    holds = Holds(paths.holds_file, boot_id)
    holds.load()
    sizes = Sizes(paths.sizes_file, boot_id)
    sizes.load()
    updates = Updates(paths.updates_file, boot_id)
    updates.load()
    policy = Policy(paths)
    policy.load()
    verified = Verified(paths.verified_file, boot_id)
    verified.load()

    def make(
        connection: Connection, tasks: asyncio.TaskGroup, calls: asyncio.TaskGroup, notifier: Notifier
    ) -> Service:
        return Service(
            connection,
            tasks,
            calls,
            interfaces=interfaces,
            paths=paths,
            settings=settings,
            settings_problems=problems,
            load_settings=lambda: config.load(paths.settings),
            history=history,
            holds=holds,
            updates=updates,
            policy=policy,
            boot_failure=read_boot_failure(paths.boot_file, boot_id),
            sizes=sizes,
            verified=verified,
            boot_id=boot_id,
            workers=WorkerSettings(root=paths.scratch_root),
            notifier=notifier,
        )

    return make


async def _watchdog(notifier: Notifier) -> None:
    """Tell the service manager that the loop runs, twice per interval."""
    while notifier.watchdog_interval:
        notifier.watchdog()
        await asyncio.sleep(notifier.watchdog_interval / 2)


async def _until_lost(connection: Connection) -> None:
    """Raise ``BusClosed`` when the bus is gone: without it nobody can be told anything."""
    raise await connection.closed()
