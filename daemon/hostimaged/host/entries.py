"""The two sets of boot entries, read: which entry boots which deployment, in the order of the menu.

Reading is tolerant: what is no entry of a deployment is kept aside, and costs nothing. Facts: boot-entries.md
4, 5 and 8 (bootc 1.16).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls, grubcfg
from hostimaged.boot.order import menu_order
from hostimaged.errors import BootLoaderError, HostimageError, InvalidArgs
from hostimaged.host.bootsets import BlsSets, GrubSets, RawSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostimaged.boot.bls import Entry
    from hostimaged.boot.grubcfg import MenuEntry
    from hostimaged.host.bootdirs import BootDirs
    from hostimaged.host.bootsets import BootSetStore
    from hostimaged.ids import DeploymentId

#: How often sets that change while they are read are read again. Writers exchange them a few times a day.
_TRIES: Final = 16
#: What entries of bootc are called; a broken one is worth a word.
_OURS: Final = "bootc_"


@dataclass(frozen=True, slots=True)
class SetEntry:
    """An entry that boots the deployment ``id``; ``file_name`` is where it stands.

    ``artifact`` names its kernel directory or UKI, without prefix and suffix.
    """

    file_name: str
    entry: Entry | MenuEntry
    id: DeploymentId
    artifact: str

    @property
    def options(self) -> str:
        """Its kernel arguments; "" with a UKI, which has them inside."""
        return (self.entry.options or "") if isinstance(self.entry, bls.Entry) else ""

    @property
    def is_uki(self) -> bool:
        """Whether it starts a UKI."""
        return isinstance(self.entry, grubcfg.MenuEntry) or bool(self.entry.efi)

    @property
    def files(self) -> tuple[str, ...]:
        """What it makes the boot loader read, as it says it."""
        if isinstance(self.entry, grubcfg.MenuEntry):
            return (self.entry.chainloader,)
        return (self.entry.efi,) if self.entry.efi else (self.entry.linux, *self.entry.initrd)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A file of a set that boots no deployment; ``problem`` says what is wrong if it seems to be bootc's."""

    file_name: str
    data: bytes
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EntrySet:
    """One set: its deployments' entries in menu order, other people's, and the files as they are.

    Of a ``user.cfg`` only entries of deployments are told apart; other people's are in ``menu`` alone, which
    has them all in their order, and ``around`` has what is no entry.
    """

    entries: tuple[SetEntry, ...]
    raw: RawSet
    foreign: tuple[Foreign, ...] = ()
    menu: tuple[MenuEntry, ...] = ()
    around: grubcfg.Surroundings = grubcfg.NOTHING_ELSE

    @property
    def ids(self) -> tuple[DeploymentId, ...]:
        """The deployments in menu order, each once."""
        return tuple(dict.fromkeys(entry.id for entry in self.entries))

    def of(self, id_: DeploymentId) -> tuple[SetEntry, ...]:
        """The entries of a deployment; more than one if somebody made a mistake."""
        return tuple(entry for entry in self.entries if entry.id == id_)


NOTHING: Final = EntrySet((), RawSet(()))


@dataclass(frozen=True, slots=True)
class BootSets:
    """Both sets at one moment. ``live`` and ``staged`` are None where there is no such set.

    ``is_menu``: they are GRUB files. ``unreadable`` says why nothing could be read, then both are None and
    nothing is known.
    """

    live: EntrySet | None
    staged: EntrySet | None
    is_menu: bool = False
    unreadable: str = ""

    @property
    def entries(self) -> tuple[SetEntry, ...]:
        """All entries, the live ones first: what garbage collection must keep."""
        return (*(self.live or NOTHING).entries, *(self.staged or NOTHING).entries)


def set_store(dirs: BootDirs) -> BootSetStore | None:
    """Where the sets of this host are; None without a boot directory.

    A ``user.cfg`` means that GRUB starts UKIs, and its other entries do not count.
    """
    if dirs.loader_dir is None:
        return None
    grub = dirs.grub_dir
    if grub is not None and any(os.path.lexists(grub / name) for name in (GrubSets.LIVE, GrubSets.STAGED)):
        return GrubSets(grub)
    return BlsSets(dirs.loader_dir)


def read_sets(dirs: BootDirs) -> BootSets:
    """Read both sets, so that they belong together. Never raises."""
    store = set_store(dirs)
    if store is None:
        return BootSets(None, None, unreadable="the file system with the boot entries is not mounted")
    is_menu = isinstance(store, GrubSets)
    for attempt in range(_TRIES):
        try:
            live, staged = store.live(), store.staged()
            if store.live() != live:
                # They were exchanged meanwhile.
                continue
            return BootSets(
                None if live is None else parse_set(dirs, live, is_menu=is_menu),
                None if staged is None else _parse_staged(dirs, staged, is_menu=is_menu),
                is_menu,
            )
        except HostimageError as error:
            if attempt == _TRIES - 1:
                return BootSets(None, None, is_menu, unreadable=error.message)
    return BootSets(None, None, is_menu, unreadable="the boot entries change all the time")


def _parse_staged(dirs: BootDirs, raw: RawSet, *, is_menu: bool) -> EntrySet:
    """As ``parse_set``; one that makes no sense boots nothing, and hides nothing of what is live."""
    try:
        return parse_set(dirs, raw, is_menu=is_menu)
    except BootLoaderError as error:
        return EntrySet((), raw, tuple(Foreign(name, data, error.message) for name, data in raw.files))


def parse_set(dirs: BootDirs, raw: RawSet, *, is_menu: bool) -> EntrySet:
    """What the files of a set mean. Raises ``BootLoaderError`` for a ``user.cfg`` that makes no sense."""
    if is_menu:
        ((name, data),) = raw.files
        menu = tuple(grubcfg.parse_user_cfg(data, name))
        around = grubcfg.parse_surroundings(data, name)
        return EntrySet(tuple(_menu_entries(name, menu)), raw, menu=menu, around=around)
    found: dict[str, SetEntry] = {}
    foreign = []
    for name, data in raw.files:
        if not name.endswith(bls.ENTRY_SUFFIX):
            continue
        entry = _entry(name, data)
        if isinstance(entry, Foreign):
            foreign.append(entry)
        else:
            found[name] = entry
    named = [(name, each.entry) for name, each in found.items() if isinstance(each.entry, bls.Entry)]
    ordered = menu_order(dirs.loader, named)
    return EntrySet(tuple(found[name] for name, _ in ordered), raw, tuple(foreign))


def _entry(name: str, data: bytes) -> SetEntry | Foreign:
    try:
        entry = bls.parse(data, name)
        id_ = entry.deployment_id()
    except (BootLoaderError, InvalidArgs) as error:
        return Foreign(name, data, error.message if name.startswith(_OURS) else "")
    if id_ is None:
        return Foreign(name, data, f"{name} names no deployment" if name.startswith(_OURS) else "")
    return SetEntry(name, entry, id_, entry.artifact())


def _menu_entries(name: str, menu: tuple[MenuEntry, ...]) -> Iterator[SetEntry]:
    for entry in menu:
        id_ = entry.deployment_id()
        if id_ is not None:
            yield SetEntry(name, entry, id_, entry.artifact())
