"""Reads the state of a host: every fact by itself, so that damage costs what it hits and nothing else.

No lock is taken, nothing is written, no network is asked, nothing is mounted. Facts: deployments.md 7 to 9
(bootc 1.16).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostimaged.boot import loader
from hostimaged.boot.esp import mount_at
from hostimaged.boot.loader import Bootloader
from hostimaged.errors import HostimageError, InvalidArgs, from_os_error
from hostimaged.host.bootdirs import BootDirs, candidates, mount_table
from hostimaged.host.booted import read_booted
from hostimaged.host.entries import NOTHING, BootSets, read_sets
from hostimaged.host.imagefacts import ImageSource
from hostimaged.host.marker import read_marker
from hostimaged.host.model import Deployment, HostState, Problem, ProblemId, Role, Severity
from hostimaged.host.rows import RowFacts, read_row
from hostimaged.host.softcheck import SoftRebootCheck
from hostimaged.host.tags import PIN_TAG
from hostimaged.ids import DeploymentId
from hostimaged.oci.images import tags
from hostimaged.system.paths import BOOT_IN_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    from hostimaged.boot.esp import Mount
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.booted import Booted
    from hostimaged.host.marker import Marker
    from hostimaged.ids import ManifestDigest
    from hostimaged.system.paths import HostPaths

    _T = TypeVar("_T")

#: bootc's rollback insists on two.
_BOOTC_ENTRIES: Final = 2
#: State directories that are looked at: hosts have three.
_MAX_STATES: Final = 1000


def read_host(
    paths: HostPaths,
    repository: Repository | None,
    *,
    bootloader: Bootloader | None = None,
    soft_reboots: bool = False,
) -> HostState:
    """What is installed on this host; ``repository`` is None where it cannot be opened. Never raises.

    ``bootloader``: which one there is, where nobody can be asked (an offline install). ``soft_reboots``:
    whether to find out what can be reached by one, which reads the SELinux policies where SELinux is on.
    """
    reader = _Reader(paths, repository)
    no_mounts: list[Mount] = []
    table = reader.attempt(ProblemId.BOOTED_UNKNOWN, lambda: mount_table(paths), no_mounts)
    booted = reader.attempt(ProblemId.BOOTED_UNKNOWN, lambda: read_booted(paths, table), None)
    if bootloader is None:
        bootloader = reader.attempt(
            ProblemId.BOOT_DIRECTORY, lambda: loader.detect(paths.efivars), Bootloader.GRUB
        )
    dirs, sets = reader.boot_sets(candidates(paths, bootloader, table), booted)
    marker = reader.attempt(ProblemId.MARKER_DAMAGED, lambda: read_marker(paths.marker_dir), None)
    rows = reader.rows(dirs, sets, booted, marker)
    if soft_reboots:
        rows = _with_soft_reboots(paths, repository, dirs, rows)
    reader.compare(rows, sets)
    return HostState(
        tuple(rows),
        bootloader,
        dirs,
        sets,
        booted,
        marker,
        tuple(reader.problems),
        read_only=_read_only(paths, table),
        usr_overlay=_usr_overlay(paths, table),
    )


def _mount_at(paths: HostPaths, table: list[Mount], path: Path) -> Mount | None:
    """What is mounted at ``path``, which the table names as the running system sees it."""
    root = paths.scratch_root or Path("/")
    return mount_at(table, b"/" + os.fsencode(path.relative_to(root))) if path.is_relative_to(root) else None


def _read_only(paths: HostPaths, table: list[Mount]) -> bool:
    """Whether the physical root's file system, not only its mount, refuses writing."""
    mount = _mount_at(paths, table, paths.physical_root)
    return mount is not None and "ro" in mount.super_options


def _usr_overlay(paths: HostPaths, table: list[Mount]) -> str:
    mount = _mount_at(paths, table, paths.usr)
    if mount is None:
        return ""
    return "readOnly" if mount.read_only else "readWrite"


