"""Fixtures of every test: no leaks, no blocking calls in the event loop, peers."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings

from hostimage_testing.registry import Registry, running_registry
from hostimage_testing.tools import require

OUR_PACKAGES = ["hostimaged", "hostimagectl", "hostimage_dbus"]

settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("soak", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell, as CI does: programs that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    # The listing's own descriptor, and files Python opens once and keeps.
    return {fd: to for fd, to in found.items() if not to.startswith(("/proc/", "/dev/null", "/dev/urandom"))}


def _children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update((task / "children").read_text().split())
        except OSError:
            continue
    return found


def _leaks(files: dict[int, str], children: set[str], threads: set[threading.Thread]) -> list[str]:
    leaked_files = {fd: to for fd, to in _open_files().items() if files.get(fd) != to}
    leaked_threads = [t for t in threading.enumerate() if t not in threads and t.is_alive() and not _kept(t)]
    leaked = [f"file descriptor {fd}: {to}" for fd, to in leaked_files.items()]
    leaked += [f"child process {pid}" for pid in _children() - children]
    leaked += [f"thread {t.name}" for t in leaked_threads]
    return leaked


def _kept(thread: threading.Thread) -> bool:
    # pytest-timeout's watch thread outlives the test it watches by a moment.
    return thread.name.startswith("pytest_timeout") or "pytest_timeout" in repr(
        getattr(thread, "function", "")
    )


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail any test that leaves a file descriptor, child process, thread or task behind."""
    if inspect.iscoroutinefunction(getattr(request.function, "__wrapped__", request.function)):
        request.getfixturevalue("no_tasks_left")
    before = (_open_files(), _children(), set(threading.enumerate()))
    yield
    if _leaks(*before):
        gc.collect()
        if leaked := _leaks(*before):
            pytest.fail("left behind: " + ", ".join(leaked), pytrace=False)


@pytest_asyncio.fixture
async def no_tasks_left() -> AsyncIterator[None]:
    """Fail an asynchronous test that leaves a task running, or calls something that blocks the loop."""
    with blockbuster_ctx(OUR_PACKAGES):
        yield
    current = asyncio.current_task()
    if left := [t for t in asyncio.all_tasks() if t is not current and not t.done()]:
        pytest.fail(f"tasks left behind: {left}", pytrace=False)


@pytest.fixture(scope="session")
def cfsctl() -> str:
    """The reference implementation, composefs-rs's command line tool."""
    return require("cfsctl")


@pytest.fixture(scope="session")
def skopeo() -> str:
    """The real skopeo."""
    return require("skopeo")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry on loopback, shared by the tests of a session."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
