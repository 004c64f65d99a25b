"""What of a repository is damaged, as objects to get again, and what can be mended without getting anything.

A damaged object is never removed: it is distrusted (``Repository.distrust``), which makes everything else
take it for missing, and replaced in one step by whoever stores it again. Where contents come from is not
known here: see ``hostimaged.oci.repair``.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs import fsverity
from hostimaged.composefs.fsck_report import Kind
from hostimaged.composefs.fsverity import FsVerityError
from hostimaged.composefs.repository.links import IMAGES, STREAMS
from hostimaged.composefs.repository.objects import DIRECTORY as OBJECTS
from hostimaged.errors import HostimageError, from_os_error

if TYPE_CHECKING:
    from hostimaged.composefs.fsck_report import Finding, Report
    from hostimaged.composefs.repository.repository import Repository
    from hostimaged.ids import ObjectId

#: Findings about an object that is there.
_DAMAGED: Final = frozenset(
    {
        Kind.OBJECT_OPEN_FAILED,
        Kind.OBJECT_DIGEST_MISMATCH,
        Kind.OBJECT_VERITY_FAILED,
        Kind.OBJECT_VERITY_MISSING,
    }
)
#: Findings that end with the id of an object that is not.
_MISSING: Final = frozenset({Kind.MISSING_OBJECT_REF, Kind.MISSING_NAMED_REF, Kind.IMAGE_MISSING_OBJECT})
#: Findings that follow from those about objects.
_CONSEQUENCES: Final = frozenset({Kind.STREAM_OPEN_FAILED, Kind.IMAGE_OPEN_FAILED, Kind.IMAGE_READ_FAILED})
_PIECE: Final = 1 << 20
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Harm:
    """What a check found, by what can be done about it."""

    #: Objects that are there and are not what their names say.
    damaged: frozenset[ObjectId]
    #: Objects that something refers to and that are not there.
    missing: frozenset[ObjectId]
    #: What no object explains.
    others: tuple[Finding, ...]
    #: Whether there were more findings than a report keeps.
    truncated: bool

    @property
    def objects(self) -> frozenset[ObjectId]:
        """All objects to get again."""
        return self.damaged | self.missing


def harm_of(repository: Repository, report: Report) -> Harm:
    """What ``report``, a check of ``repository``, comes down to."""
    damaged = {object_of(repository, finding) for finding in report.errors if finding.kind in _DAMAGED}
    missing = set()
    others = []
    for finding in report.errors:
        if finding.kind in _DAMAGED or finding.kind in _CONSEQUENCES:
            continue
        id_ = object_of(repository, finding)
        if id_ is None:
            others.append(finding)
        elif holder_of(repository, finding) not in damaged:
            # Of what is damaged itself, the table of what it needs may be, too.
            missing.add(id_)
    truncated = report.errors.count > len(report.errors.kept)
    return Harm(
        frozenset(id_ for id_ in damaged if id_ is not None), frozenset(missing), tuple(others), truncated
    )


def object_of(repository: Repository, finding: Finding) -> ObjectId | None:
    """The object that a finding is about, None if it is about no object."""
    algorithm = repository.algorithm
    with suppress(FsVerityError, OSError):
        if finding.kind in _DAMAGED:
            return fsverity.parse_pathname(algorithm, finding.path)
        if finding.kind in _MISSING:
            return fsverity.parse_hex(algorithm, finding.detail.rpartition(" ")[2])
        if finding.kind == Kind.BROKEN_SYMLINK:
            text = os.readlink(finding.path, dir_fd=repository.fileno())
            return fsverity.parse_pathname(algorithm, text)
    return None


def holder_of(repository: Repository, finding: Finding) -> ObjectId | None:
    """The object of the stream or image that a finding names, None if it names none."""
    category, _, name = finding.path.partition("/")
    if category not in (STREAMS, IMAGES) or "/" in name:
        return None
    with suppress(FsVerityError, OSError):
        text = os.readlink(finding.path, dir_fd=repository.fileno())
        return fsverity.parse_pathname(repository.algorithm, text)
    return None


def protect_again(repository: Repository, id_: ObjectId) -> bool:
    """Replace a distrusted object whose content is right, and only its fs-verity is missing, by a copy.

    Says whether it was one. Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``.
    """
    try:
        fd = os.open(f"{OBJECTS}/{id_.pathname}", _FILE_FLAGS, dir_fd=repository.fileno())
    except OSError:
        return False
    try:
        try:
            if fsverity.digest_fd(repository.algorithm, fd) != id_:
                return False
        except OSError:
            return False  # it cannot be read
        with repository.object_writer() as writer:
            at = 0
            while piece := os.pread(fd, _PIECE, at):
                writer.write(piece)
                at += len(piece)
            return writer.commit().id == id_
    except OSError as error:
        raise from_os_error(error, f"cannot read object {id_.hex()}") from error
    finally:
        os.close(fd)


def restored(repository: Repository, id_: ObjectId) -> bool:
    """Whether an object is there, and is what its name says as far as this process knows.

    One that was missing at first is read, which no check has done.
    """
    if not repository.has_object(id_):
        return False
    try:
        os.close(repository.open_verified(id_))
    except HostimageError:
        return False
    return True
