"""Logically bound images: the container images that an image of an operating system must not be without.

``/usr/lib/bootc/bound-images.d`` has symbolic links to quadlet files of the same image, each of which names
one. Facts: bootc 1.16 (logically bound images). Read from the image's tree in the repository; nothing is
mounted. Not here: fetching them (``boundstore``), and what they keep (``storekeep``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.boot.files import TreeFiles
from hostimaged.composefs.tree import Leaf, Symlink
from hostimaged.errors import UnsupportedImage, printable
from hostimaged.host import quadlet
from hostimaged.host.etctree import open_image_tree
from hostimaged.oci.reference import parse_named
from hostimaged.oci.storage.names import StoreName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Directory, Node
    from hostimaged.ids import DeploymentId

DIRECTORY: Final = "usr/lib/bootc/bound-images.d"
#: Images have a handful.
MAX_IMAGES: Final = 256
#: More than the longest name of an image.
MAX_NAME: Final = 512
_REGISTRY: Final = "docker://"


class BoundImageError(UnsupportedImage):
    """bound image {path}: {detail}"""

    def __init__(self, name: object, detail: object) -> None:
        super().__init__(detail, path=f"/{DIRECTORY}/{printable(name)}")


@dataclass(frozen=True, slots=True)
class BoundImage:
    """An image that another is bound to.

    ``unit`` is the name of the link; ``image`` what its file says, less the transport of registries; it may
    be a short name, without a registry, which podman resolves as registries.conf says.
    """

    unit: str
    image: str

    @property
    def name(self) -> StoreName:
        """What it is called in a store."""
        return StoreName.parse(self.image)


def of_deployment(repository: Repository, deployment: DeploymentId) -> tuple[BoundImage, ...]:
    """The bound images of a deployment, by its boot image; each image once, in the order of the links.

    Raises ``ImageNotFound``, ``CorruptRepository``, ``VerityMismatch``, ``StorageError``; ``BoundImageError``
    for what names no image, as bootc refuses that too, and ``UnsupportedImage`` for links in a circle.
    """
    return read(open_image_tree(repository, deployment), repository)


def read(root: Directory, repository: Repository) -> tuple[BoundImage, ...]:
    """The same for the tree below ``root``, with its contents in ``repository``."""
    files = TreeFiles(root, repository)
    entries = files.entries(DIRECTORY)
    if len(entries) > MAX_IMAGES:
        raise BoundImageError("", f"more than {MAX_IMAGES} images")
    return tuple(_unique(_image(files, name, entries[name]) for name in sorted(entries)))


def _unique(images: Iterable[BoundImage]) -> list[BoundImage]:
    found: dict[str, BoundImage] = {}
    for image in images:
        found.setdefault(image.image, image)
    return list(found.values())


def _image(files: TreeFiles, raw: bytes, node: Node) -> BoundImage:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise BoundImageError(raw, "its name is not UTF-8") from None
    # bootc insists: a file here would be a unit that nothing starts.
    if not (isinstance(node, Leaf) and isinstance(node.content, Symlink)):
        raise BoundImageError(name, "not a symbolic link")
    data = files.read(f"{DIRECTORY}/{name}", quadlet.MAX_SIZE)
    if data is None:
        raise BoundImageError(name, "the file that it leads to is not in the image")
    try:
        image = quadlet.image_of(name, data)
    except quadlet.QuadletError as error:
        raise BoundImageError(name, error) from None
    return BoundImage(name, _checked(name, image))


def _checked(name: str, image: str) -> str:
    """The name of an image in a registry. What else podman would pull is the host's, or nobody's."""
    text = image.removeprefix(_REGISTRY)
    if len(text) > MAX_NAME:
        raise BoundImageError(name, f"Image= is longer than {MAX_NAME} characters")
    try:
        # Not the text itself: it may have a tag and a digest, of which the digest counts.
        parse_named(StoreName.parse(text).normal)
    except ValueError as error:
        raise BoundImageError(name, f"Image={text[:200]} names no image of a registry: {error}") from None
    return text
