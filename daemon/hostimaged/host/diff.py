"""What is different between two deployments: files, packages, kernel arguments, labels.

Files are compared by their boot images, without times: type, content, owner, mode and extended attributes.
Nothing is mounted or written. The result has at most 1 MiB as JSON; counts are always whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot.files import TreeFiles, content_size
from hostimaged.composefs.tree import Directory, Leaf
from hostimaged.errors import HostimageError, PreconditionFailed
from hostimaged.host.arguments import cmdline_of
from hostimaged.host.etctree import read_image
from hostimaged.host.packages import Packages, read_packages
from hostimaged.host.texts import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hostimaged.boot.cmdline import Parameter
    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Node
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.ids import DeploymentId
    from hostimaged.progress import Reporter

#: Of the whole result as JSON (D-Bus API), and what each part of it may have.
MAX_RESULT: Final = 1 << 20
_FILES: Final = 576 << 10
_PACKAGES: Final = 256 << 10
_ARGUMENTS: Final = 48 << 10
_LABELS: Final = 96 << 10
#: Characters of one label: a few images carry whole documents.
_MAX_LABEL: Final = 2048

ADDED: Final = "added"
REMOVED: Final = "removed"
CHANGED: Final = "changed"
#: Another owner, mode or extended attribute, with the same content.
METADATA: Final = "metadata"


@dataclass(slots=True)
class _Part:
    """A list that stops growing at ``room`` bytes of JSON, and says so."""

    room: int
    rows: list[Any] = field(default_factory=list)
    truncated: bool = False

    def add(self, row: Any) -> None:
        self.room -= len(render(row).encode()) + 1
        if self.room < 0:
            self.truncated = True
        else:
            self.rows.append(row)


def render(document: Any) -> str:
    """A result as the JSON text that the bound of its size is about."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Both:
    """Two deployments, with what is read of the host itself: the parameters that each is started with.

    ``problem``: why these are not known, in words, "" if they are.
    """

    old: Deployment
    new: Deployment
    before: tuple[Parameter, ...] = ()
    after: tuple[Parameter, ...] = ()
    problem: str = ""

    @classmethod
    def read(cls, state: HostState, old: DeploymentId, new: DeploymentId) -> Both:
        """Raises ``NoSuchDeployment``, ``PreconditionFailed`` for one with itself."""
        one, two = state.get(old), state.get(new)
        if one.id == two.id:
            raise PreconditionFailed("a deployment does not differ from itself")
        try:
            return cls(one, two, _parameters(state, one), _parameters(state, two))
        except HostimageError as error:
            return cls(one, two, problem=f"the kernel arguments cannot be compared: {error.message}")


def diff(repository: Repository, both: Both, reporter: Reporter) -> dict[str, Any]:
    """What changes from one of ``both`` to the other, as a JSON document::

        from, to            id, version, image-digest
        files               added, removed, changed, metadata: how many; added-bytes, removed-bytes;
                            list: [kind, path], a whole directory as one with a slash at its end
        packages            list: [kind, name, old version, new version]
        kernel-arguments    added, removed: lists
        labels              list: [kind, name, old, new]
        problems            what could not be compared, in words
        truncated           whether a list is not whole

    Raises ``ImageNotFound`` or another error of the repository for a boot image that cannot be read.
    """
    one, two = both.old, both.new
    before = read_image(repository, one.id)
    reporter.at("diff.read")
    after = read_image(repository, two.id)
    reporter.at("diff.compare")
    files = _Files()
    files.compare(before, after)
    reporter.at("diff.packages")
    problems: list[str] = []
    packages, arguments = _Part(_PACKAGES), _Part(_ARGUMENTS)
    try:
        _packages(
            packages,
            read_packages(TreeFiles(before, repository)),
            read_packages(TreeFiles(after, repository)),
        )
    except HostimageError as error:
        problems.append(error.message)
    if both.problem:
        problems.append(both.problem)
    _arguments(arguments, both)
    labels = _Part(_LABELS)
    if one.image is None or two.image is None:
        problems.append("the labels of an image are not known")
    else:
        _labels(labels, one.image.labels, two.image.labels)
    parts = (files.part, packages, arguments, labels)
    return {
        "from": _named(one),
        "to": _named(two),
        "files": files.document(),
        "packages": {"list": packages.rows},
        "kernel-arguments": {
            kind: [value for row, value in arguments.rows if row == kind] for kind in (ADDED, REMOVED)
        },
        "labels": {"list": labels.rows},
        "problems": problems,
        "truncated": any(part.truncated for part in parts),
    }


