"""The menu of classic GRUB with unified kernel images: ``grub2/user.cfg`` and ``grub2/efiuuid.cfg``.

Files are read as bootc reads them, which is looser than GRUB, and written byte for byte as bootc writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Self

from hostimaged.boot import bls
from hostimaged.errors import BootLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hostimaged.ids import DeploymentId

#: Bytes of the menu; an entry has some 400.
MAX_SIZE: Final = 256 << 10
#: Entries of a menu.
MAX_ENTRIES: Final = 256
#: Bytes of the file with the UUID, a single line.
MAX_UUID_SIZE: Final = 4096

_SEARCH: Final = '--no-floppy --set=root --fs-uuid "${EFI_PART_UUID}"'
_HEADER: Final = """
if [ -f ${config_directory}/efiuuid.cfg ]; then
        source ${config_directory}/efiuuid.cfg
fi
"""
_WORD: Final = "menuentry"
_TITLE: Final = re.compile(r'menuentry[ \t\r\n]+"((?:[^\\"]|\\.)+)"[ \t\r\n]*\{', re.DOTALL)
_BRACE: Final = re.compile(r"\\.|[{}]", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
#: What means something to GRUB within double quotes.
_SPECIAL: Final = re.compile(r'[\\"$`]')
_UUID: Final = re.compile(r"[0-9A-Za-z-]{1,64}\Z")
_ASSIGNMENT: Final = re.compile(r'[ \t]*set[ \t]+EFI_PART_UUID="?([0-9A-Za-z-]{1,64})"?[ \t\r]*\Z')


@dataclass(frozen=True, slots=True)
class MenuEntry:
    """One ``menuentry``. ``title`` is the text between the quotes, with its escapes.

    ``extra`` has the commands that nothing here knows, each as its first word and the rest. bootc drops
    ``set`` commands on reading, and so do we; an entry of another system stays as it stands, ``verbatim``.
    """

    title: str
    chainloader: str = ""
    insmod: tuple[str, ...] = ()
    search: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    verbatim: str = field(default="", compare=False)

    @classmethod
    def new(cls, label: str, deployment: DeploymentId) -> Self:
        """The entry of a deployment as bootc makes it; ``label`` is plain text."""
        return cls(
            title=f"{_SPECIAL.sub(_escaped, label)}: ({deployment})",
            chainloader=f"/{bls.UKI_DIRECTORY}/{bls.uki_name(deployment)}",
            insmod=("fat", "chain"),
            search=_SEARCH,
        )

    @property
    def label(self) -> str:
        """The title without escapes and the id."""
        plain = _ESCAPE.sub(r"\1", self.title)
        label, separator, rest = plain.rpartition(": (")
        return label if separator and rest.endswith(")") else plain

    def deployment_id(self) -> DeploymentId | None:
        """The deployment that it boots; None for an entry that is not of a composefs host."""
        return bls.efi_deployment(self.chainloader)

    def artifact(self) -> str:
        """Name of the unified kernel image, without prefix and suffix."""
        return bls.artifact_name(self._artifact_file)

    @property
    def has_prefix(self) -> bool:
        """Whether the image has the prefix by which bootc's garbage collection knows its own."""
        return self._artifact_file.startswith(bls.ARTIFACT_PREFIX)

    @property
    def _artifact_file(self) -> str:
        return self.chainloader.rpartition("/")[2]

    def serialise(self) -> str:
        """The lines of the entry; raises ``BootLoaderError`` for what would be read as something else."""
        if self.verbatim:
            return self.verbatim + "\n"
        if not re.fullmatch(r'(?:[^\\"\n]|\\[^\n])+', self.title):
            raise BootLoaderError(f"menu entry cannot have the title {self.title!r}")
        commands = [("insmod", module) for module in self.insmod]
        commands += [("search", self.search), ("chainloader", self.chainloader), *self.extra]
        lines = [f"{command} {_checked(command, rest)}\n" for command, rest in commands]
        return f'menuentry "{self.title}" {{\n{"".join(lines)}}}\n'


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]


def _checked(command: str, rest: str) -> str:
    text = f"{command} {rest}"
    plain = command and " " not in command and text == text.strip() and "\n" not in text
    if not plain or command.startswith("#") or _balance(text) != 0:
        raise BootLoaderError(f"menu entry cannot have the command {text!r}")
    return rest


