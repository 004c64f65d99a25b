"""Kernels and UKIs of deployments on the boot file system: written, shared, listed, removed.

Facts: boot-entries.md 3 and 6 (bootc 1.16). A type 1 artifact is a directory with ``vmlinuz`` and ``initrd``,
a UKI is a file, perhaps with a directory of addons. Each is written under a temporary name and renamed, so
that one of ours that has its name is whole; bootc's may lack a file (its writer ran out of space).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot import bls
from hostimaged.errors import from_os_error
from hostimaged.host import bootfs
from hostimaged.host.bootfs import TEMPORARY, told
from hostimaged.ids import BootDigest
from hostimaged.system import durable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hostimaged.ids import DeploymentId

KERNEL: Final = "vmlinuz"
INITRD: Final = "initrd"
_PIECE: Final = 1 << 20
_ID: Final = re.compile(r"[0-9a-f]{128}\Z")


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is on the boot file system for one deployment: ``name`` is without prefix and suffix.

    ``complete`` is False for a type 1 directory without kernel or initrd.
    """

    name: str
    path: Path
    complete: bool = True


class KernelFiles:
    """The type 1 artifacts in ``directory`` (boot-entries.md 1: BINDIR)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where the artifact ``name`` is, or would be."""
        return self.directory / bls.kernel_directory(name)

    def found(self) -> list[Artifact]:
        """All prefixed artifacts, sorted by name."""
        return [
            Artifact(name, self.path(name), complete=self._complete(self.path(name)))
            for name in _stripped(self.directory, "")
            if self.path(name).is_dir()
        ]

    def unprefixed(self) -> list[str]:
        """Names of artifacts of bootc before March 2026, which had no prefix."""
        return [name for name in _names(self.directory) if _ID.match(name)]

    def remove_unprefixed(self, name: str) -> None:
        """Remove one of those, durably."""
        with told(f"cannot remove {self.directory / name}"):
            bootfs.remove_name(self.directory, name)

    @staticmethod
    def _complete(path: Path) -> bool:
        return all((path / name).is_file() for name in (KERNEL, INITRD))

    def boot_digest(self, name: str) -> BootDigest | None:
        """The digest of an artifact by its bytes; None for one that is not complete."""
        total = hashlib.sha256()
        try:
            for part in (KERNEL, INITRD):
                with (self.path(name) / part).open("rb", buffering=0) as file:
                    while piece := file.read(_PIECE):
                        total.update(piece)
        except OSError:
            return None
        return BootDigest(total.hexdigest())

    def write(self, id_: DeploymentId, kernel: Iterable[bytes], initrd: Iterable[bytes]) -> None:
        """Make the artifact of ``id_``, durably. An incomplete one of that name is replaced.

        Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``, leaving nothing.
        """
        with _writing(self.directory) as (directory, temporary):
            with bootfs.new_directory(directory, temporary) as inner:
                durable.write_new_file(inner, KERNEL, kernel)
                durable.write_new_file(inner, INITRD, initrd)
            bootfs.put_in_place(self.directory, directory, temporary, bls.kernel_directory(id_))

    def remove(self, name: str) -> None:
        """Remove an artifact, durably: first its name, then its content. None is fine."""
        with told(f"cannot remove {self.path(name)}"):
            bootfs.remove_name(self.directory, bls.kernel_directory(name))

    def remove_temporary(self) -> None:
        """Remove what a crash left under temporary names."""
        bootfs.remove_temporary(self.directory)


