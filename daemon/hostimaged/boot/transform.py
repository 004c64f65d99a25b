"""Makes of an image's tree the one that is booted (composefs-rs 0.9.4, ``composefs-boot``).

What it does changes the ids of boot images. What it takes away, ``boot.resources`` finds before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.boot.selinux import Policy, relabel
from hostimaged.composefs.tree import Directory
from hostimaged.errors import UnsupportedImage

if TYPE_CHECKING:
    from hostimaged.boot.files import ImageFiles

#: Directories of the root whose content belongs to the host and not to the image: a kernel image in ``/boot``
#: carries the id of the image, so that cannot depend on it.
EMPTIED: Final = (b"boot", b"sysroot")


def transform_for_boot(root: Directory, files: ImageFiles) -> None:
    """Empty ``/boot`` and ``/sysroot`` and label everything, in place; ``files`` are those of ``root``.

    To be done after ``transform_for_oci``. Raises ``UnsupportedImage`` when one of the directories is missing
    and for a SELinux policy that cannot be applied; the tree is of no use then.
    """
    usr = child(root, b"usr").stat
    for name in EMPTIED:
        directory = child(root, name)
        directory.entries.clear()
        directory.stat = directory.stat._replace(mtime=usr.mtime, nsec=usr.nsec)
    relabel(root, Policy.load(files))


def child(root: Directory, name: bytes) -> Directory:
    """A directory that each bootable image has in its root. Raises ``UnsupportedImage``."""
    directory = root.entries.get(name)
    if not isinstance(directory, Directory):
        raise UnsupportedImage(f"the image has no directory /{name.decode()} and cannot be booted")
    return directory
