"""The kernel command line: its parameters, and the one that names the deployment.

Parameters are separated by white space outside double quotes; a quote has no escape. Keys that differ in
``-`` and ``_`` only are the same, values are compared verbatim (the kernel's rules, and bootc's).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hostimaged.errors import BootLoaderError, InvalidArgs
from hostimaged.ids import DeploymentId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Characters of a command line: kernels take 2048 to 4096 bytes, and EFI stubs have room for more.
MAX_LENGTH: Final = 64 << 10
#: Characters that a caller may give at once, and that one argument may have.
MAX_ARGUMENTS: Final = 4096

#: The argument that names a deployment, and its self-describing form (composefs-rs 0.9, ``cmdline``).
KEY: Final = "composefs"
DIGEST_KEY: Final = "composefs.digest"

_WHITE_SPACE: Final = " \t\n\f\r"
_DIGEST: Final = re.compile(r"v[12]-(sha256|sha512)-12:(.*)\Z", re.DOTALL)
_SHA512_HEX: Final = re.compile(r"[0-9A-Fa-f]{128}\Z")
_QUOTED: Final = re.compile(r'"([^"]*)"')
#: Special anywhere, special outside of quotes, and the beginning of a comment (GRUB manual, "Quoting").
_GRUB_SPECIAL: Final = re.compile(r"[$\\;&|<>{}']|\A#")
_GRAPHIC: Final = re.compile(r"[\x20-\x7e]+\Z")


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One parameter as it is written; equal to another that means the same.

    ``raw`` keeps its quotes, ``key`` and ``value`` have none. ``value`` is None without ``=``.
    """

    raw: str

    @property
    def key(self) -> str:
        """What stands before ``=``."""
        return self._plain.partition("=")[0]

    @property
    def value(self) -> str | None:
        """What stands after ``=``."""
        _, equals, value = self._plain.partition("=")
        return value.removeprefix('"') if equals else None

    @property
    def folded_key(self) -> str:
        """The key by which parameters are compared."""
        return self.key.replace("-", "_")

    @property
    def names_deployment(self) -> bool:
        """Whether it is ``composefs`` in either spelling."""
        return self.folded_key in (KEY, DIGEST_KEY)

    @property
    def _plain(self) -> str:
        # Only the outermost quotes are taken off: what else the value quotes belongs to it.
        return self.raw.removeprefix('"').removesuffix('"') if '"' in self.raw else self.raw

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameter):
            return NotImplemented
        return (self.folded_key, self.value) == (other.folded_key, other.value)

    def __hash__(self) -> int:
        return hash((self.folded_key, self.value))

    def __str__(self) -> str:
        return self.raw


@dataclass(frozen=True, slots=True)
class ComposefsArgument:
    """The deployment that a command line names.

    ``optional`` says that fs-verity may be missing (``?``), ``spelling`` is ``KEY`` or ``DIGEST_KEY``.
    """

    id: DeploymentId
    optional: bool
    spelling: str


