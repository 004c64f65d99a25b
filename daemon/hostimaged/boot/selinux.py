"""SELinux labels of an image, from the policy that the image itself brings.

Facts: composefs-rs 0.9, ``composefs-boot`` (labels); file_contexts(5) for the files. The last rule that
matches decides, in the order of reading: libselinux sorts by how specific a rule is, composefs-rs does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from hostimaged.boot.automaton import Automaton
from hostimaged.boot.expressions import Concat, Literal
from hostimaged.boot.patterns import parse
from hostimaged.composefs.bulk import no_gc
from hostimaged.composefs.tree import (
    BlockDevice,
    CharDevice,
    Directory,
    Fifo,
    Leaf,
    Socket,
    Symlink,
)
from hostimaged.errors import UnsupportedImage, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.automaton import State
    from hostimaged.boot.expressions import Node
    from hostimaged.boot.files import ImageFiles
    from hostimaged.composefs.tree import Stat

#: Bytes of one file of the policy. Fedora's ``file_contexts`` has half a million.
MAX_POLICY_FILE: Final = 16 << 20
#: Bytes of ``/etc/selinux/config``.
MAX_CONFIG: Final = 1 << 20
#: Rules, and substitutions, of a policy. Fedora's has about 6,000 and 50.
MAX_RULES: Final = 100_000
#: The attribute that holds a label.
XATTR: Final = b"security.selinux"

_DIRECTORY: Final = "/etc/selinux"
_CONTEXTS: Final = (("", True), (".local", False), (".homedirs", False))
_SUBSTITUTIONS: Final = (".subs", ".subs_dist")
_NO_LABEL: Final = "<<none>>"
_TYPES: Final = {f"-{kind}": ord(kind) for kind in "bcdpls-"}
# White space as Unicode has it: Python's own notion adds four control characters.
_SPACE: Final = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WORDS: Final = re.compile(f"[^{_SPACE}]+")
_TRIM: Final = re.compile(f"^[{_SPACE}]+|[{_SPACE}]+$")
_KIND_OF: Final = {
    BlockDevice: ord("b"),
    CharDevice: ord("c"),
    Fifo: ord("p"),
    Socket: ord("s"),
    Symlink: ord("l"),
}
_FILE: Final = ord("-")
_DIR: Final = ord("d")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of ``file_contexts``: inodes of ``kind`` (None: of any) whose path matches get ``label``.

    ``kind`` is the character that selabel_file(5) has for it, as a number; ``label`` is None for no label.
    """

    expression: str
    kind: int | None
    label: bytes | None


class Policy:
    """The rules of a policy and its substitutions of paths."""

    def __init__(self, rules: list[Rule], aliases: dict[bytes, bytes]) -> None:
        self._rules = rules
        self.aliases = aliases
        self._automaton = Automaton()
        # Expressions that have to be checked again, as the automaton finds them too often.
        self._irregular: dict[int, Node] = {}
        for number, rule in enumerate(rules):
            node, _ = parse(rule.expression)
            if not self._automaton.add(number, node):
                self._irregular[number] = node

    @classmethod
    def load(cls, files: ImageFiles) -> Policy | None:
        """The policy of an image, or None if it names none.

        Raises ``UnsupportedImage`` for a policy that is named and not whole, or malformed.
        """
        policy_type = _policy_type(files)
        if policy_type is None:
            return None
        base = f"{_DIRECTORY}/{policy_type}/contexts/files/file_contexts"
        rules: list[Rule] = []
        for suffix, required in _CONTEXTS:
            data = files.read(base + suffix, MAX_POLICY_FILE, follow=False)
            if data is not None:
                rules += parse_contexts(data, base + suffix)
            elif required:
                raise UnsupportedImage(f"{printable(base)} of the image is missing")
            if len(rules) > MAX_RULES:
                raise UnsupportedImage(f"the SELinux policy of the image has more than {MAX_RULES} rules")
        aliases: dict[bytes, bytes] = {}
        for suffix in _SUBSTITUTIONS:
            data = files.read(base + suffix, MAX_POLICY_FILE, follow=False)
            if data is not None:
                aliases |= parse_substitutions(data, base + suffix)
        return cls(rules, aliases)

    def start(self) -> State:
        """Where a path begins."""
        return self._automaton.start()

    def walk(self, state: State, data: bytes) -> State:
        """Where a path goes on with ``data``."""
        return self._automaton.walk(state, data)

    def label(self, path: bytes, kind: int) -> bytes | None:
        """The label of ``path``, substitutions not considered; ``kind`` as in ``Rule``."""
        return self.label_at(self.walk(self.start(), path), path, kind)

    def label_at(self, state: State, path: bytes, kind: int) -> bytes | None:
        """As ``label``, for a path whose state is known."""
        results = state.results
        if kind not in results:
            if self._irregular and any(number in self._irregular for number in state.found):
                return self._label_of(self._decide(state, path, kind))
            results[kind] = self._decide(state, path, kind)
        return self._label_of(results[kind])

    def _label_of(self, number: int | None) -> bytes | None:
        return None if number is None else self._rules[number].label

    def _decide(self, state: State, path: bytes, kind: int) -> int | None:
        """The last rule that matches."""
        for number in state.found:
            if self._rules[number].kind not in (None, kind):
                continue
            node = self._irregular.get(number)
            if node is None or self._check(node, path, kind):
                return number
        return None

    def _check(self, node: Node, path: bytes, kind: int) -> bool:
        """Look-around may see the character of the kind too, which ends what is matched."""
        ending = bytes([kind])
        return self._automaton.matches(Concat((node, Literal(ending))), path + ending)


