"""Whether following an image source needs no further trust: the rule for updates without a password.

The newest image of a source may be installed by people who know no password only if nobody but root and the
publisher decides what it is: the registry is authenticated by TLS or the image by a signature, or nobody else
can write the local files. Nothing is fetched or verified here.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError
from hostimaged.oci.policy import requirement
from hostimaged.oci.reference import ImageReference, Transport
from hostimaged.oci.registries import Registries

if TYPE_CHECKING:
    from pathlib import Path

    from hostimaged.system.paths import HostPaths

#: The file that says by digests what the rest of an image is, where an image is a directory.
_INDEX: Final = {Transport.OCI: "index.json", Transport.DIR: "manifest.json"}
_FILES: Final = frozenset({Transport.OCI, Transport.OCI_ARCHIVE, Transport.DIR, Transport.DOCKER_ARCHIVE})
#: The kernel's limit of symbolic links in one path (path_resolution(7)).
_MAX_LINKS: Final = 40
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_DROP_INS: Final = "registries.conf.d"


@dataclass(frozen=True, slots=True)
class Trust:
    """Whether a source is trusted, and why or why not, for people."""

    trusted: bool
    reason: str


def source_trust(
    reference: ImageReference, paths: HostPaths, *, owners: frozenset[int] = frozenset({0})
) -> Trust:
    """Whether updates from ``reference`` may be installed without a password.

    ``owners``: uids whose files nobody else can write. Reads configuration and file attributes, so it may
    block. What cannot be read or understood is not trusted; raises nothing.
    """
    try:
        if reference.transport is Transport.DOCKER:
            return _registry_trust(reference, paths)
        if reference.transport in _FILES:
            index = _INDEX.get(reference.transport)
            return _files_trust(f"{reference.path}/{index}" if index else reference.path, owners)
    except HostimageError as error:
        return Trust(False, error.message)
    return Trust(False, f"who can write to {reference.transport}: is not known")


def _registry_trust(reference: ImageReference, paths: HostPaths) -> Trust:
    wanted = requirement(paths.containers.policy, reference)
    if wanted.rejects:
        return Trust(False, "the signature policy rejects the image")
    if wanted.demands_signature:
        return Trust(True, "the image has to be signed")
    image = reference.named
    if image is None:
        return Trust(False, "the registry is not known")
    vendor = paths.usr / "share/containers"
    system = Registries.load(paths.containers.registries, paths.containers.registries.with_name(_DROP_INS))
    # Later versions of containers-image read the vendor's files first; with and without them it must hold.
    shipped = Registries.load(vendor / "registries.conf", vendor / _DROP_INS)
    both = Registries(shipped.insecure | system.insecure)
    if system.verifies(image) and both.verifies(image):
        return Trust(True, "the registry is authenticated by TLS")
    return Trust(False, "registries.conf allows the registry, or a mirror of it, without verified TLS")


def _files_trust(path: str, owners: frozenset[int]) -> Trust:
    try:
        weak = weak_component(path, owners)
    except OSError as error:
        return Trust(False, f"{path} cannot be examined: {error.strerror}")
    if weak is not None:
        return Trust(False, weak)
    return Trust(True, "only root can write to the image")


def weak_component(path: str, owners: frozenset[int], root: Path | str = "/") -> str | None:
    """The first component of the absolute ``path`` that others than ``owners`` could replace or write, with
    the reason; None if there is none.

    Symbolic links are followed, and what they lead through counts too. ``root`` is where "/" is. An access
    control list that lets others write shows in the group's bits (acl(5)). Raises ``OSError``.
    """
    with ExitStack() as stack:

        def opened(name: str, directory: int | None) -> int:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            stack.callback(os.close, fd)
            return fd

        top = current = opened(os.fspath(root), None)
        if reason := _weakness("/", os.fstat(top), owners):
            return reason
        pending = deque(_names(path))
        links = 0
        shown = ""
        while pending:
            name = pending.popleft()
            component = opened(name, current)
            status = os.fstat(component)
            shown = os.path.normpath(f"{shown.rstrip('/')}/{name}")
            if reason := _weakness(shown, status, owners):
                return reason
            if not stat.S_ISLNK(status.st_mode):
                current = component
                continue
            links += 1
            if links > _MAX_LINKS:
                return f"{path} leads through too many symbolic links"
            target = os.readlink("", dir_fd=component)
            pending.extendleft(reversed(_names(target)))
            if target.startswith("/"):
                current, shown = top, ""
            else:
                shown = os.path.dirname(shown)
    return None


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _weakness(shown: str, status: os.stat_result, owners: frozenset[int]) -> str | None:
    if status.st_uid not in owners:
        return f"{shown} does not belong to root"
    # The bits of a symbolic link mean nothing: who may write the directory may replace it.
    if status.st_mode & _WRITABLE_BY_OTHERS and not stat.S_ISLNK(status.st_mode):
        return f"{shown} can be written by others than root"
    return None
