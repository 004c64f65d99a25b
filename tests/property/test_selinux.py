"""Labels by rules of the part of their language that Python's ``re`` reads alike: those that it gives."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimaged.boot import automaton
from hostimaged.boot.selinux import XATTR, Policy, Rule, relabel
from hostimaged.composefs.tree import Directory, Inline, Leaf, Stat, walk

STAT = Stat(0o755, 0, 0, 0, 0, {})
KINDS = {"d": "-d", "-": "--"}

atoms = st.sampled_from(
    ["a", "b", "/", r"\.", "[ab]", "[^/]", "[^ab]", ".", "-", r"\d", "(?:a|/b)", "(?!a)", "(?<!b)"]
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "?", "+", "{1,2}", "{2}"])).map(
            lambda it: f"({it[0]}){it[1]}"
        ),
    ),
    max_leaves=8,
)
rules = st.lists(
    st.builds(
        lambda text, kind, label: Rule("/" + text, kind and ord(kind), label),
        expressions,
        st.sampled_from([None, "d", "-"]),
        st.sampled_from([None, b"one", b"two", b"three"]),
    ),
    max_size=12,
)
names = st.text("ab.-1", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
trees = st.recursive(
    st.just(None), lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=12
).filter(lambda made: made is not None)


def expected(found: list[Rule], path: bytes, kind: str) -> bytes | None:
    label = None
    for rule in found:
        ending = "." if rule.kind is None else re.escape(chr(rule.kind))
        if re.match(rf"^({rule.expression}){ending}\Z".encode(), path + kind.encode(), re.DOTALL):
            label = rule.label
    return label


def made(shape: dict[str, object]) -> Directory:
    return Directory(
        STAT,
        {
            name.encode(): made(below) if isinstance(below, dict) else Leaf(STAT, Inline(b""))
            for name, below in shape.items()
        },
    )


@given(rules, trees)
@settings(max_examples=150)
def test_labels(found: list[Rule], shape: dict[str, object]) -> None:
    root = made(shape)
    relabel(root, Policy(found, {}))
    for path, node in walk(root):
        kind = "d" if isinstance(node, Directory) else "-"
        assert node.stat.xattrs.get(XATTR) == expected(found, path, kind), path


@given(rules, st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), max_size=12))
@settings(max_examples=60)
def test_forgetting_states_changes_nothing(found: list[Rule], tails: list[str]) -> None:
    """With room for hardly any state, as in an image that makes very many."""
    paths = [b"/" + tail.encode() for tail in tails]
    plenty = [Policy(found, {}).label(path, ord("-")) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automaton, "MAX_KEPT", 30)
        policy = Policy(found, {})
        assert [policy.label(path, ord("-")) for path in paths] == plenty