def relabel(root: Directory, policy: Policy | None) -> None:
    """Give every inode its label, and none where the policy has none or is None itself.

    A hard link whose name asks for another label than the first name got becomes an inode of its own.
    Raises ``UnsupportedImage`` when applying the policy takes too long.
    """
    if policy is None:
        _strip(root)
        return
    with no_gc():
        _Labels(policy).run(root)


def parse_contexts(data: bytes, name: str) -> Iterator[Rule]:
    """The rules of a ``file_contexts`` file, in their order; ``name`` is for errors."""
    for number, words in _lines(data, name):
        expression, *rest = words
        kind = None
        if rest and rest[0].startswith("-"):
            kind = _TYPES.get(rest.pop(0))
            if kind is None:
                _refuse(name, number, "an unknown type of file")
        if len(rest) != 1:
            _refuse(name, number, "a rule is an expression, perhaps a type, and a context")
        yield Rule(expression, kind, None if rest[0] == _NO_LABEL else rest[0].encode())


def parse_substitutions(data: bytes, name: str) -> dict[bytes, bytes]:
    """Path and path to take in its place, of a ``file_contexts.subs`` file; later lines win."""
    aliases: dict[bytes, bytes] = {}
    for number, words in _lines(data, name):
        if len(words) != 2:
            _refuse(name, number, "a substitution is two paths")
        aliases[words[0].encode()] = words[1].encode()
        if len(aliases) > MAX_RULES:
            _refuse(name, number, "too many substitutions")
    return aliases


def _lines(data: bytes, name: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        words = _WORDS.findall(_text(line, name, number))
        if words and not words[0].startswith("#"):
            yield number, words


def _text(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        _refuse(name, number, "not UTF-8")


def _refuse(name: str, number: int, why: str) -> NoReturn:
    raise UnsupportedImage(f"{printable(name)} of the image, line {number}: {why}")


def _policy_type(files: ImageFiles) -> str | None:
    name = f"{_DIRECTORY}/config"
    data = files.read(name, MAX_CONFIG, follow=False)
    if data is None:
        return None
    for number, line in enumerate(data.split(b"\n"), 1):
        key, equals, value = _text(line, name, number).partition("=")
        if equals and _TRIM.sub("", key).upper() == "SELINUXTYPE":
            value = _TRIM.sub("", value)
            if any(part in (".", "..") for part in value.split("/")):
                _refuse(name, number, "no name of a policy")
            return value
    return None


class _Labels:
    """One walk over a tree, in the order of names: of a hard link the first name counts."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._labelled: dict[Leaf, bytes | None] = {}
        # Attributes are values that inodes share; most have a label and nothing else.
        self._alone: dict[bytes, dict[bytes, bytes]] = {}

    def run(self, root: Directory) -> None:
        """Label the tree. Below a directory whose path has a substitution, that is the path to go on with."""
        policy = self._policy
        start = policy.start()
        at = policy.walk(start, b"/")
        root.stat = self._labelled_stat(root.stat, policy.label_at(at, b"/", _DIR))
        stack = [(root, b"/", at, iter(sorted(root.entries.items())))]
        while stack:
            directory, prefix, before, children = stack[-1]
            for name, node in children:
                path = prefix + name
                alias = policy.aliases.get(path)
                if alias is None:
                    at = policy.walk(before, name)
                else:
                    path, at = alias, policy.walk(start, alias)
                if isinstance(node, Directory):
                    node.stat = self._labelled_stat(node.stat, policy.label_at(at, path, _DIR))
                    if not path.endswith(b"/"):
                        path, at = path + b"/", policy.walk(at, b"/")
                    stack.append((node, path, at, iter(sorted(node.entries.items()))))
                    break
                label = policy.label_at(at, path, _KIND_OF.get(type(node.content), _FILE))
                self._leaf(directory, name, node, label)
            else:
                stack.pop()

    def _leaf(self, directory: Directory, name: bytes, leaf: Leaf, label: bytes | None) -> None:
        if self._labelled.setdefault(leaf, label) == label:
            leaf.stat = self._labelled_stat(leaf.stat, label)
        else:
            directory.entries[name] = Leaf(self._labelled_stat(leaf.stat, label), leaf.content)

    def _labelled_stat(self, stat: Stat, label: bytes | None) -> Stat:
        if label is None:
            return _stripped(stat)
        if stat.xattrs and stat.xattrs.keys() != {XATTR}:
            return stat._replace(xattrs=stat.xattrs | {XATTR: label})
        alone = self._alone.get(label)
        if alone is None:
            alone = self._alone[label] = {XATTR: label}
        return stat._replace(xattrs=alone)


def _strip(root: Directory) -> None:
    pending = [root]
    while pending:
        directory = pending.pop()
        directory.stat = _stripped(directory.stat)
        for node in directory.entries.values():
            if isinstance(node, Directory):
                pending.append(node)
            else:
                node.stat = _stripped(node.stat)


def _stripped(stat: Stat) -> Stat:
    if XATTR not in stat.xattrs:
        return stat
    return stat._replace(xattrs={name: value for name, value in stat.xattrs.items() if name != XATTR})
