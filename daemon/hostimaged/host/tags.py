"""Tags that keep deployments in the repository: their names, and which of them were made here.

Facts: operations.md 3.5 and 7 (bootc 1.16), and our own. bootc tags an image before there is a deployment of
it, with the name that we use as well. So a tag of no deployment may be one that is about to have one, unless
it is known to be ours: ``tags.json`` has, for each tag that we made, when its link was made::

    {"version": 1, "tags": {"localhost/bootc-sha256:…": 1767225600.25}}

What is not there, or was made at another time, counts as bootc's. So a lost file costs a day, and no image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.errors import from_os_error
from hostimaged.host.statefile import read_document, write_document
from hostimaged.oci import images
from hostimaged.system import mounts

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import DeploymentId, ManifestDigest
    from hostimaged.system.paths import HostPaths

#: Keeps a deployment; bootc removes those without one.
BOOTC_TAG: Final = "localhost/bootc-"
#: Keeps what somebody pinned; bootc sees a tag of other people.
PIN_TAG: Final = "localhost/hostimaged-pin-"
#: Keeps a deployment of another host, which shares the repository of this one.
GUEST_TAG: Final = "localhost/hostimaged-guest-"
#: Directory of the references to boot images of deployments whose manifest does not keep them.
IMAGES: Final = "hostimaged"

_VERSION: Final = 1
#: A tag has a hundred characters: ten thousand of them.
_MAX_SIZE: Final = 1 << 20


def bootc_tag(digest: ManifestDigest) -> str:
    """The tag of a deployment."""
    return f"{BOOTC_TAG}{digest}"


def pin_tag(digest: ManifestDigest) -> str:
    """The tag of a pinned deployment."""
    return f"{PIN_TAG}{digest}"


def guest_tag(digest: ManifestDigest) -> str:
    """The tag of a deployment in the repository of another host."""
    return f"{GUEST_TAG}{digest}"


def is_guest(paths: HostPaths) -> bool:
    """Whether the repository has its place elsewhere, as another host's has. Raises ``StorageError``."""
    path = paths.repository
    try:
        return mounts.is_elsewhere(path.parent, path.name)
    except OSError as error:
        raise from_os_error(error, f"it is not known whose repository {path} is") from error


def stream_ref(tag: str) -> str:
    """The reference of a tag among those of streams."""
    return f"{images.TAGS}/{images.encode_tag(tag)}"


def image_ref(id_: DeploymentId) -> str:
    """The reference to the boot image of a deployment among those of images."""
    return f"{IMAGES}/{id_}"


def tag_deployment(paths: HostPaths, repository: Repository, digest: ManifestDigest) -> bool:
    """Keep the manifest of a deployment by its tag; says whether there was none.

    In a repository that has its place elsewhere it gets one more, which tells the host there of this one.
    Raises as ``images.tag`` does, and what writing raises. The tags are not synced.
    """
    if is_guest(paths):
        images.tag(repository, guest_tag(digest), digest)
    name = bootc_tag(digest)
    if not images.tag(repository, name, digest):
        return False
    made = repository.stream_modified(stream_ref(name))
    if made is not None:
        _write(paths.made_tags, _read(paths.made_tags) | {name: made})
    return True


class MadeTags:
    """The tags of deployments that were made here, as they are written down now."""

    def __init__(self, paths: HostPaths) -> None:
        self._path = paths.made_tags
        self._made = _read(self._path)

    def has(self, name: str, modified: float | None) -> bool:
        """Whether it is the link made at ``modified`` that was made here."""
        return modified is not None and self._made.get(name) == modified

    def forget(self, names: Iterable[str]) -> None:
        """They are gone. Raises what writing raises."""
        gone = set(names)
        left = {name: made for name, made in self._made.items() if name not in gone}
        if left != self._made:
            self._made = left
            _write(self._path, left)


def _read(path: Path) -> dict[str, float]:
    document = read_document(path, _MAX_SIZE, _VERSION)
    if document is None:
        return {}
    tags = document.get("tags")
    if not isinstance(tags, dict):
        return {}
    return {name: made for name, made in tags.items() if isinstance(made, float)}


def _write(path: Path, made: dict[str, float]) -> None:
    write_document(path, {"version": _VERSION, "tags": made})
