"""Reads one deployment: its state directory, origin, image, and what its boot entry needs.

Never raises for damage: what is wrong is a problem of that deployment.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot.cmdline import Cmdline
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.errors import DamagedState, HostimageError, ImageNotFound
from hostimaged.host.entries import NOTHING
from hostimaged.host.imagefacts import read_facts
from hostimaged.host.model import BootType, Deployment, Problem, ProblemId, Role, Severity, Verity
from hostimaged.host.origin import read_origin
from hostimaged.system.syscalls import VerityMissing, VerityUnsupported, measure_verity

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.composefs.repository import Repository
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.host.entries import BootSets, SetEntry
    from hostimaged.host.imagefacts import ImageSource
    from hostimaged.host.model import ImageFacts
    from hostimaged.host.origin import Origin
    from hostimaged.ids import DeploymentId, ManifestDigest

#: Deployment ids are of this hash.
_ALGORITHM: Final = Algorithm.SHA512


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What the rows of a host have in common. ``pins``: manifests that somebody pinned.

    ``tolerant``: the running system was started with fs-verity optional.
    """

    deploy: Path
    repository: Repository | None
    images: ImageSource | None
    dirs: BootDirs
    sets: BootSets
    booted: DeploymentId | None
    pins: frozenset[ManifestDigest]
    tolerant: bool


@dataclass(frozen=True, slots=True)
class _State:
    """What is in a state directory."""

    origin: Origin | None = None
    image: ImageFacts | None = None
    exists: bool = True


def read_row(facts: RowFacts, id_: DeploymentId) -> Deployment:
    """The deployment ``id_``, without its role."""
    problems: list[Problem] = []
    live = (facts.sets.live or NOTHING).of(id_)
    staged = (facts.sets.staged or NOTHING).of(id_)
    state = _state(facts, id_, problems)
    tolerant = _tolerant(facts, (*live, *staged))
    verity = _verity(facts.repository, id_, problems, tolerant=tolerant)
    for entries in (live, staged):
        if len(entries) > 1:
            text = f"{len(entries)} entries of one set start it"
            problems.append(Problem(ProblemId.ENTRY_TWICE, text, Severity.WARNING))
    if not live and not staged and not facts.sets.unreadable:
        problems.append(Problem(ProblemId.ENTRY_MISSING, "no boot entry starts it", Severity.WARNING))
    for entry in (*live[:1], *staged[:1]):
        _artifacts(facts.dirs, entry, problems)
    origin = state.origin
    digest = _manifest(origin, state.image)
    return Deployment(
        id=id_,
        role=Role.HIDDEN,
        live=live[0] if live else None,
        staged=staged[0] if staged else None,
        origin=origin,
        image=state.image,
        boot_type=_boot_type(origin, (*live, *staged)),
        pinned=digest is not None and digest in facts.pins,
        verity=verity,
        problems=tuple(dict.fromkeys(problems)),
    )


def _manifest(origin: Origin | None, image: ImageFacts | None) -> ManifestDigest | None:
    if origin is not None and origin.manifest_digest is not None:
        return origin.manifest_digest
    return None if image is None else image.manifest_digest


def _boot_type(origin: Origin | None, entries: tuple[SetEntry, ...]) -> BootType | None:
    if origin is not None and origin.boot_type is not None:
        return origin.boot_type
    if not entries:
        return None
    return BootType.UKI if entries[0].is_uki else BootType.BLS


# --- the state directory -----------------------------------------------------------------------------------


def _state(facts: RowFacts, id_: DeploymentId, problems: list[Problem]) -> _State:
    path = facts.deploy / id_.value
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            problems.append(Problem(ProblemId.STATE_MISSING, "its state directory is missing"))
            return _State(exists=False)
        problems.append(Problem(ProblemId.STATE_UNREADABLE, f"its state cannot be read: {error.strerror}"))
        return _State()
    try:
        _check_names(directory, problems)
        origin = _origin(directory, id_, problems)
        if origin is None:
            return _State()
        image, more = read_facts(facts.images, directory, id_, origin)
        problems += more
        return _State(origin, image)
    finally:
        os.close(directory)


def _check_names(directory: int, problems: list[Problem]) -> None:
    for name, wanted, id_, text in (
        ("etc", stat.S_ISDIR, ProblemId.ETC_MISSING, "its /etc is missing"),
        ("var", stat.S_ISLNK, ProblemId.VAR_MISSING, "its link to /var is missing"),
    ):
        try:
            if wanted(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                continue
        except OSError:
            pass
        problems.append(Problem(id_, text))


def _origin(directory: int, id_: DeploymentId, problems: list[Problem]) -> Origin | None:
    try:
        origin = read_origin(directory, id_)
    except HostimageError as error:
        damaged = isinstance(error, DamagedState)
        problems.append(
            Problem(ProblemId.ORIGIN_DAMAGED if damaged else ProblemId.STATE_UNREADABLE, error.message)
        )
        return None
    if origin is None:
        text = "its origin is missing: nobody knows which image it is"
        problems.append(Problem(ProblemId.ORIGIN_MISSING, text))
        return None
    problems += (Problem(ProblemId.ORIGIN_DAMAGED, text) for text in origin.problems)
    for value, text in (
        (origin.reference, "its origin names no image to follow"),
        (origin.boot_type, "its origin has no boot type"),
    ):
        if value is None and not origin.problems:
            problems.append(Problem(ProblemId.ORIGIN_DAMAGED, text))
    return origin


# --- the boot image ----------------------------------------------------------------------------------------


def _tolerant(facts: RowFacts, entries: tuple[SetEntry, ...]) -> bool:
    """Whether its start works without fs-verity, or may for all that is known."""
    for entry in entries:
        if not entry.is_uki:
            argument = Cmdline.parse(entry.options).composefs()
            return argument is not None and argument.optional
    return facts.tolerant or facts.booted is None


def _verity(
    repository: Repository | None, id_: DeploymentId, problems: list[Problem], *, tolerant: bool
) -> Verity:
    """Whether the image is there, and the kernel vouches for it."""
    if repository is None:
        return Verity.UNVERIFIED
    try:
        fd = repository.open_image(id_.value)
    except ImageNotFound as error:
        problems.append(Problem(ProblemId.IMAGE_MISSING, error.message))
        return Verity.BROKEN
    except HostimageError as error:
        problems.append(Problem(ProblemId.IMAGE_DAMAGED, error.message))
        return Verity.BROKEN
    try:
        measured = measure_verity(fd, _ALGORITHM.kernel_id, _ALGORITHM.digest_size)
    except (VerityMissing, VerityUnsupported):
        measured = None
    except (OSError, ValueError):
        measured = b""
    finally:
        os.close(fd)
    if measured == id_.object_id:
        return Verity.OK
    if measured is not None:
        problems.append(Problem(ProblemId.IMAGE_DAMAGED, "its image is another file than its name says"))
        return Verity.BROKEN
    if not tolerant:
        text = "its image has no fs-verity, and its boot entry demands it"
        problems.append(Problem(ProblemId.IMAGE_DAMAGED, text))
        return Verity.BROKEN
    return Verity.UNVERIFIED


# --- what the boot loader reads ----------------------------------------------------------------------------


def _artifacts(dirs: BootDirs, entry: SetEntry, problems: list[Problem]) -> None:
    for name in entry.files:
        path = dirs.uki_file(name) if entry.is_uki else dirs.file(name)
        if path is not None and not path.is_file():
            text = f"the boot loader does not find {name}"
            problems.append(Problem(ProblemId.ARTIFACT_MISSING, text))