def _named(row: Deployment) -> dict[str, str]:
    return {
        "id": str(row.id),
        "version": "" if row.image is None else shown(row.image.version[:_MAX_LABEL]),
        "image-digest": "" if row.manifest_digest is None else str(row.manifest_digest),
    }


# --- files -------------------------------------------------------------------------------------------------


class _Files:
    """Compares two trees name by name."""

    def __init__(self) -> None:
        self.part = _Part(_FILES)
        self.counts = dict.fromkeys((ADDED, REMOVED, CHANGED, METADATA), 0)
        self.sizes = dict.fromkeys((ADDED, REMOVED), 0)

    def compare(self, before: Directory, after: Directory) -> None:
        """Take in every difference below two directories."""
        pending = [(b"", before, after)]
        while pending:
            prefix, one, two = pending.pop()
            below = []
            for name in sorted(one.entries.keys() | two.entries.keys()):
                path = prefix + b"/" + name
                old, new = one.entries.get(name), two.entries.get(name)
                self._compare(path, old, new)
                if isinstance(old, Directory) and isinstance(new, Directory):
                    below.append((path, old, new))
            pending.extend(reversed(below))

    def _compare(self, path: bytes, old: Node | None, new: Node | None) -> None:
        if isinstance(old, Directory) != isinstance(new, Directory) and old is not None and new is not None:
            self._whole(REMOVED, path, old)
            self._whole(ADDED, path, new)
        elif old is None:
            self._whole(ADDED, path, new)
        elif new is None:
            self._whole(REMOVED, path, old)
        elif isinstance(old, Leaf) and isinstance(new, Leaf) and old.content != new.content:
            self._row(CHANGED, path)
        elif _attributes(old) != _attributes(new):
            self._row(METADATA, path)

    def _row(self, kind: str, path: bytes) -> None:
        self.counts[kind] += 1
        self.part.add([kind, shown(path)])

    def _whole(self, kind: str, path: bytes, node: Node | None) -> None:
        """Something that is there on one side only, with all below it."""
        if not isinstance(node, Directory):
            self._row(kind, path)
            self.sizes[kind] += content_size(node) if node is not None else 0
            return
        self._row(kind, path + b"/")
        for leaf in _leaves(node):
            self.counts[kind] += 1
            self.sizes[kind] += content_size(leaf)

    def document(self) -> dict[str, Any]:
        """The part ``files`` of the result."""
        sizes = {f"{kind}-bytes": size for kind, size in self.sizes.items()}
        return {**self.counts, **sizes, "list": self.part.rows}


def _attributes(node: Node) -> tuple[object, ...]:
    return node.stat.mode, node.stat.uid, node.stat.gid, node.stat.xattrs


def _leaves(root: Directory) -> Iterator[Leaf]:
    pending = [root]
    while pending:
        for node in pending.pop().entries.values():
            if isinstance(node, Directory):
                pending.append(node)
            else:
                yield node


# --- the rest ----------------------------------------------------------------------------------------------


def _packages(part: _Part, old: Packages, new: Packages) -> None:
    for name in sorted(old.keys() | new.keys()):
        gone = sorted(old.get(name, frozenset()) - new.get(name, frozenset()))
        come = sorted(new.get(name, frozenset()) - old.get(name, frozenset()))
        if len(gone) == len(come) == 1:
            rows = [(CHANGED, name, gone[0], come[0])]
        else:
            rows = [(REMOVED, name, version, "") for version in gone]
            rows += [(ADDED, name, "", version) for version in come]
        for kind, *texts in rows:
            part.add([kind, *map(shown, texts)])


def _arguments(part: _Part, both: Both) -> None:
    for kind, parameters, others in ((ADDED, both.after, both.before), (REMOVED, both.before, both.after)):
        for parameter in parameters:
            if parameter not in others:
                part.add([kind, shown(parameter.raw)])


def _parameters(state: HostState, row: Deployment) -> tuple[Parameter, ...]:
    """All but the one that names the deployment."""
    return tuple(each for each in cmdline_of(state.dirs, row).parameters if not each.names_deployment)


def _labels(part: _Part, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name in sorted(old.keys() | new.keys()):
        one, two = old.get(name), new.get(name)
        if one == two:
            continue
        kind = ADDED if one is None else REMOVED if two is None else CHANGED
        part.add([kind, *(shown(text[:_MAX_LABEL]) for text in (name, one or "", two or ""))])
