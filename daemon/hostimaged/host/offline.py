"""Collecting garbage on the disk of a host that does not run, as builders of disk images and rescuers do."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hostimaged.boot.loader import Bootloader
from hostimaged.composefs.repository import Repository
from hostimaged.errors import InvalidArgs, PreconditionFailed
from hostimaged.host.collect import collect, dry_run
from hostimaged.host.read import read_host
from hostimaged.host.session import open_session, optional_verity
from hostimaged.system.locks import FileLock

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.host.collectplan import Rules
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths


def refuse_running(sysroot: Path, running: HostPaths) -> None:
    """Raise ``PreconditionFailed`` if ``sysroot`` is what the host that runs, ``running``, was started from.

    What is staged there is told by a file outside of ``sysroot``: it would be taken for a leftover.
    """
    try:
        same = sysroot.samefile(running.physical_root)
    except OSError:
        return
    if same:
        raise PreconditionFailed(f"{sysroot} belongs to the host that runs: use hostimagectl gc")


def collect_offline(
    paths: HostPaths,
    rules: Rules,
    *,
    bootloader: Bootloader | None,
    lock_timeout: float,
    preview: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """What ``collect`` says, or ``dry_run`` if ``preview``, of the host at ``paths`` (``HostPaths.target``).

    bootc's containers-storage is left to the host itself: only podman removes from it, which would run here
    with what is on a disk of somebody else.

    ``bootloader`` is found by where there are entries of deployments, if it is not given. Raises
    ``InvalidArgs`` if there are some in both places, ``RepositoryMissing`` if there is no repository, and
    what ``collect`` raises.
    """
    rules = replace(rules, store=False)
    if preview:
        # Nothing is written, so that the disk may be mounted read-only.
        insecure = optional_verity(paths)
        with Repository.open(paths.repository, lock_timeout=lock_timeout, insecure=insecure) as repository:
            loader = bootloader or _find_bootloader(paths, repository)
            state = read_host(paths, repository, bootloader=loader)
            found = dry_run(paths, repository, state, rules, now=int(time.time()), reporter=reporter)
            return found | {"dry-run": True}
    with (
        FileLock(paths.job_lock, timeout=lock_timeout, what=str(paths.job_lock)),
        open_session(paths, reporter, lock_timeout=lock_timeout) as session,
    ):
        session.bootloader = bootloader or _find_bootloader(paths, session.repository)
        return collect(session, rules)


def _find_bootloader(paths: HostPaths, repository: Repository) -> Bootloader:
    """By the place of the entries; where there are none either answer leaves the collection in doubt."""
    found = [
        each
        for each in (Bootloader.SYSTEMD, Bootloader.GRUB)
        if (live := read_host(paths, repository, bootloader=each).sets.live) is not None and live.entries
    ]
    if len(found) > 1:
        raise InvalidArgs(
            f"there are boot entries of deployments in {paths.esp} and in {paths.boot}: name the boot loader"
        )
    return found[0] if found else Bootloader.SYSTEMD
