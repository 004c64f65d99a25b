"""Whether all that is on a host serves a deployment: every path but those of the repository is accounted for.

What may be there is told by the boot loader's menu, the marker and the pins, read without any code of ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from hostimage_testing.hosts import RecordedHost
from hostimage_testing.os_images import OsImage

#: What other tests of a running system, and the test double of its trees, change at will.
_NOT_LOOKED_AT = ("sysroot/composefs", "usr", "proc", "sys")
MARKER = "run/composefs/staged-deployment"
#: Made by whoever is first, and kept.
_LASTING = (
    "run/hostimaged",
    "run/hostimaged/lock",
    "run/composefs",
    "sysroot/state/hostimaged",
    "sysroot/state/hostimaged/tmp",
    "sysroot/state/hostimaged/pulls.json",
    "sysroot/state/hostimaged/expected.json",
    "sysroot/state/hostimaged/tags.json",
    "sysroot/state/hostimaged/collection-due",
    "efi/EFI/Linux/bootc",
    "efi/loader/loader.conf",
)


def listing(root: Path, leave_out: Collection[str] = ()) -> set[str]:
    """Every path below ``root``, relative to it."""
    found = set()
    for directory, directories, files in os.walk(root):
        place = os.path.relpath(directory, root)
        paths = [os.path.normpath(f"{place}/{name}") for name in [*directories, *files]]
        directories[:] = [d for d in directories if os.path.normpath(f"{place}/{d}") not in leave_out]
        found.update(path for path in paths if path not in leave_out)
    return found


def unexplained(host: RecordedHost, kept: Collection[str] = (), etc: Collection[str] = ()) -> list[str]:
    """What is there and serves nothing, and what is missing, in words; raises ``BootFailed`` as booting does.

    ``kept`` are ids of deployments whose state may stay, or go, without an entry: pinned ones, and those that
    wait for the collector. ``etc`` are files of the administrator.
    """
    found = listing(host.root, _NOT_LOOKED_AT)
    required = {os.path.relpath(path, host.root) for path in _places(host)}
    allowed = {*required, *_LASTING}
    # bootc may leave a marker without a set (bootc 1.16: a rollback, a deletion).
    staged = host.marker.exists() and host.entries_staged.exists()
    lines = [*host.menu(), *(host.menu(staged=True) if staged else ())]
    images = {image.id: image for image in map(host.startable, lines)}
    for live in (True, False) if staged else (True,):
        required |= _entries(host, staged=not live)
    for line in lines:
        required |= _kernel(host, [value for _, value in line.fields])
    for image in images.values():
        required |= _state(host, image)
    for identifier in {*images, *kept}:
        allowed |= _state(host, host.images[identifier])
        allowed |= _with_parents(f"{_of(host, host.state(identifier))}/etc/{name}" for name in etc)
    if staged:
        required |= {"run/composefs", MARKER}
    wrong = [f"left over: {path}" for path in sorted(found - required - allowed)]
    return wrong + [f"lost: {path}" for path in sorted(required - found)]


def _of(host: RecordedHost, path: Path) -> str:
    return os.path.relpath(path, host.root)


def _with_parents(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        found |= {str(path), *(str(parent) for parent in Path(path).parents)}
    return found - {"."}


def _places(host: RecordedHost) -> list[Path]:
    """What is there before the first deployment, and what holds the entries."""
    root = host.root
    places = [root / name for name in ("run", "etc", "efi", "efi/EFI", "efi/EFI/Linux", "sysroot")]
    places += [host.sysroot / f"state{name}" for name in ("", "/deploy", "/os", "/os/default")]
    places += [host.sysroot / "state/os/default/var", host.entries.parent, host.boot_dir]
    if host.kind.classic:
        places += [root / "boot/grub2", root / "boot/grub2/grub.cfg"]
    if host.kind.uki:
        places.append(host.uki_dir)
        if host.kind.classic:
            places.append(root / "boot/grub2/efiuuid.cfg")
    return places


def _entries(host: RecordedHost, *, staged: bool) -> set[str]:
    place = host.entries_staged if staged else host.entries
    names = [] if place.is_file() else [f"/{line.name}" for line in host.menu(staged=staged)]
    return {_of(host, place), *(f"{_of(host, place)}{name}" for name in names)}


def _kernel(host: RecordedHost, fields: Collection[str]) -> set[str]:
    """Files that the fields of an entry name, with their directories."""
    root = host.root if host.kind.classic and not host.kind.uki else host.root / "efi"
    found = {_of(host, root / value.lstrip("/")) for value in fields if value.startswith("/")}
    return {each for path in found for each in (path, os.path.dirname(path))}


def _state(host: RecordedHost, image: OsImage) -> set[str]:
    state = _of(host, host.state(image.id))
    files = _with_parents(f"{state}/etc/{name}" for name in image.recipe.etc_files)
    return {*files, f"{state}/var", f"{state}/{image.id}.origin"}
