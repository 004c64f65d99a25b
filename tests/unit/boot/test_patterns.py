"""Expressions of SELinux policies: what each dialect takes, and what it matches.

What is expected here was found with the crate ``regex-automata`` 0.4 and with PCRE2 10.43 themselves.
"""

from __future__ import annotations

import pytest

from hostimaged.boot import automaton, patterns
from hostimaged.boot.automaton import Automaton
from hostimaged.boot.patterns import MAX_NESTING, MAX_REPEAT, Dialect, parse
from hostimaged.errors import UnsupportedImage

RUST, PCRE2 = Dialect.RUST, Dialect.PCRE2


def matches(expression: str, text: bytes) -> bool:
    """As the automaton finds it, once it and the check on its own agree."""
    node, _ = parse(expression)
    engine = Automaton()
    regular = engine.add(7, node)
    found = engine.walk(engine.start(), text).found == (7,)
    checked = engine.matches(node, text)
    assert found == checked or (found and not regular)
    return checked


@pytest.mark.parametrize(
    ("expression", "dialect", "yes", "no"),
    [
        ("/usr(/.*)?", RUST, [b"/usr", b"/usr/", b"/usr/a\nb"], [b"/us", b"/usra"]),
        (r"/a\.so(\.[^/]*)*", RUST, [b"/a.so", b"/a.so.1.2"], [b"/aXso", b"/a.so.1/b"]),
        ("/(s)?bin", RUST, [b"/bin", b"/sbin"], [b"/ssbin"]),
        ("/[^/]{2,3}", RUST, [b"/ab", b"/abc"], [b"/a", b"/abcd", b"/a/"]),
        ("/a{2}b{1,}", RUST, [b"/aab", b"/aabbb"], [b"/ab", b"/aa"]),
        ("/a**+", RUST, [b"/", b"/aaa"], [b"/b"]),
        ("/a++b", RUST, [b"/aab"], [b"/b"]),
        ("/(a|b|)c", RUST, [b"/c", b"/ac"], [b"/abc"]),
        ("/é", RUST, ["/é".encode()], [b"/\xe9"]),
        ("/é+", RUST, ["/éé".encode()], [b"/\xc3\xa9\xa9"]),
        ("/[é]", PCRE2, [b"/\xc3", b"/\xa9"], ["/é".encode()]),
        (r"/\xe9", RUST, [b"/\xe9"], ["/é".encode()]),
        (r"/\x{e9}", RUST, ["/é".encode()], [b"/\xe9"]),
        ("/[[:alnum:]_]+", RUST, [b"/aZ9_"], [b"/-"]),
        ("/[[:^alpha:]]", RUST, [b"/1"], [b"/a"]),
        ("/[a-z&&[^b]]", RUST, [b"/a"], [b"/b", b"/&"]),
        ("/[a-c--b]", RUST, [b"/a"], [b"/b", b"/-"]),
        ("/[ab~~bc]", RUST, [b"/a", b"/c"], [b"/b"]),
        ("/[a[bc]]", RUST, [b"/a", b"/c"], [b"/[", b"/a]"]),
        ("/[]a-]+", RUST, [b"/]-a"], [b"/["]),
        ("/[--a]", RUST, [b"/a", b"/-"], [b"/b"]),
        ("/(?i:ab)c", RUST, [b"/aBc"], [b"/abC"]),
        ("/a(?i)b|C", RUST, [b"/aB", b"c"], [b"/Ab"]),
        ("/[^k](?i)[^k]", RUST, [b"/Kx"], [b"/xK", b"/kx"]),
        ("/(?P<n>a)(?<m>b)", RUST, [b"/ab"], [b"/a"]),
        (r"/\d\w\S", RUST, [b"/1a-"], [b"/aa-", b"/1a "]),
        (".*$", RUST, [b"/a"], []),
        ("^/a", RUST, [b"/a"], []),
        ("/^a", RUST, [], [b"/a"]),
        (r"/\bx\b", RUST, [b"/x"], []),
        (r"/x\b", RUST, [b"/x"], []),
        (r"/x\B", RUST, [], [b"/x"]),
        ("/(?!keep).*", PCRE2, [b"/kee", b"/x"], [b"/keep", b"/keeper"]),
        ("/(?=k).*", PCRE2, [b"/keep"], [b"/x"]),
        ("/.*(?<!a)b", PCRE2, [b"/b", b"/xb"], [b"/ab"]),
        ("/.*(?<=a)b", PCRE2, [b"/ab"], [b"/b"]),
        ("/(?!x).", PCRE2, [b"/a"], [b"/\n"]),
        (r"/\h\N", PCRE2, [b"/ a", b"/\xa0a"], [b"/aa", b"/ \n"]),
        ("/a{", PCRE2, [b"/a{"], [b"/a"]),
        ("/a{,2}b", PCRE2, [b"/b", b"/aab"], [b"/aaab"]),
        ("/(?!x)((a+)*|b){2}", PCRE2, [b"/", b"/aab"], [b"/bbb"]),
        ("/(?!x)[a[]+", PCRE2, [b"/a["], [b"/]"]),
    ],
)
def test_matching(expression: str, dialect: Dialect, yes: list[bytes], no: list[bytes]) -> None:
    assert parse(expression)[1] is dialect
    assert [text for text in yes if not matches(expression, text)] == []
    assert [text for text in no if matches(expression, text)] == []


