"""The images made for booting that a configuration names (composefs-rs 0.9, OCI images in a repository).

Their names among the references of a config stream tell the format and the attributes kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import UnsupportedImage
from hostimaged.oci import images
from hostimaged.oci.commit import Commit, Contents
from hostimaged.oci.filesystem import XattrMode
from hostimaged.oci.images import BOOT_REF, IMAGE_REFS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ConfigDigest, ManifestDigest, ObjectId
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
    return _Rewrite(repository, digest, reporter).run_with(refs)


def settle(repository: Repository, digest: ManifestDigest, reporter: Reporter) -> None:
    """Finish what an interrupted ``set_boot_refs`` left of this image, whose references stay as they are."""
    image = images.open_image(repository, digest)
    if _kept(image.config_digest) in repository.stream_refs():
        set_boot_refs(repository, digest, boot_refs(image.config_refs), reporter)


def _kept(digest: ConfigDigest) -> str:
    """Reference to a configuration that is being written anew."""
    return f"hostimaged/{digest}"


class _Rewrite(Commit):
    """Writes config and manifest stream anew, as a pull does, with other references to boot images."""

    def __init__(self, repository: Repository, digest: ManifestDigest, reporter: Reporter) -> None:
        self._image = images.open_image(repository, digest)
        if self._image.config is None:
            raise UnsupportedImage(f"{digest} is no container image")
        config_id = self._image.manifest_refs[images.config_ref(self._image.config_digest)]
        self._config = images.read_config(repository, self._image.config_digest, config_id)
        contents = Contents(
            digest,
            images.read_manifest(repository, digest).raw,
            self._image.config_digest,
            self._config.raw,
            tuple(self._image.layers.items()),
            self._image.artifact,
        )
        super().__init__(repository, contents, reporter)

    def run_with(self, boot: Mapping[str, ObjectId]) -> bool:
        """All steps; says whether anything had to be written.

        Between config stream and manifest stream the image is whole for readers, but not for a collector:
        that would not find the configuration to which the manifest still refers among the streams, and drop
        its content. So there is a reference to the new one meanwhile; see ``settle``.
        """
        name = images.config_stream(self._contents.config_digest)
        kept = _kept(self._contents.config_digest)
        if kept not in self._repository.stream_refs() and self._repository.has_stream(name) is not None:
            self._repository.name_stream(name, kept)
        self._write_both(name, boot)
        self._mend_shared()
        if self.changed:
            self._repository.sync()
        self._repository.remove_stream_ref(kept)
        return self.changed

    def _write_both(self, name: str, boot: Mapping[str, ObjectId]) -> None:
        kept = {name: id_ for name, id_ in self._config.refs.items() if not name.startswith(BOOT_REF)}
        # In the order in which composefs-rs adds them.
        first = [*(name for name, _ in self._contents.layers), *IMAGE_REFS.values()]
        refs = {name: kept[name] for name in first if name in kept} | kept
        refs |= dict(sorted(boot.items()))
        config_id = self._config.stream_id
        if refs != self._config.refs:
            config_id = self._write(name, ContentType.CONFIG, self._config.raw, refs)
            self._reporter.at("config.stored")
        self._write_manifest(config_id)
        self._reporter.at("manifest.stored")