@dataclass(frozen=True, slots=True)
class Cmdline:
    """A kernel command line. ``str`` gives the parameters with one space between them."""

    parameters: tuple[Parameter, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Split a command line; raises ``BootLoaderError`` if it is too long. Any other text is one."""
        if len(text) > MAX_LENGTH:
            raise BootLoaderError(f"kernel command line longer than {MAX_LENGTH} characters")
        return cls(tuple(Parameter(raw) for raw in split(text)))

    def get(self, key: str) -> Parameter | None:
        """The first parameter with this key."""
        folded = key.replace("-", "_")
        return next((p for p in self.parameters if p.folded_key == folded), None)

    def composefs(self) -> ComposefsArgument | None:
        """The deployment that the initramfs would mount (composefs-rs 0.9, ``ComposefsCmdline``).

        The first ``composefs.digest=`` with a sha512 digest, else the first ``composefs=``. Raises
        ``BootLoaderError`` for one that the initramfs refuses.
        """
        for raw in self._values(DIGEST_KEY):
            found = _DIGEST.match(raw.removeprefix("?"))
            if found is None:
                raise BootLoaderError(f"kernel argument {DIGEST_KEY}={raw} is not valid")
            if found[1] == "sha512":
                return _argument(DIGEST_KEY, raw, found[2])
        for raw in self._values(KEY):
            return _argument(KEY, raw, raw.removeprefix("?"))
        return None

    def _values(self, key: str) -> Iterator[str]:
        """Values as the initramfs sees them: it knows neither quotes nor other spellings of a key."""
        prefix = key + "="
        return (p.raw.removeprefix(prefix) for p in self.parameters if p.raw.startswith(prefix))

    def with_composefs(self, deployment: DeploymentId, *, optional: bool) -> Self:
        """The same command line for a deployment, with exactly one argument that names one.

        It stands where the first such argument was, or else at the end.
        """
        wanted = Parameter(f"{KEY}={'?' if optional else ''}{deployment}")
        kept: list[Parameter] = []
        placed = False
        for parameter in self.parameters:
            if not parameter.names_deployment:
                kept.append(parameter)
            elif not placed:
                kept.append(wanted)
                placed = True
        return type(self)(tuple(kept if placed else [*kept, wanted]))

    def adding(self, parameters: Iterable[Parameter]) -> Self:
        """With these at the end, except those that are there already."""
        present = set(self.parameters)
        added: list[Parameter] = []
        for parameter in parameters:
            if parameter not in present:
                present.add(parameter)
                added.append(parameter)
        return type(self)((*self.parameters, *added))

    def removing(self, parameters: Iterable[Parameter]) -> Self:
        """Without any parameter equal to one of these."""
        unwanted = frozenset(parameters)
        return type(self)(tuple(p for p in self.parameters if p not in unwanted))

    def same_parameters(self, other: Cmdline) -> bool:
        """Whether a soft reboot from one to the other loses nothing: all but the deployment is the same.

        Order does not matter. As with bootc, both have the same length, hence the same ``?``.
        """

        def rest(cmdline: Cmdline) -> Counter[Parameter]:
            return Counter(p for p in cmdline.parameters if not p.names_deployment)

        return len(str(self)) == len(str(other)) and rest(self) == rest(other)

    def __str__(self) -> str:
        return " ".join(p.raw for p in self.parameters)


def _argument(spelling: str, raw: str, digits: str) -> ComposefsArgument:
    if not _SHA512_HEX.match(digits):
        raise BootLoaderError(f"kernel argument {spelling}={raw} does not have 128 hex digits")
    return ComposefsArgument(DeploymentId(digits.lower()), raw.startswith("?"), spelling)


def split(text: str) -> Iterator[str]:
    """The parameters of ``text`` as they are written. A quote that is not closed goes on to the end."""
    start = None
    quoted = False
    for at, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        if quoted or character not in _WHITE_SPACE:
            if start is None:
                start = at
        elif start is not None:
            yield text[start:at]
            start = None
    if start is not None:
        yield text[start:]


def validate_arguments(arguments: Iterable[str], *, grub: bool = False) -> tuple[Parameter, ...]:
    """Arguments from a caller, each one parameter; raises ``InvalidArgs`` naming the one that is not.

    Only printable ASCII is taken: the kernel separates parameters at other bytes than we do, and a line break
    would add a line to a boot entry. The argument that names the deployment is ours. ``grub`` refuses what
    GRUB, which makes a line of its script of an entry, would not hand on as it is.
    """
    found: list[Parameter] = []
    total = 0
    for argument in arguments:
        total += len(argument) + 1
        if total > MAX_ARGUMENTS:
            raise InvalidArgs(f"kernel arguments longer than {MAX_ARGUMENTS} characters")
        if not _GRAPHIC.match(argument):
            raise InvalidArgs(f"kernel argument {argument[:200]!r} is empty or not printable ASCII")
        if argument.count('"') % 2:
            raise InvalidArgs(f"kernel argument {argument[:200]!r} has a quote that is not closed")
        if list(split(argument)) != [argument]:
            raise InvalidArgs(f"{argument[:200]!r} is not one kernel argument: quote what has spaces")
        if grub and _GRUB_SPECIAL.search(_QUOTED.sub(_dollars, argument)):
            raise InvalidArgs(f"kernel argument {argument[:200]!r} has characters special to GRUB")
        parameter = Parameter(argument)
        if not parameter.key:
            raise InvalidArgs(f"kernel argument {argument[:200]!r} has no name")
        if parameter.names_deployment:
            raise InvalidArgs(f"kernel argument {parameter.key} names the deployment and cannot be set")
        found.append(parameter)
    return tuple(found)


def _dollars(quoted: re.Match[str]) -> str:
    """What is special within double quotes too."""
    return "".join(c for c in quoted[1] if c in "$\\")
