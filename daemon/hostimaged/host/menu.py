"""The boot menu as one ordered list of deployments, between what was read and what is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hostimaged.boot.bls import Entry
from hostimaged.boot.grubcfg import NOTHING_ELSE
from hostimaged.errors import BootLoaderError
from hostimaged.host.bootwrite import Planned, render_bls, render_grub, system_of, with_options
from hostimaged.host.entries import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.boot.grubcfg import MenuEntry, Surroundings
    from hostimaged.boot.loader import Bootloader
    from hostimaged.host.bootsets import RawSet
    from hostimaged.host.entries import EntrySet
    from hostimaged.host.model import HostState
    from hostimaged.ids import DeploymentId


@dataclass(frozen=True, slots=True)
class MenuItem:
    """A deployment in a menu, with what the boot loader is told of it."""

    id: DeploymentId
    entry: Entry | MenuEntry
    os_id: str

    @property
    def options(self) -> str:
        """Its kernel arguments; "" for a UKI, which has them inside."""
        return (self.entry.options or "") if isinstance(self.entry, Entry) else ""

    def with_options(self, options: str) -> MenuItem:
        """A copy with these kernel arguments; raises ``BootLoaderError`` for a UKI."""
        if not isinstance(self.entry, Entry) or self.entry.efi:
            raise BootLoaderError("kernel arguments are inside the unified kernel image, and signed with it")
        return replace(self, entry=with_options(self.entry, options))


@dataclass(frozen=True, slots=True)
class Menu:
    """The items in their order, the first boots next; and other people's entries, which are carried over.

    ``others`` are files of a directory of entries, ``other_entries`` entries of a GRUB menu, and ``around``
    what is no entry there.
    """

    items: tuple[MenuItem, ...]
    others: tuple[tuple[str, bytes], ...] = ()
    other_entries: tuple[MenuEntry, ...] = ()
    around: Surroundings = NOTHING_ELSE

    @classmethod
    def of(cls, entries: EntrySet | None) -> Menu:
        """What a set shows; of several entries of one deployment the first."""
        entries = entries or NOTHING
        items: dict[DeploymentId, MenuItem] = {}
        for each in entries.entries:
            os_id = system_of(each.entry) if isinstance(each.entry, Entry) else ""
            items.setdefault(each.id, MenuItem(each.id, each.entry, os_id))
        ours = {each.file_name for each in entries.entries}
        return cls(
            tuple(items.values()),
            tuple((name, data) for name, data in entries.raw.files if name not in ours),
            tuple(entry for entry in entries.menu if entry.deployment_id() is None),
            entries.around,
        )

    def item(self, id_: DeploymentId) -> MenuItem | None:
        """The item of a deployment."""
        return next((item for item in self.items if item.id == id_), None)

    def with_others_of(self, menu: Menu) -> Menu:
        """A copy with what other people have in ``menu``, in place of what they have in this one."""
        return replace(self, others=menu.others, other_entries=menu.other_entries, around=menu.around)

    def having(self, items: Sequence[MenuItem]) -> Menu:
        """A copy with these items."""
        return replace(self, items=tuple(items))

    def first(self, id_: DeploymentId) -> Menu:
        """A copy in which a deployment comes first and the others keep their order.

        Raises ``BootLoaderError`` if it is not in the menu.
        """
        chosen = self.item(id_)
        if chosen is None:
            raise BootLoaderError(f"deployment {id_} has no boot entry")
        return self.having([chosen, *(item for item in self.items if item.id != id_)])

    def without(self, id_: DeploymentId) -> Menu:
        """A copy without a deployment."""
        return self.having([item for item in self.items if item.id != id_])

    def render(self, loader: Bootloader, *, is_menu: bool) -> RawSet:
        """The files of the menu, ``is_menu`` for GRUB's own; raises ``BootLoaderError``."""
        if is_menu:
            ours = [item.entry for item in self.items if not isinstance(item.entry, Entry)]
            return render_grub([*ours, *self.other_entries], self.around)
        planned = [Planned(item.entry, item.os_id) for item in self.items if isinstance(item.entry, Entry)]
        return render_bls(loader, planned, self.others)


def live_menu(state: HostState) -> Menu:
    """The menu that the boot loader shows. Raises ``BootLoaderError`` if it cannot be read."""
    if state.sets.unreadable:
        raise BootLoaderError(f"the boot entries cannot be read: {state.sets.unreadable}")
    return Menu.of(state.sets.live)


def staged_menu(state: HostState) -> Menu:
    """The menu that the next activation puts in its place; as ``live_menu``."""
    if state.sets.unreadable:
        raise BootLoaderError(f"the boot entries cannot be read: {state.sets.unreadable}")
    return Menu.of(state.sets.staged)
