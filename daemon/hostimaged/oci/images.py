"""Images that are in a repository: their stream names, tags, named references, and what is read back.

Facts: composefs-rs 0.9, OCI images in a repository. Nothing here writes, save ``tag``.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.repository import ObjectMissing, StreamMissing
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import (
    CorruptRepository,
    HostimageError,
    ImageNotFound,
    InvalidArgs,
    NotSupported,
    VerityMismatch,
    printable,
)
from hostimaged.ids import ConfigDigest, DiffId, ManifestDigest, ObjectId, OciDigest
from hostimaged.oci.models import (
    MAX_CONFIG,
    MAX_MANIFEST,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.composefs.repository import Repository

#: What we pulled is kept by a tag of this name and its manifest's digest.
PULL_TAG: Final = "localhost/hostimaged-pull-"
#: Directory of the tags below the named references of streams.
TAGS: Final = "oci"
#: Names under which a config stream refers to its EROFS images. There is none for V0.
IMAGE_REFS: Final[Mapping[Format, str]] = {
    Format.V2: "composefs.image",
    Format.V1: "composefs.image.v1",
}
#: What the names of images made for booting begin with.
BOOT_REF: Final = "composefs.image.boot"
_MANIFEST: Final = "oci-manifest-"
#: What the stream names of configurations begin with.
CONFIG: Final = "oci-config-"
_LAYER: Final = "oci-layer-"
_CONFIG_REF: Final = "config:"
_ESCAPE: Final = re.compile("%2F|%25")
_VERSION: Final = "org.opencontainers.image.version"


def manifest_stream(digest: ManifestDigest) -> str:
    """Stream name of a manifest."""
    return f"{_MANIFEST}{digest}"


def layer_stream(diff_id: DiffId) -> str:
    """Stream name of a layer."""
    return f"{_LAYER}{diff_id}"


def config_stream(digest: ConfigDigest) -> str:
    """Stream name of a configuration."""
    return f"{CONFIG}{digest}"


def config_ref(digest: ConfigDigest) -> str:
    """Name under which a manifest stream refers to its config stream."""
    return f"{_CONFIG_REF}{digest}"


def pull_tag(digest: ManifestDigest) -> str:
    """The tag of a pulled image."""
    return f"{PULL_TAG}{digest}"


def encode_tag(name: str) -> str:
    """File name of the tag ``name``; raises ``InvalidArgs`` for a name that cannot be one.

    A leading ``@`` marks digests on composefs-rs's command line.
    """
    if not name or name.startswith("@") or "\0" in name:
        raise InvalidArgs(f"{printable(name)!r} cannot be the name of an image")
    return name.replace("%", "%25").replace("/", "%2F")


def decode_tag(encoded: str) -> str:
    """The tag whose file name is ``encoded``: one pass, any other ``%xy`` stays."""
    return _ESCAPE.sub(lambda found: "/" if found[0] == "%2F" else "%", encoded)


def tags(repository: Repository) -> dict[str, ManifestDigest]:
    """All tags that lead to a manifest, sorted by name; the manifest itself may be missing."""
    found = {name: _tagged(stream) for name, stream in _tag_links(repository).items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def tag(repository: Repository, name: str, digest: ManifestDigest) -> bool:
    """Let the tag ``name`` lead to a manifest that is stored; says whether it did not already.

    Raises ``StreamMissing`` for a manifest that is not: one such tag makes composefs-rs's collector fail.
    """
    if tags(repository).get(name) == digest and repository.has_stream(manifest_stream(digest)) is not None:
        return False
    repository.name_stream(manifest_stream(digest), f"{TAGS}/{encode_tag(name)}")
    return True


def _tag_links(repository: Repository) -> dict[str, str]:
    links = repository.stream_refs(TAGS)
    return dict(sorted((decode_tag(name), stream) for name, stream in links.items()))


def _tagged(stream: str) -> ManifestDigest | None:
    if not stream.startswith(_MANIFEST):
        return None
    try:
        return ManifestDigest(stream.removeprefix(_MANIFEST))
    except InvalidArgs:
        return None


@dataclass(frozen=True, slots=True)
class StoredJson:
    """A manifest or configuration in the repository: its bytes, hashed and found right, and its stream."""

    raw: bytes
    stream_id: ObjectId
    refs: dict[str, ObjectId]


def read_manifest(
    repository: Repository, digest: ManifestDigest, stream_id: ObjectId | None = None
) -> StoredJson:
    """The manifest ``digest``, by its name or by a known stream id.

    Raises ``StreamMissing``, or ``CorruptRepository`` and ``VerityMismatch`` for damage.
    """
    return _read(repository, manifest_stream(digest), digest, stream_id, ContentType.MANIFEST, MAX_MANIFEST)


def read_config(
    repository: Repository, digest: ConfigDigest, stream_id: ObjectId | None = None
) -> StoredJson:
    """The configuration ``digest``; as ``read_manifest``."""
    return _read(repository, config_stream(digest), digest, stream_id, ContentType.CONFIG, MAX_CONFIG)


def _read(
    repository: Repository,
    name: str,
    digest: OciDigest,
    stream_id: ObjectId | None,
    content_type: ContentType,
    limit: int,
) -> StoredJson:
    if stream_id is None:
        stream_id = repository.has_stream(name)
    if stream_id is None:
        raise StreamMissing(stream=name)
    with repository.open_stream(name, stream_id, content_type) as stream:
        refs = dict(stream.named_refs)
        objects = stream.object_refs
    if len(objects) != 1:
        raise CorruptRepository(f"stream {name} holds {len(objects)} objects, not one")
    raw = repository.read_object(objects[0], limit)
    if hashlib.sha256(raw).hexdigest() != digest.hex:
        raise CorruptRepository(f"stream {name} holds something else than its name says")
    return StoredJson(raw, stream_id, refs)


def check_formats(repository: Repository) -> None:
    """Raises ``NotSupported`` unless the formats of the repository have a place for container images.

    A V0 image has no name in a configuration; readers take the V1 image for a default of V0, so there must be
    one.
    """
    formats = repository.formats
    if formats.default not in IMAGE_REFS and Format.V1 not in formats.extra:
        raise NotSupported(f"the repository is of format {formats}, which has no place for container images")


def image_ids(refs: Mapping[str, ObjectId]) -> dict[Format, ObjectId]:
    """The EROFS images that the named references of a config stream speak of."""
    return {image_format: refs[name] for image_format, name in IMAGE_REFS.items() if name in refs}


def has_image(repository: Repository, id_: ObjectId) -> bool:
    """Whether an EROFS image is there under its name."""
    try:
        os.close(repository.open_image(id_.hex()))
    except (ImageNotFound, CorruptRepository, VerityMismatch):
        return False
    return True


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of the repository, its JSON verified; ``config`` is None for artifacts."""

    manifest_digest: ManifestDigest
    manifest: Manifest
    config: ImageConfig | None
    stored_manifest: StoredJson = field(repr=False)
    #: That to which the manifest refers; its name may lead to another, see ``commit.mend``.
    stored_config: StoredJson = field(repr=False)

    @property
    def manifest_refs(self) -> dict[str, ObjectId]:
        """Named references of the manifest stream."""
        return self.stored_manifest.refs

    @property
    def config_refs(self) -> dict[str, ObjectId]:
        """Named references of the config stream."""
        return self.stored_config.refs

    @property
    def config_digest(self) -> ConfigDigest:
        """Digest of the configuration."""
        return self.manifest.config_digest

    @property
    def artifact(self) -> bool:
        """Whether this is no container image, and has no file system."""
        return self.config is None

    @property
    def version(self) -> str:
        """The version the image gives itself, or ""."""
        return image_version(self.manifest, self.config)

    @property
    def image_ids(self) -> dict[Format, ObjectId]:
        """Its EROFS images by format."""
        return image_ids(self.config_refs)

    @property
    def layers(self) -> dict[str, ObjectId]:
        """Stream ids of the layers: by diff_id, or for an artifact by blob digest; in order."""
        if self.config is None:
            names = [layer.digest for layer in self.manifest.layers]
            return {name: self.manifest_refs[name] for name in names if name in self.manifest_refs}
        names = [str(diff_id) for diff_id in self.config.diff_ids]
        return {name: self.config_refs[name] for name in names if name in self.config_refs}


