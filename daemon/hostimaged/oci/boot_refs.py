"""The images made for booting that a configuration names (composefs-rs 0.9, OCI images in a repository).

Their names among the references of a config stream tell the format and the attributes kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.composefs.erofs.format import Format
from hostimaged.oci import images
from hostimaged.oci.commit import Commit, finish_rewrites, is_rewritten, mend, stored_contents
from hostimaged.oci.filesystem import XattrMode
from hostimaged.oci.images import BOOT_REF, IMAGE_REFS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ManifestDigest, ObjectId
    from hostimaged.oci.images import StoredImage
    from hostimaged.progress import Reporter

_FORMATS: Final = {Format.V2: BOOT_REF, Format.V1: f"{BOOT_REF}.v1"}


def boot_ref(image_format: Format, mode: XattrMode) -> str:
    """Name under which a config stream refers to its boot image; a V0 image has none (``KeyError``)."""
    name = _FORMATS[image_format]
    return name if mode is XattrMode.ALLOWLIST_ONLY else f"{name}.xattrs={mode.value}"


def boot_refs(refs: Mapping[str, ObjectId]) -> dict[str, ObjectId]:
    """The references of a config stream that are to boot images, of whatever format and mode."""
    return {name: id_ for name, id_ in refs.items() if name.startswith(BOOT_REF)}


def set_boot_refs(
    repository: Repository, digest: ManifestDigest, refs: Mapping[str, ObjectId], reporter: Reporter
) -> bool:
    """Let the stored image refer to these boot images and to no others; says whether it did not before.

    Every tagged manifest with the same configuration follows. Everything is on the device afterwards. Raises
    as ``images.open_image``, ``UnsupportedImage`` for an artifact, and ``ReadOnly``.
    """
    return _Rewrite(repository, settle(repository, digest, reporter), reporter).run_with(refs)


def settle(repository: Repository, digest: ManifestDigest, reporter: Reporter) -> StoredImage:
    """The image, once what was interrupted while its configuration was written anew is finished.

    Raises as ``images.open_image``.
    """
    image = images.open_image(repository, digest)
    if not is_rewritten(repository, image.config_digest):
        return image
    # It need not have a tag.
    mend(repository, digest, reporter)
    finish_rewrites(repository, image.config_digest, reporter)
    return images.open_image(repository, digest)


class _Rewrite(Commit):
    """Writes config and manifest stream anew, as a pull does, with other references to boot images."""

    def __init__(self, repository: Repository, image: StoredImage, reporter: Reporter) -> None:
        super().__init__(repository, stored_contents(image), reporter)
        self._config = image.stored_config

    def run_with(self, boot: Mapping[str, ObjectId]) -> bool:
        """All steps; says whether anything had to be written. See ``store`` about interruptions."""
        kept = {name: id_ for name, id_ in self._config.refs.items() if not name.startswith(BOOT_REF)}
        # In the order in which composefs-rs adds them.
        first = [*(name for name, _ in self._contents.layers), *IMAGE_REFS.values()]
        refs = {name: kept[name] for name in first if name in kept} | kept
        refs |= dict(sorted(boot.items()))
        config_id = self._config.stream_id
        named = self._repository.has_stream(images.config_stream(self._contents.config_digest))
        if refs != self._config.refs or named != config_id:
            config_id = self._store_config(refs)
            self._reporter.at("config.stored")
        self._write_manifest(config_id)
        self._reporter.at("manifest.stored")
        self._finish()
        if self.changed:
            self._repository.sync()
        return self.changed