def _balance(text: str) -> int:
    """Open braces at the end, negative where more are closed than open before."""
    depth = 0
    for found in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth < 0:
            break
    return depth


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What other people wrote into a menu outside of its entries, such as a password or a comment.

    ``head`` is before the first entry, without what every menu has there, and ``tail`` after the last one.
    ``between`` has commands between two: they cannot be kept where entries come and go.
    """

    head: str = ""
    between: str = ""
    tail: str = ""

    def check(self, name: str = "user.cfg") -> None:
        """Raise ``BootLoaderError`` if a menu written anew would lose or change the meaning of any of it."""
        if self.between:
            raise BootLoaderError(f"{name}: what is between its entries would be lost: {self.between!r}")
        for text in (self.head, self.tail):
            if _balance("\n".join(line for line in text.split("\n") if not _is_comment(line))):
                raise BootLoaderError(f"{name}: its entries are within another command, which would be lost")


#: A menu of entries alone.
NOTHING_ELSE: Final = Surroundings()


def parse_user_cfg(data: bytes, name: str = "user.cfg") -> list[MenuEntry]:
    """The entries of a menu, in its order; raises ``BootLoaderError`` naming the file.

    Everything before, between and after them is passed over.
    """
    found: list[MenuEntry] = []
    text = _decoded(data, name)
    for start, title, end in _spans(text, name):
        entry = _entry(title[1], text[title.end() : end])
        if entry.deployment_id() is None:
            entry = replace(entry, verbatim=text[start : end + 1])
        found.append(entry)
    return found


def parse_surroundings(data: bytes, name: str = "user.cfg") -> Surroundings:
    """What is in a menu outside of its entries; raises ``BootLoaderError`` as ``parse_user_cfg``."""
    text = _decoded(data, name)
    spans = list(_spans(text, name))
    if not spans:
        return Surroundings(_foreign(text))
    pieces = [text[end + 1 : start] for (_, _, end), (start, _, _) in pairwise(spans)]
    lines = [line for piece in pieces for line in piece.split("\n") if line.strip()]
    comments = "".join(f"{line}\n" for line in lines if _is_comment(line))
    between = "\n".join(line for line in lines if not _is_comment(line))
    tail = text[spans[-1][2] + 1 :].removeprefix("\n")
    return Surroundings(_foreign(text[: spans[0][0]]), between, comments + (tail if tail.strip() else ""))


def _decoded(data: bytes, name: str) -> str:
    if len(data) > MAX_SIZE:
        raise BootLoaderError(f"{name}: longer than {MAX_SIZE} bytes")
    return data.decode("utf-8", "surrogateescape")


def _foreign(head: str) -> str:
    """What of the beginning of a menu is not in every one."""
    rest = head.replace(_HEADER, "", 1)
    if not rest.strip():
        return ""
    return rest if rest.endswith("\n") else rest + "\n"


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _spans(text: str, name: str) -> Iterator[tuple[int, re.Match[str], int]]:
    """Where each entry begins, its beginning with the title, and where the brace is that closes it."""
    count = 0
    at = text.find(_WORD)
    while at >= 0:
        count += 1
        title = _TITLE.match(text, at)
        if title is None:
            raise BootLoaderError(f"{name}: menu entry {count} is not of the form: menuentry TITLE {{")
        if count > MAX_ENTRIES:
            raise BootLoaderError(f"{name}: more than {MAX_ENTRIES} menu entries")
        end = _body_end(text, title.end(), name)
        yield at, title, end
        at = text.find(_WORD, end)


def _body_end(text: str, start: int, name: str) -> int:
    depth = 1
    for found in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return found.start()
    raise BootLoaderError(f"{name}: a menu entry is not closed")


def _entry(title: str, body: str) -> MenuEntry:
    insmod: list[str] = []
    single = {"search": "", "chainloader": ""}
    extra: list[tuple[str, str]] = []
    for line in body.split("\n"):
        command, space, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not space or command.startswith("#") or command == "set":
            continue
        if command == "insmod":
            insmod.append(rest)
        elif command in single:
            single[command] = rest
        else:
            extra.append((command, rest))
    return MenuEntry(title, single["chainloader"], tuple(insmod), single["search"], tuple(extra))


def serialise_user_cfg(entries: Iterable[MenuEntry], around: Surroundings = NOTHING_ELSE) -> bytes:
    """The whole file; the first entry is the default. Raises ``BootLoaderError``."""
    around.check()
    text = _HEADER + around.head + "".join(entry.serialise() for entry in entries) + around.tail
    return text.encode("utf-8", "surrogateescape")


def parse_efiuuid(data: bytes) -> str | None:
    """The UUID of the ESP's file system in ``efiuuid.cfg``, None if it does not set one."""
    lines = data[:MAX_UUID_SIZE].decode("utf-8", "replace").split("\n")
    found = [match[1] for line in lines if (match := _ASSIGNMENT.match(line))]
    return found[-1] if found else None


def serialise_efiuuid(uuid: str) -> bytes:
    """``efiuuid.cfg`` for the UUID as ``blkid`` prints it; raises ``BootLoaderError`` for another form."""
    if not _UUID.match(uuid):
        raise BootLoaderError(f"{uuid!r} is not the UUID of a file system")
    return f'set EFI_PART_UUID="{uuid}"'.encode()
