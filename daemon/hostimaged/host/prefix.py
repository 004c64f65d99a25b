"""Kernels of bootc before March 2026 get the prefix that all later ones have (boot-entries.md 13).

bootc does this whenever it opens a host, and then drops from the menu whatever has the prefix already: on a
host with both it would take our entry away. So before the first entry with a prefix comes, all others get it:
copies are made, the complete menu is written and exchanged, and what no entry starts any more is removed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.boot.grubcfg import MenuEntry
from hostimaged.host import cleanup, journal, space
from hostimaged.host.artifacts import INITRD, KERNEL, read_file
from hostimaged.host.bootsets import digest
from hostimaged.host.journal import Operation, Transaction
from hostimaged.host.menu import live_menu
from hostimaged.ids import DeploymentId

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.boot.bls import Entry
    from hostimaged.host.entries import SetEntry
    from hostimaged.host.menu import MenuItem
    from hostimaged.host.model import HostState
    from hostimaged.host.session import Session

#: Named points of ``Reporter.at``.
FAULT_POINTS: Final = ("prefix.copied", "prefix.journal", "prefix.entries", "prefix.done")

_ID: Final = re.compile(r"[0-9a-f]{128}\Z")


def migrate(session: Session, state: HostState) -> bool:
    """Give the prefix to every kernel and UKI of the live menu; says whether there was one without.

    Raises ``NoSpace``, ``ReadOnly``, ``StorageError`` or ``BootLoaderError``; the menu is then as it was.
    """
    live = state.sets.live
    without = {} if live is None else {each.artifact: each for each in live.entries if _lacks_prefix(each)}
    sources = {name: path for name, each in without.items() if (path := _source(state, each)) is not None}
    if not sources:
        return False
    _copy(session, state, sources)
    session.reporter.at("prefix.copied")
    menu = live_menu(state)
    menu = menu.having([_prefixed(state, item, sources) for item in menu.items])
    files = menu.render(state.dirs.loader, is_menu=state.sets.is_menu)
    transaction = Transaction(
        Operation.ACTIVATE,
        session.boot_id,
        session.now(),
        before=digest(None if live is None else live.raw),
        after=files.digest,
    )
    journal.write(session.paths.transaction, transaction)
    session.reporter.at("prefix.journal")
    session.store(state).replace_live(files)
    session = session.steady()
    session.reporter.at("prefix.entries")
    cleanup.sweep_artifacts(session, session.state())
    journal.remove(session.paths.transaction)
    session.reporter.at("prefix.done")
    return True


def _lacks_prefix(each: SetEntry) -> bool:
    return not each.entry.has_prefix and _ID.match(each.artifact) is not None


def _source(state: HostState, each: SetEntry) -> Path | None:
    """The kernel's directory, or the UKI; None for one that is not as bootc makes them."""
    if each.is_uki:
        path = state.dirs.uki_file(each.files[0])
        return path if path is not None and path.is_file() else None
    names = [file.rpartition("/")[2] for file in each.files]
    kernel = state.dirs.file(each.files[0])
    if names != [KERNEL, INITRD] or kernel is None or not kernel.is_file():
        return None
    return kernel.parent


def _copy(session: Session, state: HostState, sources: dict[str, Path]) -> None:
    for name, path in sources.items():
        id_ = DeploymentId(name)
        if path.is_dir():
            kernels = session.kernels(state)
            if any(found.name == name and found.complete for found in kernels.found()):
                continue
            size = sum((path / part).stat().st_size for part in (KERNEL, INITRD))
            space.require(kernels.directory, size, "the kernel under its new name")
            kernels.write(id_, read_file(path / KERNEL), read_file(path / INITRD))
        else:
            ukis = session.ukis(state)
            extra = path.with_name(f"{path.stem}{bls.ADDONS_SUFFIX}")
            addons = sorted(extra.iterdir()) if extra.is_dir() else []
            size = sum(each.stat().st_size for each in (path, *addons))
            space.require(ukis.directory, size, "the unified kernel image under its new name")
            ukis.write(id_, read_file(path), [(each.name, read_file(each)) for each in addons])


def _prefixed(state: HostState, item: MenuItem, sources: dict[str, Path]) -> MenuItem:
    entry = item.entry
    name = entry.artifact()
    if entry.has_prefix or name not in sources:
        return item
    uki = f"/{bls.UKI_DIRECTORY}/{bls.uki_name(name)}"
    if isinstance(entry, MenuEntry):
        return replace(item, entry=replace(entry, chainloader=uki))
    if entry.efi:
        return replace(item, entry=replace(entry, efi=uki))
    return replace(item, entry=_in_directory(entry, f"{state.dirs.prefix}/{bls.kernel_directory(name)}"))


def _in_directory(entry: Entry, directory: str) -> Entry:
    return replace(entry, linux=f"{directory}/{KERNEL}", initrd=(f"{directory}/{INITRD}",))
