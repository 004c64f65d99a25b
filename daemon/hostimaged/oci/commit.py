"""What a pull writes once its layers are stored: EROFS images, configuration, manifest, tag.

Each step leaves alone what is right already, so that repeating a pull writes nothing, and completes what an
interrupted one left. Facts: composefs-rs 0.9, OCI images in a repository.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.repository import StreamMissing
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import (
    CorruptRepository,
    ImageNotFound,
    InvalidArgs,
    LimitsExceeded,
    UnsupportedImage,
    VerityMismatch,
)
from hostimaged.ids import ConfigDigest
from hostimaged.oci import images
from hostimaged.oci.images import BOOT_REF, IMAGE_REFS, StoredJson
from hostimaged.oci.models import parse_manifest

if TYPE_CHECKING:
    from hostimaged.composefs.erofs.format import Format
    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ManifestDigest, ObjectId
    from hostimaged.oci.entries import KeptEntries
    from hostimaged.oci.images import StoredImage
    from hostimaged.progress import Reporter

#: Named points of ``Reporter.at``, each before or after one effect on the repository.
FAULT_POINTS: Final = (
    "image.built",
    "image.stored",
    "config.stored",
    "manifest.stored",
    "shared.stored",
    "pull.tagged",
)
#: Directory of the references to configurations that are being written anew: see ``Commit.store``.
_KEPT: Final = "hostimaged"
#: What is wrong with one image only.
_DAMAGE: Final = (CorruptRepository, ImageNotFound, LimitsExceeded, UnsupportedImage, VerityMismatch)


@dataclass(frozen=True, slots=True)
class Contents:
    """What an image consists of, all of it verified.

    ``layers`` are names and stream ids in the order of the image: one that is in it twice is there twice, as
    the second may bring back what another in between has changed.
    """

    manifest_digest: ManifestDigest
    raw_manifest: bytes
    config_digest: ConfigDigest
    raw_config: bytes
    layers: tuple[tuple[str, ObjectId], ...]
    artifact: bool


def stored_contents(image: StoredImage) -> Contents:
    """What a stored container image consists of. Raises ``CorruptRepository`` if a layer is not referred to.

    ``UnsupportedImage`` for an artifact.
    """
    if image.config is None:
        raise UnsupportedImage(f"{image.manifest_digest} is no container image")
    layers = image.layers
    names = [str(diff_id) for diff_id in image.config.diff_ids]
    if missing := [name for name in names if name not in layers]:
        raise CorruptRepository(
            f"the configuration of {image.manifest_digest} does not refer to layer {missing[0]}"
        )
    return Contents(
        image.manifest_digest,
        image.stored_manifest.raw,
        image.config_digest,
        image.stored_config.raw,
        tuple((name, layers[name]) for name in names),
        artifact=False,
    )


class Commit:
    """Stores an image whose layers are there; ``changed`` says whether anything had to be written.

    Entries of layers that are ``kept`` need not be read back.
    """

    def __init__(
        self,
        repository: Repository,
        contents: Contents,
        reporter: Reporter,
        kept: KeptEntries | None = None,
    ) -> None:
        self._repository = repository
        self._contents = contents
        self._kept = kept
        self._reporter = reporter
        self.changed = False
        self.image_ids: dict[Format, ObjectId] = {}

    def run(self) -> None:
        """All steps, the tag last: until then nothing leads to the image.

        Afterwards its own tag, config and manifest stream, layers and EROFS images in the formats of the
        repository are there, on the device, and each tagged manifest refers to its config stream as it is
        now.
        """
        digest = self._contents.manifest_digest
        self.store()
        if images.tag(self._repository, images.pull_tag(digest), digest):
            self.changed = True
        if self.changed:
            self._repository.sync()
        self._reporter.at("pull.tagged")

    def store(self) -> None:
        """All steps but the tag, for an image that others keep. The last names are not synced.

        Between config stream and manifest stream an image that was there is whole for readers, but not for a
        collector: that would not find the configuration to which the manifest still refers among the streams,
        and drop its EROFS images. So there is a reference to the new one meanwhile; see ``mend``.
        """
        contents = self._contents
        stored = self._stored_config()
        if not contents.artifact:
            self._make_images(stored)
        config_id = self._write_config(stored)
        self._reporter.at("config.stored")
        self._write_manifest(config_id)
        self._reporter.at("manifest.stored")
        self._finish()

    def _finish(self) -> None:
        if finish_rewrites(self._repository, self._contents.config_digest, self._reporter):
            self.changed = True

    def _stored_config(self) -> StoredJson | None:
        try:
            return images.read_config(self._repository, self._contents.config_digest)
        except (ImageNotFound, CorruptRepository, VerityMismatch):
            return None

    def _make_images(self, stored: StoredJson | None) -> None:
        """Build what is missing of the EROFS images in the repository's formats."""
        repository = self._repository
        known = images.image_ids(stored.refs) if stored is not None and self._same_layers(stored) else {}
        self.image_ids = {kind: id_ for kind, id_ in known.items() if images.has_image(repository, id_)}
        wanted = [kind for kind in repository.formats.in_order() if kind in IMAGE_REFS]
        # What the configuration names is completed in whatever format it is.
        wanted += [kind for kind in known if kind not in wanted]
        missing = [kind for kind in wanted if kind not in self.image_ids]
        done = len(wanted) - len(missing)
        self._reporter.generating(done, len(wanted))
        if not missing:
            return
        from hostimaged.composefs.erofs import build
        from hostimaged.oci.filesystem import build_tree

        tree = build_tree(repository, [id_ for _, id_ in self._contents.layers], kept=self._kept)
        for kind in missing:
            self._reporter.at("image.built")
            self.image_ids[kind] = repository.write_image(build(tree, kind, repository.algorithm))
            self.changed = True
            done += 1
            self._reporter.generating(done, len(wanted))
            self._reporter.at("image.stored")

    def _same_layers(self, stored: StoredJson) -> bool:
        return all(stored.refs.get(name) == id_ for name, id_ in self._contents.layers)

    def _write_config(self, stored: StoredJson | None) -> ObjectId:
        contents = self._contents
        if contents.artifact and stored is not None:
            # The empty configuration is that of many artifacts, whose manifests name their layers themselves.
            return stored.stream_id
        refs = dict(contents.layers)
        refs |= {name: self.image_ids[kind] for kind, name in IMAGE_REFS.items() if kind in self.image_ids}
        if stored is not None:
            refs |= {name: id_ for name, id_ in stored.refs.items() if name.startswith(BOOT_REF)}
            if stored.refs == refs:
                return stored.stream_id
        return self._store_config(refs)

    def _store_config(self, refs: dict[str, ObjectId]) -> ObjectId:
        """Write the configuration; one that is there is referred to until ``_finish``."""
        contents = self._contents
        name = images.config_stream(contents.config_digest)
        with contextlib.suppress(StreamMissing, CorruptRepository):
            # Nothing refers to one that is not there, and what is damaged keeps nothing.
            self._repository.name_stream(name, _kept_ref(contents.config_digest))
        self.changed = True
        return _write(self._repository, name, ContentType.CONFIG, contents.raw_config, refs)

    def _write_manifest(self, config_id: ObjectId) -> None:
        contents = self._contents
        refs = {images.config_ref(contents.config_digest): config_id} | dict(contents.layers)
        try:
            stored = images.read_manifest(self._repository, contents.manifest_digest)
        except (ImageNotFound, CorruptRepository, VerityMismatch):
            pass
        else:
            if stored.refs == refs:
                return
        name = images.manifest_stream(contents.manifest_digest)
        self.changed = True
        _write(self._repository, name, ContentType.MANIFEST, contents.raw_manifest, refs)


