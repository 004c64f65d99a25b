"""Matches a path against thousands of expressions at once, in time that its length alone decides.

All expressions are one non-deterministic automaton; the deterministic one is built as paths ask for it, and
what was built is kept within bounds. Leading literal text is a trie, so that the rules of one directory cost
nothing elsewhere. Walking a tree, a directory's state serves all its children. Nothing backtracks: an image
may bring any expression. What no automaton can express (look-around, conditions on a position) is
first matched without the conditions, and then checked on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.boot.expressions import (
    Alternate,
    Concat,
    Literal,
    Look,
    Place,
    Repeat,
    Set,
)
from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.boot.expressions import Node

#: States of the non-deterministic automaton, up to 300 bytes each. The policy of Fedora makes about 100,000.
MAX_NODES: Final = 500_000
#: Steps of building states and of checking irregular expressions, each about 100 ns. The policy of Fedora and
#: an image of 100,000 files take one or two millions.
MAX_WORK: Final = 100_000_000
#: Nodes in the states kept, together; beyond it all are forgotten and built anew as needed. Bounds memory.
MAX_KEPT: Final = 2_000_000

_WORD: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


class State:
    """A set of nodes: where the expressions may be after some bytes. ``found`` are rules that end here.

    ``found`` is in descending order. ``results`` is for the caller, who may note there what he made of them.
    """

    __slots__ = ("found", "nodes", "results", "steps", "trie")

    def __init__(self, nodes: tuple[int, ...], found: tuple[int, ...], trie: int) -> None:
        self.nodes = nodes
        self.found = found
        self.trie = trie
        self.steps: dict[int, State] = {}
        self.results: dict[int, int | None] = {}


class Automaton:
    """The expressions by rule number. Add all, then walk from ``start``."""

    def __init__(self) -> None:
        # A node consumes one byte of the set ``_tables[node]`` and leads to ``_next[node]``; without a set it
        # leads to all of ``_forks[node]`` at once, or ends the rule ``_ends[node]``.
        self._tables: list[bytes | None] = []
        self._next: list[int] = []
        self._forks: dict[int, tuple[int, ...]] = {}
        self._ends: dict[int, int] = {}
        self._closures: dict[int, tuple[int, ...]] = {}
        # The trie: children by byte, and the nodes that go on from there.
        self._children: list[dict[int, int]] = [{}]
        self._hanging: dict[int, list[int]] = {}
        self._sets: dict[int, bytes] = {1 << byte: _table(1 << byte) for byte in range(256)}
        self._states: dict[tuple[frozenset[int], int], State] = {}
        self._kept = 0
        self._work = 0

    # --- building -------------------------------------------------------------------------------------------

    def add(self, rule: int, node: Node) -> bool:
        """Add the expression of ``rule``, and say whether it is regular.

        If not, the rule is also found where only its conditions fail: ask ``matches`` then. Raises
        ``UnsupportedImage`` when all expressions together are too large.
        """
        end = self._new(None, 0)
        self._ends[end] = rule
        prefix, rest = _split(node)
        self._hanging.setdefault(self._trie(prefix), []).append(self._build(rest, end))
        return is_regular(node)

    def _trie(self, prefix: bytes) -> int:
        at = 0
        for byte in prefix:
            child = self._children[at].get(byte)
            if child is None:
                child = len(self._children)
                self._children[at][byte] = child
                self._children.append({})
                self._check_size()
            at = child
        return at

    def _new(self, table: bytes | None, following: int) -> int:
        self._tables.append(table)
        self._next.append(following)
        self._check_size()
        return len(self._tables) - 1

    def _check_size(self) -> None:
        if len(self._tables) + len(self._children) > MAX_NODES:
            raise UnsupportedImage("the SELinux policy of the image is too large")

    def _build(self, node: Node, following: int) -> int:
        """Nodes for ``node`` that lead on to ``following``; the first of them."""
        if isinstance(node, Literal):
            for byte in reversed(node.data):
                following = self._new(self._sets[1 << byte], following)
            return following
        if isinstance(node, Set):
            table = self._sets.get(node.bits)
            if table is None:
                table = self._sets[node.bits] = _table(node.bits)
            return self._new(table, following)
        if isinstance(node, Concat):
            for item in reversed(node.items):
                following = self._build(item, following)
            return following
        if isinstance(node, Alternate):
            return self._fork(*[self._build(item, following) for item in node.items])
        if isinstance(node, Repeat):
            return self._repeat(node, following)
        # A condition, which takes no bytes: without it the expression matches all it does, and more.
        return following

    def _repeat(self, node: Repeat, following: int) -> int:
        if node.high is None:
            loop = self._new(None, 0)
            self._forks[loop] = (self._build(node.node, loop), following)
            following = loop
        else:
            after = following
            for _ in range(node.high - node.low):
                following = self._fork(self._build(node.node, following), after)
        for _ in range(node.low):
            following = self._build(node.node, following)
        return following

    def _fork(self, *targets: int) -> int:
        node = self._new(None, 0)
        self._forks[node] = targets
        return node

    # --- walking --------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state before any byte."""
        return self._state(set(self._hung(0)), 0)

    def walk(self, state: State, data: bytes) -> State:
        """The state after ``data``. Raises ``UnsupportedImage`` when all this has become too much work."""
        for byte in data:
            following = state.steps.get(byte)
            if following is None:
                following = state.steps[byte] = self._step(state, byte)
            state = following
        return state

    def _step(self, state: State, byte: int) -> State:
        tables, following = self._tables, self._next
        targets = {following[node] for node in state.nodes if tables[node][byte]}  # type: ignore[index]
        reached: set[int] = set()
        work = len(state.nodes) + 1
        for target in targets:
            closure = self._closure(target)
            reached.update(closure)
            work += len(closure)
        trie = self._children[state.trie].get(byte, -1) if state.trie >= 0 else -1
        if trie >= 0:
            hung = self._hung(trie)
            reached.update(hung)
            work += len(hung)
        self.spend(work)
        return self._state(reached, trie)

    def _hung(self, trie: int) -> list[int]:
        return [node for entry in self._hanging.get(trie, ()) for node in self._closure(entry)]

    def _closure(self, node: int) -> tuple[int, ...]:
        """What is reached from ``node`` without a byte: nodes that take one, and ends."""
        known = self._closures.get(node)
        if known is not None:
            return known
        seen = {node}
        pending = [node]
        reached = []
        while pending:
            at = pending.pop()
            if self._tables[at] is not None or at in self._ends:
                reached.append(at)
                continue
            for target in self._forks.get(at, ()):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        self.spend(len(seen))
        closure = self._closures[node] = tuple(reached)
        self._kept += len(closure)
        return closure

    def _state(self, reached: set[int], trie: int) -> State:
        key = (frozenset(reached), trie)
        state = self._states.get(key)
        if state is None:
            ends = self._ends
            found = sorted({ends[node] for node in reached if node in ends}, reverse=True)
            state = State(tuple(node for node in reached if node not in ends), tuple(found), trie)
            self._kept += 2 * len(reached) + 20
            if self._kept > MAX_KEPT:
                self._forget()
            self._states[key] = state
        return state

    def _forget(self) -> None:
        """Let go of all states but those that the caller is in."""
        for state in self._states.values():
            state.steps.clear()
        self._states.clear()
        self._closures.clear()
        self._kept = 0

    def spend(self, amount: int) -> None:
        """Count work. Raises ``UnsupportedImage`` when it is too much."""
        self._work += amount
        if self._work > MAX_WORK:
            raise UnsupportedImage("the SELinux policy of the image takes too long to apply")

    def matches(self, node: Node, text: bytes) -> bool:
        """Whether an expression, irregular or not, matches all of ``text``."""
        return len(text) in self._after(node, text, frozenset([0]))

    def _after(self, node: Node, text: bytes, before: Iterable[int]) -> frozenset[int]:
        """The positions in ``text`` where ``node`` may end if it begins at one of ``before``."""
        before = frozenset(before)
        self.spend(len(before) + 1)
        if isinstance(node, Literal):
            size = len(node.data)
            return frozenset(at + size for at in before if text.startswith(node.data, at))
        if isinstance(node, Set):
            return frozenset(at + 1 for at in before if at < len(text) and node.bits >> text[at] & 1)
        if isinstance(node, Concat):
            for item in node.items:
                before = self._after(item, text, before)
            return before
        if isinstance(node, Alternate):
            return frozenset().union(*[self._after(item, text, before) for item in node.items])
        if isinstance(node, Repeat):
            return self._after_repeat(node, text, before)
        if isinstance(node, Look):
            return frozenset(at for at in before if self._sees(node, text, at) != node.negative)
        return frozenset(at for at in before if _is_at(node, text, at))

    def _after_repeat(self, node: Repeat, text: bytes, before: frozenset[int]) -> frozenset[int]:
        for _ in range(node.low):
            before = self._after(node.node, text, before)
        reached = before
        rounds = 0
        while before and (node.high is None or rounds < node.high - node.low):
            before = self._after(node.node, text, before) - reached
            reached |= before
            rounds += 1
        return reached

    def _sees(self, look: Look, text: bytes, at: int) -> bool:
        if look.ahead:
            return bool(self._after(look.node, text, [at]))
        return any(at in self._after(look.node, text, [start]) for start in range(at + 1))


def is_regular(node: Node) -> bool:
    """Whether there is neither look-around nor a condition on a position in it."""
    if isinstance(node, Concat | Alternate):
        return all(is_regular(item) for item in node.items)
    if isinstance(node, Repeat):
        return is_regular(node.node)
    return isinstance(node, Literal | Set)


def _split(node: Node) -> tuple[bytes, Node]:
    """The literal text that ``node`` begins with, and what follows it."""
    if isinstance(node, Literal):
        return node.data, Concat(())
    if isinstance(node, Concat):
        prefix = b""
        for count, item in enumerate(node.items):
            if not isinstance(item, Literal):
                return prefix, Concat(node.items[count:])
            prefix += item.data
        return prefix, Concat(())
    return b"", node


def _table(bits: int) -> bytes:
    return bytes(bits >> byte & 1 for byte in range(256))


def _is_at(place: Place, text: bytes, at: int) -> bool:
    if place is Place.START:
        return at == 0
    if place is Place.END:
        return at == len(text)
    before = at > 0 and text[at - 1] in _WORD
    after = at < len(text) and text[at] in _WORD
    if place is Place.WORD_START:
        return after and not before
    if place is Place.WORD_END:
        return before and not after
    return (before != after) == (place is Place.WORD_EDGE)
