r"""Regular expressions of SELinux policies, parsed in the two dialects in which composefs-rs reads them.

composefs-rs compiles a rule with the Rust crate ``regex``, in bytes and without Unicode; what that syntax
refuses is compiled with PCRE2 instead. The dialects differ in details (nested classes; ``\h``; where braces
count), so each is parsed by its own rules, and neither is handed to Python's ``re``: that reads a third
dialect, and a hostile rule can keep it busy for ever. Facts: regex-syntax 0.8, pcre2pattern(3).

What PCRE2 has beyond regular languages and look-around (back references, atomic groups, recursion, verbs)
raises ``UnsupportedImage``: no policy is known to use it.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NoReturn

from hostimaged.boot.expressions import ANY, Alternate, Concat, Literal, Look, Place, Repeat, Set, bits_of
from hostimaged.errors import UnsupportedImage, printable

if TYPE_CHECKING:
    from hostimaged.boot.expressions import Node

#: Depth of groups, classes and repetitions inside each other. Real rules have about four; each level costs
#: stack in every function that walks a pattern.
MAX_NESTING: Final = 50
#: Largest count of a repetition. Real rules have none above 20.
MAX_REPEAT: Final = 1000
#: Characters of one rule's expression: paths have at most 4095 bytes.
MAX_PATTERN: Final = 16 << 10


class Dialect(Enum):
    """Whose syntax an expression is in."""

    RUST = auto()
    PCRE2 = auto()


class NotInDialect(Exception):
    """The Rust syntax refuses the expression: PCRE2 has to read it."""


def _span(low: int, high: int) -> int:
    return ((1 << (high - low + 1)) - 1) << low


_DIGIT: Final = _span(0x30, 0x39)
_UPPER: Final = _span(0x41, 0x5A)
_LOWER: Final = _span(0x61, 0x7A)
_WORD: Final = _DIGIT | _UPPER | _LOWER | 1 << 0x5F
_SPACE: Final = bits_of(b"\t\n\v\f\r ")
_PERL: Final = {"d": _DIGIT, "s": _SPACE, "w": _WORD}
_POSIX: Final = {
    "alnum": _DIGIT | _UPPER | _LOWER,
    "alpha": _UPPER | _LOWER,
    "ascii": _span(0, 0x7F),
    "blank": bits_of(b"\t "),
    "cntrl": _span(0, 0x1F) | 1 << 0x7F,
    "digit": _DIGIT,
    "graph": _span(0x21, 0x7E),
    "lower": _LOWER,
    "print": _span(0x20, 0x7E),
    "punct": _span(0x21, 0x7E) & ~(_DIGIT | _UPPER | _LOWER),
    "space": _SPACE,
    "upper": _UPPER,
    "word": _WORD,
    "xdigit": _DIGIT | bits_of(b"abcdefABCDEF"),
}
_PCRE_SETS: Final = {
    "h": bits_of(b"\t \xa0"),
    "v": bits_of(b"\n\v\f\r\x85"),
    "N": 1 << 0x0A ^ ANY,
}
_CONTROL: Final = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "e": "\x1b"}
_PLACES: Final = {
    "A": Place.START,
    "z": Place.END,
    "b": Place.WORD_EDGE,
    "B": Place.NO_WORD_EDGE,
    "<": Place.WORD_START,
    ">": Place.WORD_END,
}
# Characters that stand for themselves, alone or escaped, and no quantifier after the last: most of any rule.
_RUN: Final = re.compile(r"(?:(?:[\w/\-,:;@=!\"'%~&<> ]|\\[./\-+*?()\[\]{}|^$,_@=:~ ])(?![*+?{]))+", re.ASCII)
_ESCAPED: Final = re.compile(r"\\(.)")
_COUNT: Final = re.compile(r"\{(\d+)(,(\d*))?\}", re.ASCII)
# Without a minimum since PCRE2 10.43; it was literal text before.
_PCRE_COUNT: Final = re.compile(r"\{(?:\d+(?:,\d*)?|,(\d+))\}", re.ASCII)
_CLASS_NAME: Final = re.compile(r"\[:(\^?)([a-z]+):\]")
_PCRE_NAMED: Final = re.compile(r"\[([:.=])[^\]]*\1\]")
_GROUP_NAME: Final = re.compile(r"\?P?<[A-Za-z_][A-Za-z0-9_.\[\]]*>")
_FLAGS: Final = re.compile(r"\?([a-zA-Z]*)(-[a-zA-Z]+)?([:)])")
_NAMED_EDGE: Final = re.compile(r"\{[A-Za-z]")
_HEX_TWO: Final = re.compile(r"[0-9a-fA-F]{2}")
_HEX_BRACE: Final = re.compile(r"\{([0-9a-fA-F]{1,8})\}")
_CLASS_OPERATORS: Final = ("&&", "--", "~~")
_LOOKS: Final = {"?=": (True, False), "?!": (True, True), "?<=": (False, False), "?<!": (False, True)}


def parse(text: str) -> tuple[Node, Dialect]:
    """The expression ``text`` and the dialect it is in: Rust's unless that refuses it.

    Raises ``UnsupportedImage`` for what neither takes, and for what is beyond the limits here.
    """
    if len(text) > MAX_PATTERN:
        raise UnsupportedImage(f"an expression of the SELinux policy is longer than {MAX_PATTERN} characters")
    try:
        return _Parser(text).whole(), Dialect.RUST
    except NotInDialect:
        return _PcreParser(text.encode().decode("latin-1")).whole(), Dialect.PCRE2


class _Parser:
    """Rust's syntax. Its subclass says what PCRE2 does otherwise."""

    #: What the characters of the text stand for.
    charset = "utf-8"
    #: What ``.`` matches: the line terminator is NUL.
    dot = ANY & ~1

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.chained = 0
        self.fold = False
        self.dot_all = False

    def whole(self) -> Node:
        node = self.alternation()
        if self.at != len(self.text):
            self.fail("an unmatched )")
        return node

    def fail(self, why: str) -> NoReturn:
        """The syntax is not this dialect's."""
        raise NotInDialect(why)

    def unsupported(self, why: str) -> NoReturn:
        """Neither this dialect nor another helps."""
        raise UnsupportedImage(f"the expression {printable(self.text)} of the SELinux policy: {why}")

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            self.unsupported("nested too deeply")

    def looking_at(self, word: str) -> bool:
        return self.text.startswith(word, self.at)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """The next character; there must be one."""
        if self.at >= len(self.text):
            self.fail("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    # --- groups ---------------------------------------------------------------------------------------------

    def alternation(self) -> Node:
        """Up to the end or an unmatched ``)``, which stays."""
        branches = [self.concatenation()]
        while self.looking_at("|"):
            self.at += 1
            branches.append(self.concatenation())
        return branches[0] if len(branches) == 1 else Alternate(tuple(branches))

    def concatenation(self) -> Node:
        items: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if not self.fold and (run := _RUN.match(self.text, self.at)):
                self.at = run.end()
                items.append(Literal(_ESCAPED.sub(r"\1", run[0]).encode(self.charset)))
                continue
            atom = self.atom()
            if atom is not None:
                items.append(self.quantified(atom))
            elif self.quantifier_ahead():
                self.fail("a quantifier with nothing to repeat")
        return items[0] if len(items) == 1 else Concat(tuple(items))

    def atom(self) -> Node | None:
        """The next thing that can be repeated, or None for flags."""
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return Set(self.bracketed())
        if character == ".":
            return Set(ANY if self.dot_all else self.dot)
        if character == "\\":
            return self.escape()
        if character in "^$":
            return Place.START if character == "^" else Place.END
        if character in "*+?" or (character == "{" and self.counts(self.at - 1)):
            self.fail("a quantifier with nothing to repeat")
        return self.literal(character)

    def literal(self, character: str) -> Node:
        if self.fold and character.isascii() and character.isalpha():
            return Set(_folded(1 << ord(character)))
        return Literal(character.encode(self.charset))

    def group(self) -> Node | None:
        """A group whose ``(`` was just taken; None if it only sets flags."""
        for opening, (ahead, negative) in _LOOKS.items():
            if self.looking_at(opening):
                self.no_look_around()
                self.at += len(opening)
                return Look(self.inside(), ahead, negative)
        saved = self.fold, self.dot_all
        if name := _GROUP_NAME.match(self.text, self.at):
            self.at = name.end()
        elif self.looking_at("?"):
            flags = _FLAGS.match(self.text, self.at)
            if flags is None or not any(flags[0].strip("?)")):
                self.fail("an unknown kind of group")
            self.at = flags.end()
            self.set_flags(flags[1], (flags[2] or "-")[1:])
            if flags[3] == ")":
                return None
        elif self.looking_at("*"):
            self.fail("a verb")
        node = self.inside()
        self.fold, self.dot_all = saved
        return node

    def no_look_around(self) -> None:
        self.fail("look-around")

    def inside(self) -> Node:
        saved = self.fold, self.dot_all
        self.enter()
        node = self.alternation()
        if self.take() != ")":
            self.fail("an unclosed group")
        self.depth -= 1
        self.fold, self.dot_all = saved
        return node

    #: Flags that make no difference to whether an expression matches.
    idle_flags = "U"

    def set_flags(self, on: str, off: str) -> None:
        for letters, value in ((on, True), (off, False)):
            for letter in letters:
                if letter == "i":
                    self.fold = value
                elif letter == "s":
                    self.dot_all = value
                elif letter in "mxuR":
                    self.unsupported(f"flag {letter}")
                elif letter not in self.idle_flags:
                    self.fail("an unknown flag")

    # --- repetition -----------------------------------------------------------------------------------------

    def quantifier_ahead(self) -> bool:
        following = self.peek()
        return following != "" and (following in "*+?" or (following == "{" and self.counts(self.at)))

    def counts(self, brace: int) -> bool:
        """Whether the ``{`` there begins a repetition; in Rust each does."""
        return self.text[brace] == "{"

    def quantified(self, node: Node) -> Node:
        count = 0
        while self.quantifier_ahead():
            count += 1
            if count > 1:
                self.check_chain()
            low, high = self.count()
            if self.looking_at("?"):
                self.at += 1
            node = Repeat(node, low, high)
        return node

    def check_chain(self) -> None:
        """For a quantifier after another: in Rust it repeats the repetition."""
        self.chained += 1
        if self.chained > MAX_NESTING:
            self.unsupported("nested too deeply")

    def count(self) -> tuple[int, int | None]:
        sign = self.peek()
        if sign != "{":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        found = _COUNT.match(self.text, self.at)
        if found is None:
            self.fail("a repetition without a count")
        self.at = found.end()
        low = self.number(found[1])
        high = low if found[2] is None else self.number(found[3]) if found[3] else None
        if high is not None and high < low:
            self.fail("a repetition that counts down")
        return low, high

    def number(self, digits: str) -> int:
        value = int(digits[:8])
        if value > MAX_REPEAT:
            self.unsupported(f"a repetition of more than {MAX_REPEAT}")
        return value

    # --- escapes --------------------------------------------------------------------------------------------

    def escape(self) -> Node | None:
        """What follows a backslash outside of classes."""
        if self.peek() in _PLACES:
            place = self.take()
            if place == "b" and _NAMED_EDGE.match(self.text, self.at):
                self.unsupported("a named word boundary")
            return _PLACES[place]
        item = self.class_escape()
        if isinstance(item, int):
            return Set(item)
        return self.literal(item.decode()) if self.fold and item.isascii() else Literal(item)

    def class_escape(self) -> int | bytes:
        """What follows a backslash, as far as it may be in a class: a set, or one character."""
        letter = self.take()
        if letter.lower() in _PERL:
            bits = _PERL[letter.lower()]
            return bits if letter.islower() else bits ^ ANY
        if letter == "x":
            return self.hexadecimal()
        if letter in _CONTROL and letter != "e":
            return _CONTROL[letter].encode()
        if not letter.isascii() or letter.isalnum() or letter in "<>":
            self.fail("an unknown escape")
        return letter.encode()

    def hexadecimal(self) -> bytes:
        if two := _HEX_TWO.match(self.text, self.at):
            self.at = two.end()
            return bytes([int(two[0], 16)])
        brace = _HEX_BRACE.match(self.text, self.at)
        if brace is None:
            self.fail("a malformed hexadecimal escape")
        self.at = brace.end()
        value = int(brace[1], 16)
        if value > 0x10FFFF or 0xD800 <= value < 0xE000:
            self.fail("no character")
        return chr(value).encode()

    # --- classes --------------------------------------------------------------------------------------------

    def bracketed(self) -> int:
        """A class whose ``[`` was just taken: nested classes, and operators from left to right."""
        self.enter()
        negated = self.looking_at("^")
        self.at += negated
        result, operator, union = 0, "", 0
        started = self.at
        while self.looking_at("-"):
            self.at += 1
            union |= 1 << 0x2D
        if self.at == started and self.looking_at("]"):
            self.at += 1
            union |= 1 << 0x5D
        while not self.looking_at("]"):
            if self.looking_at("["):
                union |= self.nested_class()
            elif self.text[self.at : self.at + 2] in _CLASS_OPERATORS:
                result, operator, union = _operate(result, operator, union), self.take(), 0
                self.at += 1
            else:
                union |= self.class_range()
        self.at += 1
        self.depth -= 1
        # Folded before it is negated: what is not "k" in any case is not "K" either.
        bits = _operate(result, operator, union)
        return bits ^ ANY if negated else bits

    def nested_class(self) -> int:
        if named := _CLASS_NAME.match(self.text, self.at):
            bits = _POSIX.get(named[2])
            if bits is not None:
                self.at = named.end()
                bits = _folded(bits) if self.fold else bits
                return bits ^ ANY if named[1] else bits
        self.at += 1
        return self.bracketed()

    def class_range(self) -> int:
        """A character, an escape, or a range."""
        first = self.class_item()
        following = self.text[self.at : self.at + 2]
        if following[:1] != "-" or following in ("-]", "--", "-"):
            return self.class_bits(first)
        self.at += 1
        last = self.class_item()
        if (
            isinstance(first, int)
            or isinstance(last, int)
            or len(first) != 1
            or len(last) != 1
            or last < first
        ):
            self.fail("a malformed range")
        return self.class_bits(_span(first[0], last[0]))

    def class_item(self) -> int | bytes:
        character = self.take()
        return self.class_escape() if character == "\\" else character.encode(self.charset)

    def class_bits(self, item: int | bytes) -> int:
        if isinstance(item, bytes):
            if len(item) != 1:
                self.fail("a character that is no byte in a class")
            item = 1 << item[0]
        return _folded(item) if self.fold else item


class _PcreParser(_Parser):
    """PCRE2's syntax, as far as it is supported; the text has one character for each byte."""

    charset = "latin-1"
    # Without NUL, which no path has.
    dot = ANY & ~(1 | 1 << 0x0A)
    idle_flags = "UJn"

    def fail(self, why: str) -> NoReturn:
        self.unsupported(why)

    def no_look_around(self) -> None:
        """There is look-around."""

    def counts(self, brace: int) -> bool:
        return _PCRE_COUNT.match(self.text, brace) is not None

    def count(self) -> tuple[int, int | None]:
        if self.looking_at("{,"):
            found = _PCRE_COUNT.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            return 0, self.number(found[1])
        return super().count()

    def check_chain(self) -> None:
        self.unsupported("a quantifier after another")

    def escape(self) -> Node | None:
        following = self.peek()
        if following in ("<", ">"):
            return self.literal(self.take())
        if following in ("Z", "G", "K", "R", "X", "Q", "E"):
            self.unsupported(f"\\{following}")
        return super().escape()

    def class_escape(self) -> int | bytes:
        following = self.peek()
        if following.lower() in _PCRE_SETS or following == "N":
            self.at += 1
            return _PCRE_SETS.get(following) or _PCRE_SETS[following.lower()] ^ ANY
        if following in ("e", "<", ">"):
            self.at += 1
            return _CONTROL.get(following, following).encode()
        return super().class_escape()

    def hexadecimal(self) -> bytes:
        data = super().hexadecimal()
        if len(data) != 1:
            self.unsupported("a character that is no byte")
        return data

    def bracketed(self) -> int:
        negated = self.looking_at("^")
        self.at += negated
        bits, first = 0, True
        while first or not self.looking_at("]"):
            first = False
            if (named := _CLASS_NAME.match(self.text, self.at)) and named[2] in _POSIX:
                self.at = named.end()
                bits |= _POSIX[named[2]] ^ (ANY if named[1] else 0)
            elif _PCRE_NAMED.match(self.text, self.at):
                self.unsupported("an unknown class")
            else:
                bits |= self.class_range()
        self.at += 1
        return bits ^ ANY if negated else bits


def _operate(left: int, operator: str, right: int) -> int:
    """Both sides of an operator of classes, named by its first character; none yet: the right side."""
    if operator == "&":
        return left & right
    if operator == "-":
        return left & ~right
    return left ^ right


def _folded(bits: int) -> int:
    """With the other case of each ASCII letter."""
    return bits | (bits & _UPPER) << 0x20 | (bits & _LOWER) >> 0x20
