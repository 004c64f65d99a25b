"""Manifests, indexes and configurations of OCI images, as they come from outside.

Only what is used is modelled (image-spec 1.1). What is hashed and stored are the bytes themselves, which the
caller keeps: they are never made anew from a model.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hostimaged.errors import HostimageError, UnsupportedImage, printable
from hostimaged.ids import BlobDigest, ConfigDigest, DiffId, OciDigest

#: containers-image and registries refuse larger manifests; so do we, while reading.
MAX_MANIFEST: Final = 4 * 1024 * 1024
#: containers-image's limit for a configuration.
MAX_CONFIG: Final = 4 * 1024 * 1024
#: Storage drivers stop at 128 to 500; each layer costs a stream, a thread's turn and a named ref.
MAX_LAYERS: Final = 1024
#: Entries of an index: one per platform, artifact and signature of an image.
MAX_INDEX: Final = 4096
#: More than any layer that can be stored; keeps sums of sizes far from any integer limit.
MAX_BLOB: Final = 1 << 48

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST_TYPE: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES: Final = frozenset({MANIFEST_TYPE, DOCKER_MANIFEST_TYPE})
INDEX_TYPES: Final = frozenset({INDEX_TYPE, DOCKER_LIST_TYPE})
REF_NAME: Final = "org.opencontainers.image.ref.name"
_VERSION_LABEL: Final = "org.opencontainers.image.version"

_D = TypeVar("_D", bound=OciDigest)


def _none_to(empty: Any) -> BeforeValidator:
    # Go writes null for an empty list or map.
    return BeforeValidator(lambda value: empty if value is None else value)


_Text = Annotated[str, Field(max_length=4096)]
_ManifestType = Literal["", "application/vnd.oci.image.manifest.v1+json"]
_Map = Annotated[dict[str, str], _none_to({})]


class _Outside(BaseModel):
    """What comes from outside: unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Platform(_Outside):
    """Which machine an entry of an index is for."""

    architecture: _Text = ""
    os: _Text = ""
    variant: _Text = ""


class Descriptor(_Outside):
    """Names a blob: its type, digest and size in bytes."""

    media_type: Annotated[str, Field(alias="mediaType", max_length=255)] = ""
    digest: Annotated[str, Field(max_length=512)]
    size: Annotated[int, Field(ge=0, le=MAX_BLOB, strict=True)]
    annotations: _Map = {}
    platform: Platform | None = None

    def as_digest(self, kind: type[_D]) -> _D:
        """The digest as a ``kind``; raises ``UnsupportedImage`` for an algorithm other than sha256."""
        try:
            return kind(self.digest)
        except HostimageError:
            raise UnsupportedImage(f"digest {printable(self.digest)} is not a sha256 digest") from None

    @property
    def blob(self) -> BlobDigest:
        """The digest, as that of a blob."""
        return self.as_digest(BlobDigest)


class Manifest(_Outside):
    """An image manifest: of a container image, or of an artifact."""

    schema_version: Annotated[Literal[2], Field(alias="schemaVersion")]
    media_type: Annotated[_ManifestType, Field(alias="mediaType")] = ""
    artifact_type: Annotated[str, Field(alias="artifactType", max_length=255)] = ""
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], _none_to(()), Field(max_length=MAX_LAYERS)] = ()
    annotations: _Map = {}

    @property
    def is_container(self) -> bool:
        """Whether this is a container image; anything else is an artifact and has no file system."""
        return self.config.media_type == CONFIG_TYPE

    @property
    def config_digest(self) -> ConfigDigest:
        """Digest of the configuration."""
        return self.config.as_digest(ConfigDigest)

    @property
    def total_size(self) -> int:
        """Bytes of the configuration and all layers, as transferred; a layer named twice counts once."""
        return sum({blob.digest: blob.size for blob in (self.config, *self.layers)}.values())


class Index(_Outside):
    """A list of manifests, or of further lists."""

    schema_version: Annotated[Literal[2], Field(alias="schemaVersion")]
    manifests: Annotated[tuple[Descriptor, ...], _none_to(()), Field(max_length=MAX_INDEX)] = ()


class RootFs(_Outside):
    """The layers of a container image by the digests of their uncompressed tars, lowest first."""

    type: Literal["layers"] = "layers"
    diff_ids: Annotated[tuple[_Text, ...], _none_to(()), Field(max_length=MAX_LAYERS)] = ()


class RunConfig(_Outside):
    """The part of a configuration that carries labels."""

    labels: Annotated[_Map, Field(alias="Labels")] = {}


class ImageConfig(_Outside):
    """The configuration of a container image."""

    architecture: _Text = ""
    os: _Text = ""
    created: _Text | None = None
    config: Annotated[RunConfig, _none_to({})] = RunConfig()
    rootfs: RootFs

    @property
    def version(self) -> str:
        """The version the image gives itself, or ""."""
        return self.config.labels.get(_VERSION_LABEL, "")

    @property
    def diff_ids(self) -> tuple[DiffId, ...]:
        """Digests of the layers' tars, lowest first; raises ``UnsupportedImage`` for another algorithm."""
        try:
            return tuple(DiffId(text) for text in self.rootfs.diff_ids)
        except HostimageError:
            raise UnsupportedImage("the image configuration has a diff_id that is not sha256") from None


_M = TypeVar("_M", bound=_Outside)


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in ``raw``; raises ``UnsupportedImage``.

    Every digest in it is known to be sha256 afterwards.
    """
    manifest = _parse(Manifest, raw, "manifest", MAX_MANIFEST)
    for descriptor in (manifest.config, *manifest.layers):
        descriptor.as_digest(BlobDigest)
    return manifest


def parse_index(raw: bytes) -> Index:
    """The index in ``raw``; raises ``UnsupportedImage``."""
    return _parse(Index, raw, "image index", MAX_MANIFEST)


def parse_config(raw: bytes) -> ImageConfig:
    """The configuration of a container image in ``raw``; raises ``UnsupportedImage``.

    Every diff_id in it is known to be sha256 afterwards.
    """
    config = _parse(ImageConfig, raw, "image configuration", MAX_CONFIG)
    _ = config.diff_ids
    return config


def _parse(model: type[_M], raw: bytes, what: str, limit: int) -> _M:
    if len(raw) > limit:
        raise UnsupportedImage(f"{what} is larger than {limit} bytes")
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:6])
        detail = f" at {where}" if where else ""
        raise UnsupportedImage(f"{what} is not valid{detail}: {first['msg']}") from None