@dataclass(slots=True)
class _Reader:
    """One look at a host; ``problems`` are the host's own."""

    paths: HostPaths
    repository: Repository | None
    problems: list[Problem] = field(default_factory=list)

    def problem(self, id_: ProblemId, text: str, severity: Severity = Severity.ERROR) -> None:
        self.problems.append(Problem(id_, text, severity))

    def attempt(self, id_: ProblemId, read: Callable[[], _T], otherwise: _T) -> _T:
        """What ``read`` gives; ``otherwise``, and a problem, if it raises."""
        try:
            return read()
        except HostimageError as error:
            self.problem(id_, error.message)
            return otherwise

    # --- boot entries --------------------------------------------------------------------------------------

    def boot_sets(self, found: list[BootDirs], booted: Booted | None) -> tuple[BootDirs, BootSets]:
        """The directories whose entries count: those with the booted deployment, else the likeliest."""
        read = [(dirs, read_sets(dirs)) for dirs in found]
        with_booted = (
            pair
            for pair in read
            if booted is not None and any(entry.id == booted.id for entry in pair[1].entries)
        )
        dirs, sets = next(with_booted, read[0])
        if sets.unreadable:
            id_ = ProblemId.BOOT_DIRECTORY if dirs.boot is None else ProblemId.ENTRIES_UNREADABLE
            self.problem(id_, sets.unreadable)
        for each in (sets.live, sets.staged):
            for foreign in each.foreign if each is not None else ():
                if foreign.problem:
                    self.problem(ProblemId.ENTRY_DAMAGED, foreign.problem, Severity.WARNING)
        return _with_prefix(dirs, sets, booted), sets

    # --- deployments ---------------------------------------------------------------------------------------

    def rows(
        self, dirs: BootDirs, sets: BootSets, booted: Booted | None, marker: Marker | None
    ) -> list[Deployment]:
        """All deployments, in the order of ``HostState``."""
        live = sets.live or NOTHING
        ids = [*live.ids, *(sets.staged or NOTHING).ids]
        if booted is not None:
            ids.append(booted.id)
        facts = RowFacts(
            deploy=self.paths.deployments,
            repository=self.repository,
            images=None if self.repository is None else ImageSource(self.repository),
            dirs=dirs,
            sets=sets,
            booted=None if booted is None else booted.id,
            pins=self._pins(),
            tolerant=booted is not None and booted.optional,
        )
        ids += self._states(facts.deploy)
        rows = [read_row(facts, id_) for id_ in dict.fromkeys(ids)]
        return _in_order(_with_roles(rows, live.ids, booted, marker), live.ids)

    def _states(self, deploy: Path) -> list[DeploymentId]:
        """The deployments that have a directory of state, sorted."""

        def names() -> list[str]:
            try:
                return sorted(os.listdir(deploy))
            except FileNotFoundError:
                return []
            except OSError as error:
                raise from_os_error(error, f"cannot read {deploy}") from error

        found = []
        nothing: list[str] = []
        for name in self.attempt(ProblemId.STATE_UNREADABLE, names, nothing):
            try:
                found.append(DeploymentId(name))
            except InvalidArgs:
                continue
        return found[:_MAX_STATES]

    def _pins(self) -> frozenset[ManifestDigest]:
        repository = self.repository
        if repository is None:
            return frozenset()
        nothing: dict[str, ManifestDigest] = {}
        found = self.attempt(ProblemId.REPOSITORY, lambda: tags(repository), nothing)
        return frozenset(digest for name, digest in found.items() if name.startswith(PIN_TAG))

    # --- what does not fit together ------------------------------------------------------------------------

    def compare(self, rows: list[Deployment], sets: BootSets) -> None:
        """Problems of the host as a whole."""
        booted = next((row for row in rows if row.role is Role.BOOTED), None)
        if booted is not None and booted.entry is None and not sets.unreadable:
            text = "no boot entry starts the deployment that runs: another boot directory may be in use"
            self.problem(ProblemId.BOOTED_NO_ENTRY, text)
        kinds = {
            row.origin.boot_type for row in rows if row.origin is not None and row.role is not Role.HIDDEN
        }
        if len(kinds - {None}) > 1:
            text = "deployments with and without a UKI are mixed, which bootc refuses"
            self.problem(ProblemId.BOOT_TYPES_DIFFER, text, Severity.WARNING)
        count = len((sets.live or NOTHING).entries)
        if count > _BOOTC_ENTRIES:
            text = f"bootc rollback will refuse: there are {count} boot entries, and it insists on two"
            self.problem(ProblemId.TOO_MANY_ENTRIES, text, Severity.WARNING)


def _with_prefix(dirs: BootDirs, sets: BootSets, booted: Booted | None) -> BootDirs:
    """With the prefix that entries use which work: whether /boot is its own file system is theirs to know."""
    if dirs.loader is not Bootloader.GRUB or sets.live is None:
        return dirs
    entries = [entry for entry in sets.live.entries if not entry.is_uki]
    running = [entry for entry in entries if booted is not None and entry.id == booted.id]
    for entry in (*running, *entries):
        prefix, found, _ = entry.files[0].partition("/" + _directory_name(entry.files[0]) + "/")
        if found and prefix in ("", BOOT_IN_ROOT):
            return replace(dirs, prefix=prefix)
    return dirs


def _directory_name(kernel: str) -> str:
    return kernel.rpartition("/")[0].rpartition("/")[2]


def _with_roles(
    rows: Iterable[Deployment],
    menu: tuple[DeploymentId, ...],
    booted: Booted | None,
    marker: Marker | None,
) -> list[Deployment]:
    """Each with its role: deployments.md 8."""
    found = []
    for row in rows:
        role = Role.HIDDEN
        if booted is not None and row.id == booted.id:
            role = Role.BOOTED
        elif _is_staged(row, marker):
            role = Role.STAGED
        elif row.live is not None or row.pinned:
            role = Role.OTHER
        locked = role is Role.STAGED and marker is not None and marker.finalization_locked
        found.append(replace(row, role=role, locked=locked, default=menu[:1] == (row.id,)))
    # What rolling back boots: the first of the menu that would start.
    choice = next(
        (row for id_ in menu for row in found if row.id == id_ and row.role is Role.OTHER and row.bootable),
        None,
    )
    return [replace(row, role=Role.ROLLBACK) if row is choice else row for row in found]


def _is_staged(row: Deployment, marker: Marker | None) -> bool:
    """Whether the marker means it: with an entry and an origin, which are written before the marker."""
    return (
        marker is not None and row.id == marker.depl_id and row.entry is not None and row.origin is not None
    )


def _in_order(rows: list[Deployment], menu: tuple[DeploymentId, ...]) -> list[Deployment]:
    places = {id_: place for place, id_ in enumerate(menu)}

    def key(row: Deployment) -> tuple[int, int]:
        if row.role is Role.HIDDEN:
            return 4, 0
        if row.role is Role.STAGED:
            return (2 if row.locked else 0), 0
        return (1, places.get(row.id, len(menu))) if row.live or row.role is Role.BOOTED else (3, 0)

    return sorted(rows, key=key)


def _with_soft_reboots(
    paths: HostPaths, repository: Repository | None, dirs: BootDirs, rows: list[Deployment]
) -> list[Deployment]:
    booted = next((row for row in rows if row.role is Role.BOOTED), None)
    check = SoftRebootCheck(paths, repository, dirs, booted)
    return [row if row.role is Role.HIDDEN else replace(row, soft_reboot=check.check(row)) for row in rows]
