"""Calls that come before a service is ready to answer: kept in order, and no user keeps out another.

The bus knows which user a connection belongs to, and is asked; until it answers, calls count for their
connection alone. It allows a user 256 connections (max_connections_per_user of dbus-daemon).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Calls of one user, and of all, that may wait; root is not counted, and has room of its own.
PER_UID: Final = 64
IN_ALL: Final = 1024
ROOT_RESERVE: Final = 64
#: Calls of one connection whose user is not known yet, and of all such connections: more than one user's 256
#: connections together can have.
PER_NAME: Final = 8
UNKNOWN: Final = 4096
#: Connections whose user is remembered; of others the bus is asked again.
REMEMBERED: Final = 1024

_Call = TypeVar("_Call")


class EarlyCalls(Generic[_Call]):
    """The queue. ``ask`` gets the name of a connection whose user is not known, once for each."""

    def __init__(self, ask: Callable[[str], None], refuse: Callable[[_Call], None]) -> None:
        self._ask = ask
        self._refuse = refuse
        self._uids: OrderedDict[str, int] = OrderedDict()
        self._known: deque[tuple[int, _Call]] = deque()
        self._waiting: Counter[int] = Counter()
        self._unknown: OrderedDict[str, list[_Call]] = OrderedDict()
        self._unknown_calls = 0

    def __len__(self) -> int:
        return len(self._known) + self._unknown_calls

    def add(self, name: str, call: _Call) -> None:
        """A call of the connection ``name`` came; it waits, or is refused."""
        if name in self._uids:
            self._add_known(self._uids[name], call)
            return
        calls = self._unknown.setdefault(name, [])
        if len(calls) >= PER_NAME or self._unknown_calls >= UNKNOWN:
            if not calls:
                del self._unknown[name]
            self._refuse(call)
            return
        calls.append(call)
        self._unknown_calls += 1
        if len(calls) == 1:
            self._ask(name)

    def _add_known(self, uid: int, call: _Call) -> None:
        full = len(self._known) >= IN_ALL + (ROOT_RESERVE if uid == 0 else 0)
        if full or (uid != 0 and self._waiting[uid] >= PER_UID):
            self._refuse(call)
            return
        self._known.append((uid, call))
        self._waiting[uid] += 1

    def answered(self, name: str, uid: int | None) -> None:
        """The bus told whose connection ``name`` is; None: it is gone, and nobody waits for an answer."""
        calls = self._unknown.pop(name, [])
        self._unknown_calls -= len(calls)
        if uid is None:
            return
        self._uids[name] = uid
        if len(self._uids) > REMEMBERED:
            self._uids.popitem(last=False)
        for call in calls:
            self._add_known(uid, call)

    def take(self) -> Iterator[_Call]:
        """The calls that wait, in the order in which they came, those of unknown users last."""
        while self._known:
            uid, call = self._known.popleft()
            self._waiting[uid] -= 1
            yield call
        while self._unknown:
            _, calls = self._unknown.popitem(last=False)
            while calls:
                self._unknown_calls -= 1
                yield calls.pop(0)
        self._uids.clear()

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
        self._unknown.clear()
        self._waiting.clear()
        self._uids.clear()
        self._unknown_calls = 0
