"""Connections of other users to a bus; being root is needed to make them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import pytest

from hostimage_dbus.transport import Connection
from hostimage_testing.bus import Bus, Client

NOBODY = 65534
#: A second user, whom every system knows ("daemon"): the bus turns unknown ones away.
SOMEBODY = 1
NEEDS_ROOT = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
]


_Test = TypeVar("_Test", bound=Callable[..., object])


def needs_root(test: _Test) -> _Test:
    """Marks one test with ``NEEDS_ROOT``."""
    for mark in NEEDS_ROOT:
        test = mark(test)
    return test


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """The bus learns our uid from the socket when we connect."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@asynccontextmanager
async def user(bus: Bus, uid: int = NOBODY) -> AsyncIterator[Client]:
    """A client that connected as ``uid``."""
    with as_user(uid):
        connection = await Connection.connect(bus.abstract)
    try:
        assert await connection.unix_user(connection.unique_name) == uid
        client = Client(connection)
        await client.subscribe()
        yield client
    finally:
        await connection.close()