def mend(repository: Repository, digest: ManifestDigest, reporter: Reporter) -> bool:
    """Let a stored manifest refer to its config stream as it is now; says whether it did not.

    To a manifest that referred to what the stream was before, the collector would keep that object, but not
    know it as a stream any more, and drop the EROFS images it names. Raises as ``images.read_manifest`` and
    ``read_config``.
    """
    stored = images.read_manifest(repository, digest)
    config_digest = parse_manifest(stored.raw).config_digest
    name = images.config_ref(config_digest)
    current = repository.has_stream(images.config_stream(config_digest))
    if current is None or stored.refs.get(name) == current:
        return False
    config = images.read_config(repository, config_digest, current)
    refs = {key: config.refs.get(key, id_) for key, id_ in stored.refs.items()} | {name: current}
    _write(repository, images.manifest_stream(digest), ContentType.MANIFEST, stored.raw, refs)
    reporter.at("shared.stored")
    return True


def finish_rewrites(repository: Repository, own: ConfigDigest | None, reporter: Reporter) -> bool:
    """Mend every tagged manifest, and end what keeps configurations meanwhile; says if anything was mended.

    Manifests that share a configuration share its stream. All tags are looked at, not only those of the
    caller's ``own``, if it has one: so this also finishes what another left that was killed between its two
    streams.
    """
    kept = _rewritten(repository)
    mended, whole = False, True
    for digest in sorted(set(images.tags(repository).values())):
        try:
            mended |= mend(repository, digest, reporter)
        except _DAMAGE:
            # Damaged before; nothing of ours depends on it. Of what others left, nobody can tell.
            whole = False
    settled = [config for config in kept if whole or config == own]
    if settled:
        repository.sync()
    for config in settled:
        repository.remove_stream_ref(_kept_ref(config))
    return mended


def finish_interrupted(repository: Repository, reporter: Reporter) -> bool:
    """As ``finish_rewrites``, if any rewriting was interrupted; says whether one was."""
    if not _rewritten(repository):
        return False
    finish_rewrites(repository, None, reporter)
    return True


def is_rewritten(repository: Repository, digest: ConfigDigest) -> bool:
    """Whether the configuration is being written anew, or was when that was interrupted."""
    return digest in _rewritten(repository)


def _kept_ref(digest: ConfigDigest) -> str:
    """Reference to a configuration that is being written anew."""
    return f"{_KEPT}/{digest}"


def _rewritten(repository: Repository) -> list[ConfigDigest]:
    found = []
    for name, stream in repository.stream_refs(_KEPT).items():
        with contextlib.suppress(InvalidArgs):
            digest = ConfigDigest(name)
            if stream == images.config_stream(digest):
                found.append(digest)
    return found


def _write(
    repository: Repository, name: str, kind: ContentType, raw: bytes, refs: dict[str, ObjectId]
) -> ObjectId:
    """Store ``raw`` as an object and the stream ``name`` of nothing else, with named references."""
    stored = repository.store_object(raw)
    with repository.new_stream(kind) as writer:
        writer.external(stored.id, len(raw))
        for key, id_ in refs.items():
            writer.named_ref(key, id_)
        return repository.write_stream(name, writer)
