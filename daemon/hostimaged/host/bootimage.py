"""Boot images: the EROFS image that a deployment is, made from an image in the repository.

Made once for each format and each choice of attributes, and then named by the stream of the image's
configuration, where composefs-rs looks for it too. Facts: composefs-rs 0.9, OCI images (boot images).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.boot import osrelease
from hostimaged.boot.cmdline import Cmdline
from hostimaged.boot.files import TreeFiles, open_content
from hostimaged.boot.pe import Uki
from hostimaged.boot.resources import Kernel, UnifiedKernel, find_resources
from hostimaged.boot.transform import EMPTIED, child, transform_for_boot
from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import build
from hostimaged.composefs.erofs.format import Format
from hostimaged.errors import CorruptRepository, ImageNotFound, UnsupportedImage, VerityMismatch
from hostimaged.ids import DeploymentId
from hostimaged.oci import images
from hostimaged.oci.boot_refs import boot_ref, boot_refs, set_boot_refs, settle
from hostimaged.oci.commit import stored_contents
from hostimaged.oci.filesystem import XattrMode, build_tree

if TYPE_CHECKING:
    from hostimaged.boot.osrelease import OsRelease
    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.tree import Directory
    from hostimaged.ids import ManifestDigest, ObjectId
    from hostimaged.oci.images import StoredImage
    from hostimaged.progress import Reporter

#: Named points of ``Reporter.at``, each before or after one effect on the repository.
FAULT_POINTS: Final = (
    "boot.tree",
    "boot.built",
    "boot.stored",
    "config.stored",
    "manifest.stored",
    "shared.stored",
)

_OS_RELEASE: Final = "/usr/lib/os-release"
#: Formats that a boot image may have, in the order in which an expected one is looked for.
_FORMATS: Final = (Format.V1, Format.V2)


@dataclass(frozen=True, slots=True)
class BootImage:
    """A boot image in the repository, and what the image brings for the boot loader.

    ``image`` is what it was made from, ``object_id`` its fs-verity digest. The leaves of ``resources`` are
    read with ``boot.files.open_content``. ``files`` are the image's; what is in ``/boot`` may be missing.
    """

    image: StoredImage
    object_id: ObjectId
    format: Format
    mode: XattrMode
    resources: Kernel | UnifiedKernel
    os_release: OsRelease = field(repr=False)
    files: TreeFiles = field(repr=False)
    _uki: Uki | None = field(default=None, repr=False)

    @property
    def id(self) -> DeploymentId:
        """The deployment that this is. Raises ``InvalidArgs`` if the digest is not sha512."""
        return DeploymentId.of_object(self.object_id)

    @property
    def architecture(self) -> str:
        """The image's, named as OCI does."""
        config = self.image.config
        return config.architecture if config is not None else ""

    @property
    def uki(self) -> Uki:
        """What the unified kernel image says. Raises ``UnsupportedImage`` if there is none."""
        if self._uki is None:
            raise UnsupportedImage("the image has no unified kernel image")
        return self._uki


def generate(
    repository: Repository,
    digest: ManifestDigest,
    reporter: Reporter,
    *,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
) -> BootImage:
    """The boot image of a stored image, made unless it is there.

    A unified kernel image names the one it boots: then that is made, in whatever format and mode it is.
    Raises ``ImageNotFound``, ``CorruptRepository``, ``VerityMismatch``; ``UnsupportedImage`` for an image
    that cannot be booted; ``NoSpace`` and ``ReadOnly``.
    """
    return _Making(repository, digest, reporter).generate(mode)


def find_matching(
    repository: Repository, digest: ManifestDigest, expected: ObjectId, reporter: Reporter
) -> BootImage:
    """The boot image of a stored image that is ``expected``, whatever made it; stored, if it was not.

    Raises as ``generate``, and ``UnsupportedImage`` when no format and mode give it.
    """
    return _Making(repository, digest, reporter).find_matching(expected)


def remove(repository: Repository, digest: ManifestDigest, reporter: Reporter) -> bool:
    """Let the image refer to no boot image any more, so that the collector removes them; says if it did."""
    return set_boot_refs(repository, digest, {}, reporter)