def image_version(manifest: Manifest, config: ImageConfig | None) -> str:
    """The version that an image gives itself: by label, else by annotation; or "".

    One line of bounded length: it goes to lists, properties and dialogs, and no D-Bus message holds a NUL.
    """
    return printable((config.version if config is not None else "") or manifest.annotations.get(_VERSION, ""))


def open_image(repository: Repository, digest: ManifestDigest) -> StoredImage:
    """The image whose manifest is ``digest``; manifest and configuration are hashed.

    Raises ``ImageNotFound`` when its manifest is not stored, and ``CorruptRepository``, ``VerityMismatch`` or
    ``UnsupportedImage`` for what is damaged.
    """
    stored = read_manifest(repository, digest)
    manifest = parse_manifest(stored.raw)
    config_digest = manifest.config_digest
    config_id = stored.refs.get(config_ref(config_digest))
    if config_id is None:
        raise CorruptRepository(f"manifest {digest} does not refer to its configuration")
    try:
        configuration = read_config(repository, config_digest, config_id)
    except StreamMissing as error:
        raise ObjectMissing(id=config_id.hex()) from error
    config = parse_config(configuration.raw) if manifest.is_container else None
    return StoredImage(digest, manifest, config, stored, configuration)


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One tag, for lists; what is not known is None or empty, and ``problem`` says why.

    ``size`` is in bytes as transferred. ``tagged`` is when the tag was made, in seconds since the epoch.
    """

    tag: str
    manifest_digest: ManifestDigest | None = None
    config_digest: ConfigDigest | None = None
    version: str = ""
    size: int | None = None
    image_ids: dict[Format, ObjectId] = field(default_factory=dict)
    artifact: bool = False
    tagged: float | None = None
    problem: str = ""


def list_images(repository: Repository) -> list[ImageRow]:
    """A row for each tag, sorted by name. Damage costs the row its details, and nothing else.

    Works without the lock too: what is removed meanwhile is looked at again, and left out if it is gone.
    """
    known: dict[ManifestDigest, ImageRow] = {}
    rows = []
    for name, stream in _tag_links(repository).items():
        row = _row(repository, name, stream, known)
        if row is not None:
            rows.append(row)
    return rows


def _row(
    repository: Repository, name: str, stream: str, known: dict[ManifestDigest, ImageRow]
) -> ImageRow | None:
    tagged = _tag_time(repository, name)
    digest = _tagged(stream)
    if digest is None:
        return ImageRow(
            name, tagged=tagged, problem=f"the tag leads to {printable(stream)}, not to a manifest"
        )
    if digest in known:
        return replace(known[digest], tag=name, tagged=tagged)
    try:
        image = _open_again(repository, digest)
    except HostimageError as error:
        if _tag_time(repository, name) is None:
            return None
        return ImageRow(name, digest, tagged=tagged, problem=error.message)
    row = known[digest] = ImageRow(
        name,
        digest,
        image.config_digest,
        image.version,
        image.manifest.total_size,
        image.image_ids,
        artifact=image.artifact,
        tagged=tagged,
    )
    return row


def _open_again(repository: Repository, digest: ManifestDigest) -> StoredImage:
    try:
        return open_image(repository, digest)
    except (ImageNotFound, ObjectMissing):
        # A collector or a pull may have replaced it between two looks.
        return open_image(repository, digest)


def _tag_time(repository: Repository, name: str) -> float | None:
    try:
        return repository.stream_modified(f"{TAGS}/{encode_tag(name)}")
    except HostimageError:
        return None