@pytest.mark.parametrize(
    "expression",
    [
        "/a)",
        "/(a",
        "/[a",
        "/[b-a]",
        r"/(a)\1",
        "/(?>a)",
        "/(?!x)a++",
        "*a",
        "/(?x)a",
        "/(?m)a",
        "/\\",
        r"/\p{L}",
        "(*FAIL)",
        "(?#x)",
        r"/\Qa\E",
        "/[[:foo:]](?!x)",
        "/(?!x)[[.a.]]",
        r"/\b{start}",
        r"/(?=a)\x{100}",
    ],
)
def test_refused(expression: str) -> None:
    with pytest.raises(UnsupportedImage, match=r"expression .* of the SELinux policy: "):
        parse(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * (MAX_NESTING + 1) + ")" * (MAX_NESTING + 1),
        "[" * (MAX_NESTING + 1),
        "a" + "*" * (MAX_NESTING + 3),
        f"a{{{MAX_REPEAT + 1}}}",
        "a" * (patterns.MAX_PATTERN + 1),
    ],
    ids=["groups", "classes", "repetitions", "count", "length"],
)
def test_bounds(expression: str) -> None:
    with pytest.raises(UnsupportedImage):
        parse(expression)


def test_an_automaton_is_bounded() -> None:
    with pytest.raises(UnsupportedImage, match="too large"):
        Automaton().add(0, parse("((a{1000}){1000}){1000}")[0])


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backtracking engine would not end in a lifetime costs little; what costs much is refused."""
    engine = Automaton()
    engine.add(0, parse("/(a|a)*(a|a)*(a*)*b")[0])
    assert engine.walk(engine.start(), b"/" + b"a" * 4000).found == ()
    monkeypatch.setattr(automaton, "MAX_WORK", 100_000)
    engine = Automaton()
    engine.add(0, parse("/.*" + "(a|b).{900}" * 4)[0])
    with pytest.raises(UnsupportedImage, match="too long"):
        engine.walk(engine.start(), b"/" + b"ab" * 2000)
    look, _ = parse("/(?!x)(.*a)*(?<=(.*b)*)")
    with pytest.raises(UnsupportedImage, match="too long"):
        Automaton().matches(look, b"/" + b"ab" * 2000)


def test_states_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automaton, "MAX_KEPT", 500)
    engine = Automaton()
    engine.add(3, parse("/.*a.{20}")[0])
    engine.add(5, parse("/x(/.*)?")[0])
    for number in range(500):
        text = b"/x/" + bytes(97 + (number >> bit & 1) for bit in range(9)) + b"-" * 12
        expected = (5, 3) if b"a" in text[-21:-20] else (5,)
        assert engine.walk(engine.start(), text).found == expected
    assert engine._kept <= 2 * automaton.MAX_KEPT
