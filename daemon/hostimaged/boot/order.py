"""The order of a boot menu, by the rules of the boot loader that shows it.

The first entry boots, unless somebody chose another: nobody here writes defaults for a boot loader.
"""

from __future__ import annotations

import re
from functools import cmp_to_key
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.boot.loader import Bootloader
from hostimaged.boot.versions import filevercmp, grub_compare, rpmvercmp, split_name, uapi_compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.boot.bls import Entry

Named = tuple[str, "Entry"]

#: A boot counter at the end of a name: tries left, and done (UAPI.1, Boot Counting).
_COUNTER: Final = re.compile(r"\+([0-9]{1,9})(?:-[0-9]{1,9})?\Z")


def menu_order(loader: Bootloader, entries: Sequence[Named]) -> list[Named]:
    """Entries with their file names, first in the menu first.

    systemd-boot sorts by ``sort-key``, the two GRUBs by file name. Where GRUB takes two names for the same it
    shows one of them only; both are in the result.
    """
    compare = _systemd_compare if loader is Bootloader.SYSTEMD else _grub_entries
    return sorted(entries, key=cmp_to_key(compare))


def _grub_entries(a: Named, b: Named) -> int:
    one, two = a[0].removesuffix(bls.ENTRY_SUFFIX), b[0].removesuffix(bls.ENTRY_SUFFIX)
    # Of names that GRUB takes for the same, some fixed one first.
    return grub_compare(two, one) or (one < two) - (one > two)


def _systemd_compare(a: Named, b: Named) -> int:
    """systemd-boot 250 and later."""
    (name, entry), (other_name, other) = a, b
    identifier, exhausted = boot_counter(name)
    other_identifier, other_exhausted = boot_counter(other_name)
    if exhausted != other_exhausted:
        return 1 if exhausted else -1
    if bool(entry.sort_key) != bool(other.sort_key):
        return -1 if entry.sort_key else 1
    if entry.sort_key:
        keys = (entry.sort_key, entry.machine_id), (other.sort_key, other.machine_id)
        if keys[0] != keys[1]:
            return -1 if keys[0] < keys[1] else 1
        if result := uapi_compare(other.version, entry.version):
            return result
    return uapi_compare(other_identifier, identifier) or (identifier > other_identifier) - (
        identifier < other_identifier
    )


def boot_counter(file_name: str) -> tuple[str, bool]:
    """The name of an entry without suffix and boot counter, and whether its tries are used up."""
    stem = file_name.removesuffix(bls.ENTRY_SUFFIX).lower()
    found = _COUNTER.search(stem)
    if found is None:
        return stem, False
    return stem[: found.start()], int(found[1]) == 0


def same_for_all(file_names: Sequence[str]) -> bool:
    """Whether every program that sorts these names sorts them as they are given, first in the menu first.

    Those are bootc (plain strings), GRUB of Fedora and RHEL in its two versions, and GRUB 2.14. False also
    if one of them takes two names for the same.
    """
    stems = [name.removesuffix(bls.ENTRY_SUFFIX) for name in file_names]
    return all(
        full > full_two
        and grub_compare(one, two) > 0
        and _plain_rpm(one, two) > 0
        and filevercmp(full, full_two) > 0
        for (one, two), (full, full_two) in zip(pairwise(stems), pairwise(file_names), strict=True)
    )


def _plain_rpm(a: str, b: str) -> int:
    parts = zip(split_name(a), split_name(b), strict=True)
    return next((result for one, two in parts if (result := rpmvercmp(one, two))), 0)


def choose_names(systems: Sequence[tuple[str, str]]) -> list[str]:
    """File names for entries of these operating systems (id, version), first in the menu first.

    They are bootc's names if these sort the same for everybody. Otherwise all get the id and the version of
    the first, so that nothing but the priority decides.
    """
    count = len(systems)
    names = [bls.file_name(*system, count - 1 - at) for at, system in enumerate(systems)]
    if count > 10 or not same_for_all(names):
        width = len(str(count - 1))
        stem = bls.file_name(*systems[0], 0).removesuffix(f"0{bls.ENTRY_SUFFIX}")
        names = [f"{stem}{count - 1 - at:0{width}d}{bls.ENTRY_SUFFIX}" for at in range(count)]
    return names
