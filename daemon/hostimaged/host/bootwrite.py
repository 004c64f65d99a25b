"""A whole boot menu from one ordered list of deployments: its names, its keys, its bytes.

Nothing here patches a set: whoever changes the order, adds or drops a deployment, gives the list that is to
be and gets the files. Names and sort keys are chosen so that systemd-boot, GRUB and bootc's own reading of
the names agree about the order; it is read back before anything is written (boot-entries.md 4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls, order
from hostimaged.boot.grubcfg import (
    MenuEntry,
    Surroundings,
    parse_surroundings,
    parse_user_cfg,
    serialise_user_cfg,
)
from hostimaged.boot.osrelease import DEFAULT_ID
from hostimaged.errors import BootLoaderError
from hostimaged.host.bootsets import GrubSets, RawSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hostimaged.boot.bls import Entry
    from hostimaged.boot.loader import Bootloader
    from hostimaged.ids import DeploymentId

#: More would give the last of them a sort key of two digits, which sorts before the third.
MAX_ENTRIES: Final = 10
_OWN_SORT_KEY: Final = re.compile(r"bootc-(.+)-[0-9]+\Z")


@dataclass(frozen=True, slots=True)
class Planned:
    """One entry of a menu of BLS files: what it says, and the id of the system in it (os-release)."""

    entry: Entry
    os_id: str = DEFAULT_ID


def system_of(entry: Entry) -> str:
    """The os-release id that an entry of bootc's or ours was written with, as its sort key says it."""
    found = _OWN_SORT_KEY.match(entry.sort_key)
    return found[1] if found else DEFAULT_ID


def render_bls(loader: Bootloader, menu: Sequence[Planned], foreign: Iterable[tuple[str, bytes]]) -> RawSet:
    """The files of a menu, first entry first; ``foreign`` files, of other tools, are carried over.

    Raises ``BootLoaderError`` for a menu that cannot be written, or that would not be shown in this order.
    """
    if not 0 < len(menu) <= MAX_ENTRIES:
        raise BootLoaderError(f"a boot menu cannot have {len(menu)} deployments")
    systems = [(planned.os_id, planned.entry.version) for planned in menu]
    names = order.choose_names(systems)
    entries = [planned.entry.with_order(menu[0].os_id, at) for at, planned in enumerate(menu)]
    shown = order.menu_order(loader, list(zip(names, entries, strict=True)))
    if [name for name, _ in shown] != names:
        raise BootLoaderError(f"no names are known by which {loader} would show this menu in its order")
    files = {name: entry.serialise() for name, entry in zip(names, entries, strict=True)}
    kept = {name: content for name, content in foreign if name not in files}
    return RawSet.of(kept | files)


def render_grub(menu: Sequence[MenuEntry], around: Surroundings) -> RawSet:
    """``user.cfg`` with these entries and what else is in it, read back; raises ``BootLoaderError``."""
    if not 0 < len(menu) <= MAX_ENTRIES:
        raise BootLoaderError(f"a boot menu cannot have {len(menu)} deployments")
    content = serialise_user_cfg(menu, around)
    shown = [entry.deployment_id() for entry in parse_user_cfg(content)]
    if shown != [entry.deployment_id() for entry in menu] or parse_surroundings(content) != around:
        raise BootLoaderError("the menu cannot be written so that GRUB would show it in its order")
    return RawSet(((GrubSets.LIVE, content),))


def with_options(entry: Entry, options: str) -> Entry:
    """A copy with these kernel arguments."""
    return replace(entry, options=options)


def kernel_entry(
    deployment: DeploymentId, *, title: str, version: str, options: str, directory: str, prefix: str
) -> Entry:
    """The entry of a kernel; ``directory`` is that of kernel and initrd, ``prefix`` what it lies in.

    ``options`` names ``deployment``, or ``BootLoaderError`` is raised.
    """
    entry = bls.Entry(
        title=title,
        version=version,
        linux=f"{prefix}/{directory}/vmlinuz",
        initrd=(f"{prefix}/{directory}/initrd",),
        options=options,
    )
    if entry.deployment_id() != deployment:
        raise BootLoaderError("the kernel arguments do not name the deployment")
    return entry


def uki_entry(deployment: DeploymentId, *, title: str, version: str, key: bls.EfiKey, prefix: str) -> Entry:
    """The entry of a unified kernel image, under ``key`` in ``prefix``."""
    return bls.Entry(title=title, version=version, efi=f"{prefix}/{bls.uki_name(deployment)}", efi_key=key)