class _Making:
    """One image, looked at and completed."""

    def __init__(self, repository: Repository, digest: ManifestDigest, reporter: Reporter) -> None:
        images.check_formats(repository)
        self._repository = repository
        self._digest = digest
        self._reporter = reporter
        self._image = settle(repository, digest, reporter)
        self._layers = _layers(self._image)
        self._boot_refs = boot_refs(self._image.config_refs)

    def generate(self, mode: XattrMode) -> BootImage:
        root = self._tree(mode)
        resources = find_resources(root)
        if isinstance(resources, UnifiedKernel):
            uki = self._read_uki(resources)
            return self._matching(_named_by(uki), root, mode, resources, uki)
        formats = self._repository.formats
        first = formats.default if formats.default in _FORMATS else Format.V1
        stored = self._stored(first, mode)
        if stored is None:
            made = self._make(root, mode, [kind for kind in formats.in_order() if kind in _FORMATS])
            stored = made[first]
        return self._result(stored, first, mode, root, resources)

    def find_matching(self, expected: ObjectId) -> BootImage:
        mode = XattrMode.ALLOWLIST_ONLY
        root = self._tree(mode)
        resources = find_resources(root)
        uki = self._read_uki(resources) if isinstance(resources, UnifiedKernel) else None
        return self._matching(expected, root, mode, resources, uki)

    def _tree(self, mode: XattrMode) -> Directory:
        root = build_tree(self._repository, self._layers, mode)
        self._reporter.at("boot.tree")
        return root

    def _stored(self, image_format: Format, mode: XattrMode) -> ObjectId | None:
        """The boot image that the configuration names, if it is there."""
        id_ = self._boot_refs.get(boot_ref(image_format, mode))
        if id_ is None:
            return None
        try:
            os.close(self._repository.open_image(id_.hex()))
        except (ImageNotFound, CorruptRepository, VerityMismatch):
            return None
        return id_

    def _make(self, root: Directory, mode: XattrMode, formats: list[Format]) -> dict[Format, ObjectId]:
        """Boot images in all formats of the repository, as those that are missing belong to the same tree."""
        made: dict[Format, ObjectId] = {}
        transform_for_boot(root, TreeFiles(root, self._repository))
        for done, kind in enumerate(formats):
            self._reporter.generating(done, len(formats))
            stored = self._stored(kind, mode)
            made[kind] = stored or self._store(build(root, kind, self._repository.algorithm))
        self._reporter.generating(len(formats), len(formats))
        self._refer({boot_ref(kind, mode): id_ for kind, id_ in made.items()})
        return made

    def _store(self, data: bytearray) -> ObjectId:
        self._reporter.at("boot.built")
        id_ = self._repository.write_image(data)
        self._reporter.at("boot.stored")
        return id_

    def _refer(self, refs: dict[str, ObjectId]) -> None:
        set_boot_refs(self._repository, self._digest, self._boot_refs | refs, self._reporter)

    def _matching(
        self,
        expected: ObjectId,
        root: Directory,
        mode: XattrMode,
        resources: Kernel | UnifiedKernel,
        uki: Uki | None,
    ) -> BootImage:
        """The search; ``root``, not yet transformed, is the tree of ``mode``."""
        for other in XattrMode:
            for kind in _FORMATS:
                if self._stored(kind, other) == expected:
                    return self._result(expected, kind, other, root, resources, uki)
        for other in (mode, *(each for each in XattrMode if each is not mode)):
            tree = root if other is mode else self._tree(other)
            found = self._search(tree, other, expected)
            if found is not None:
                return self._result(expected, found, other, tree, resources, uki)
        raise UnsupportedImage(f"the image gives no boot image {expected.hex()}, in whatever format and mode")

    def _search(self, root: Directory, mode: XattrMode, expected: ObjectId) -> Format | None:
        """The format in which ``root`` gives the boot image ``expected``, which is stored then."""
        before = {name: child(root, name).stat.nsec for name in EMPTIED}
        transform_for_boot(root, TreeFiles(root, self._repository))
        found = self._try(root, mode, expected, known=True)
        if found is None and any(child(root, name).stat.nsec != nsec for name, nsec in before.items()):
            # Until composefs-rs 0.9.0 the emptied directories kept their fractions of a second.
            for name, nsec in before.items():
                directory = child(root, name)
                directory.stat = directory.stat._replace(nsec=nsec)
            found = self._try(root, mode, expected, known=False)
        return found

    def _try(self, root: Directory, mode: XattrMode, expected: ObjectId, *, known: bool) -> Format | None:
        """With ``known``, the image that is stored for a format need not be made to be compared."""
        for done, kind in enumerate(_FORMATS):
            if known and self._stored(kind, mode) is not None:
                continue
            self._reporter.generating(done, len(_FORMATS))
            data = build(root, kind, self._repository.algorithm)
            if fsverity.digest(self._repository.algorithm, data) == expected:
                self._refer({boot_ref(kind, mode): self._store(data)})
                self._reporter.generating(len(_FORMATS), len(_FORMATS))
                return kind
        return None

    def _read_uki(self, resources: UnifiedKernel) -> Uki:
        fd = open_content(resources.leaf, self._repository)
        try:
            return Uki.read(fd, resources.name)
        finally:
            os.close(fd)

    def _result(
        self,
        object_id: ObjectId,
        image_format: Format,
        mode: XattrMode,
        root: Directory,
        resources: Kernel | UnifiedKernel,
        uki: Uki | None = None,
    ) -> BootImage:
        files = TreeFiles(root, self._repository)
        own = uki.osrel if uki is not None else None
        release = files.read(_OS_RELEASE, osrelease.MAX_SIZE) if own is None else own
        return BootImage(
            self._image,
            object_id,
            image_format,
            mode,
            resources,
            osrelease.parse(release or b""),
            files,
            uki,
        )


def _layers(image: StoredImage) -> list[ObjectId]:
    if image.config is None:
        raise UnsupportedImage(f"{image.manifest_digest} is an artifact and no image of an operating system")
    return [id_ for _, id_ in stored_contents(image).layers]


def _named_by(uki: Uki) -> ObjectId:
    argument = Cmdline.parse(uki.cmdline).composefs()
    if argument is None:
        raise UnsupportedImage("the unified kernel image of the image names no deployment")
    return argument.id.object_id