class UkiFiles:
    """The UKIs in ``directory`` (``EFI/Linux/bootc`` of the ESP) with their addons."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where the UKI ``name`` is, or would be."""
        return self.directory / bls.uki_name(name)

    def found(self) -> list[Artifact]:
        """All prefixed UKIs, sorted by name; one of which only the addons are there is not complete."""
        stems = {*_stripped(self.directory, bls.EFI_SUFFIX), *_stripped(self.directory, bls.ADDONS_SUFFIX)}
        return [Artifact(name, self.path(name), complete=self.path(name).is_file()) for name in sorted(stems)]

    def unprefixed(self) -> list[str]:
        """Names, without suffix, of UKIs of bootc before March 2026, which had no prefix."""
        stems = {
            name.removesuffix(bls.ADDONS_SUFFIX).removesuffix(bls.EFI_SUFFIX)
            for name in _names(self.directory)
        }
        return sorted(stem for stem in stems if _ID.match(stem))

    def remove_unprefixed(self, name: str) -> None:
        """Remove one of those, durably."""
        with told(f"cannot remove {self.directory / name}"):
            bootfs.remove_name(self.directory, f"{name}{bls.EFI_SUFFIX}")
            bootfs.remove_name(self.directory, f"{name}{bls.ADDONS_SUFFIX}")

    def write(
        self, id_: DeploymentId, content: Iterable[bytes], addons: Iterable[tuple[str, Iterable[bytes]]] = ()
    ) -> None:
        """Make the UKI of ``id_`` and its addons, durably, the UKI last.

        Raises ``NoSpace``, ``ReadOnly`` or ``StorageError``; nothing under the UKI's name is left then.
        """
        addons = list(addons)
        if addons:
            self._write_addons(bls.addons_name(id_), addons)
        else:
            # Left over from another UKI of this name, they would be started with this one.
            with told(f"cannot remove the add-ons of {self.path(str(id_))}"):
                bootfs.remove_name(self.directory, bls.addons_name(id_))
        with _writing(self.directory) as (directory, temporary):
            durable.write_new_file(directory, temporary, content)
            bootfs.put_in_place(self.directory, directory, temporary, bls.uki_name(id_))

    def _write_addons(self, name: str, addons: list[tuple[str, Iterable[bytes]]]) -> None:
        with _writing(self.directory) as (directory, temporary):
            with bootfs.new_directory(directory, temporary) as inner:
                for addon, content in addons:
                    durable.write_new_file(inner, addon, content)
            bootfs.put_in_place(self.directory, directory, temporary, name)

    def remove(self, name: str) -> None:
        """Remove a UKI and its addons, durably. None is fine."""
        with told(f"cannot remove {self.path(name)}"):
            bootfs.remove_name(self.directory, bls.uki_name(name))
            bootfs.remove_name(self.directory, bls.addons_name(name))

    def remove_temporary(self) -> None:
        """Remove what a crash left under temporary names."""
        bootfs.remove_temporary(self.directory)


def boot_digest(pieces: Iterable[bytes], more: Iterable[bytes]) -> BootDigest:
    """The boot digest of a kernel and an initrd (boot-entries.md 6)."""
    total = hashlib.sha256()
    for source in (pieces, more):
        for piece in source:
            total.update(piece)
    return BootDigest(total.hexdigest())


def read_file(path: Path) -> Iterator[bytes]:
    """The content of the file ``path``, in pieces. Raises ``OSError``."""
    return read_pieces(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def read_pieces(open_file: Callable[[], int]) -> Iterator[bytes]:
    """The content of what ``open_file`` opens, in pieces; the descriptor is closed at the end."""
    with os.fdopen(open_file(), "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            yield piece


def _stripped(directory: Path, suffix: str) -> list[str]:
    """The names in ``directory`` that have the prefix and ``suffix``, without both."""
    return [
        name[len(bls.ARTIFACT_PREFIX) : len(name) - len(suffix)]
        for name in _names(directory)
        if name.startswith(bls.ARTIFACT_PREFIX) and name.endswith(suffix)
    ]


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise from_os_error(error, f"cannot read {directory}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[tuple[int, str]]:
    """A descriptor of the directory ``path``, made if missing, and a temporary name in it that is removed."""
    with told(f"cannot write the boot files in {path}"):
        bootfs.make_directory(path)
        with bootfs.directory(path) as fd:
            temporary = durable.temporary_name(TEMPORARY)
            try:
                yield fd, temporary
            finally:
                with contextlib.suppress(FileNotFoundError):
                    bootfs.remove_tree(path / temporary)
