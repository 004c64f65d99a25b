"""Check of the images of a repository: do manifests, configurations and layers belong together?

First the repository itself (``hostimaged.composefs.fsck``), then every tag; findings and counts are those of
composefs-rs 0.9.4 (``cfsctl oci fsck``). For each tag: manifest and configuration can be read and have the
digests that name them, and every layer, or blob of an artifact, is referred to and there. What is in a layer
is not compared with its diff_id, nor are the EROFS images looked at that a configuration refers to: as
objects and images of the repository they are checked there.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from hostimaged.composefs import fsck
from hostimaged.composefs.fsck_report import Findings, Report, listed, told
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import CorruptRepository, HostimageError, InvalidArgs, LimitsExceeded, from_os_error
from hostimaged.ids import DiffId
from hostimaged.oci import images
from hostimaged.oci.images import TAGS, decode_tag, layer_stream
from hostimaged.oci.models import MAX_CONFIG, MAX_MANIFEST, ImageConfig, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hostimaged.composefs.repository import Repository
    from hostimaged.composefs.splitstream import SplitStream
    from hostimaged.ids import ObjectId
    from hostimaged.oci.models import Manifest

_MANIFEST: Final = "oci-manifest-"
#: Where an older scheme, read by composefs-rs's check only, put the id of an image's EROFS image.
_SEAL: Final = "containers.composefs.fsverity"
#: A digest as image-spec has it; of the registered algorithms with the right number of digits.
_DIGEST: Final = re.compile(
    r"(?:sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}"
    r"|(?!sha(?:256|384|512):)[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+)\Z"
)


class Kind(StrEnum):
    """The findings about an image."""

    MANIFEST_READ_FAILED = "manifest-read-failed"
    MANIFEST_DIGEST_MISMATCH = "manifest-digest-mismatch"
    MANIFEST_PARSE_FAILED = "manifest-parse-failed"
    CONFIG_REF_MISSING = "config-ref-missing"
    CONFIG_READ_FAILED = "config-read-failed"
    CONFIG_DIGEST_MISMATCH = "config-digest-mismatch"
    CONFIG_PARSE_FAILED = "config-parse-failed"
    LAYER_REF_MISSING = "layer-ref-missing"
    LAYER_STREAM_MISSING = "layer-stream-missing"
    LAYER_CHECK_FAILED = "layer-check-failed"
    LAYER_OBJECT_MISSING = "layer-object-missing"
    SEAL_IMAGE_MISSING = "seal-image-missing"
    ARTIFACT_LAYER_REF_MISSING = "artifact-layer-ref-missing"
    ARTIFACT_LAYER_OBJECT_MISSING = "artifact-layer-object-missing"
    REF_RESOLVE_FAILED = "ref-resolve-failed"
    INVALID_REF_NAME = "invalid-ref-name"


@dataclass(slots=True)
class ImagesReport:
    """Result of a check of images, and of the repository they are in."""

    repository: Report
    #: Tags looked at.
    images_checked: int = 0
    #: Tags with findings.
    images_corrupted: int = 0
    #: Findings about images; the repository's are its own.
    errors: Findings = field(default_factory=Findings)

    @property
    def ok(self) -> bool:
        """Whether nothing was found, in the repository neither."""
        return self.repository.ok and not self.errors.count

    def text(self) -> str:
        """The report for people, several lines."""
        good = self.images_checked - self.images_corrupted
        lines = [f"oci images: {good}/{self.images_checked} ok"]
        if self.errors.count:
            lines += [f"oci errors: {self.errors.count}", *listed(self.errors)]
        return self.repository.text() + "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The report for programs, with the keys of ``cfsctl oci fsck --json``."""
        return {
            "ok": self.ok,
            "images_checked": self.images_checked,
            "images_corrupted": self.images_corrupted,
            "errors": told(self.errors),
            "repo": self.repository.as_dict(),
        }


def check(
    repository: Repository,
    *,
    tag: str | None = None,
    give_up: Callable[[], None] | None = None,
    breaks: fsck.Breaks | None = None,
    advance: Callable[[int], None] | None = None,
) -> ImagesReport:
    """Check ``repository`` and all tagged images in it, or only the one with the tag ``tag``.

    ``give_up``, ``breaks``, ``advance`` and what is raised are those of ``hostimaged.composefs.fsck.check``.
    """
    report = ImagesReport(fsck.check(repository, give_up=give_up, breaks=breaks, advance=advance))
    tags = _tags(repository)
    if tag is not None:
        _check_one(repository, tag, tags.get(tag), report)
        return report
    for name, stream in sorted(tags.items()):
        if give_up is not None:
            give_up()
        if breaks is not None and breaks.due():
            breaks.take()
            tags = _tags(repository)
        if tags.get(name) != stream:
            continue  # others removed it, or let it lead elsewhere, during a break
        if (digest := _digest(stream)) is None:
            continue  # a tag of something else than an image
        _count(repository, name, digest, report)
    return report


def _tags(repository: Repository) -> dict[str, str]:
    return {decode_tag(name): stream for name, stream in repository.stream_refs(TAGS).items()}


def _check_one(repository: Repository, tag: str, stream: str | None, report: ImagesReport) -> None:
    detail = ""
    digest = None
    if stream is None:
        detail = "there is no such tag"
    elif (digest := _digest(stream)) is None:
        detail = "it does not lead to a manifest"
    else:
        try:
            if repository.has_stream(stream) is None:
                detail = "its manifest is missing"
        except HostimageError as error:
            detail = error.message
    if detail or digest is None:
        report.images_checked += 1
        report.images_corrupted += 1
        report.errors.add(Kind.REF_RESOLVE_FAILED, tag, detail)
    else:
        _count(repository, tag, digest, report)


def _digest(stream: str) -> str | None:
    """The digest in the name of a manifest's stream."""
    digest = stream.removeprefix(_MANIFEST)
    return digest if digest != stream and _DIGEST.match(digest) else None


def _count(repository: Repository, tag: str, digest: str, report: ImagesReport) -> None:
    before = report.errors.count
    report.images_checked += 1
    _ImageCheck(repository, tag, report.errors).run(digest)
    report.images_corrupted += report.errors.count > before


class _ImageCheck:
    """The check of one image."""

    def __init__(self, repository: Repository, tag: str, errors: Findings) -> None:
        self._repository = repository
        self._tag = tag
        self._errors = errors

    def _note(self, kind: Kind, detail: object) -> None:
        self._errors.add(kind, self._tag, detail)

    def run(self, digest: str) -> None:
        if self._tag.startswith("@"):
            self._note(Kind.INVALID_REF_NAME, "leading '@' is reserved for digest references")
            return
        try:
            raw, refs = self._read(f"{_MANIFEST}{digest}", None, ContentType.MANIFEST, MAX_MANIFEST)
        except HostimageError as error:
            self._note(Kind.MANIFEST_READ_FAILED, error.message)
            return
        if (found := _sha256(raw)) != digest:
            self._note(Kind.MANIFEST_DIGEST_MISMATCH, f"expected {digest}, got {found}")
            return
        try:
            manifest = parse_manifest(raw)
        except HostimageError as error:
            self._note(Kind.MANIFEST_PARSE_FAILED, error.message)
            return
        self._check_config(manifest, refs)

    def _check_config(self, manifest: Manifest, manifest_refs: Mapping[str, ObjectId]) -> None:
        digest = manifest.config_digest
        stream_id = manifest_refs.get(images.config_ref(digest))
        if stream_id is None:
            self._note(Kind.CONFIG_REF_MISSING, digest)
            return
        try:
            name = images.config_stream(digest)
            raw, refs = self._read(name, stream_id, ContentType.CONFIG, MAX_CONFIG)
        except HostimageError as error:
            self._note(Kind.CONFIG_READ_FAILED, error.message)
            return
        if (found := _sha256(raw)) != str(digest):
            self._note(Kind.CONFIG_DIGEST_MISMATCH, f"expected {digest}, got {found}")
            return
        if not manifest.is_container:
            self._check_blobs(manifest, manifest_refs)
            return
        try:
            # Not ``parse_config``: a diff_id that is no digest is a finding of its own.
            config = ImageConfig.model_validate_json(raw)
        except ValidationError as error:
            self._note(Kind.CONFIG_PARSE_FAILED, error.errors(include_url=False)[0]["msg"])
            return
        for text in config.rootfs.diff_ids:
            self._check_layer(text, refs.get(text))
        self._check_seal(config)

    def _check_layer(self, text: str, stream_id: ObjectId | None) -> None:
        if stream_id is None:
            self._note(Kind.LAYER_REF_MISSING, text)
            return
        try:
            name = layer_stream(DiffId(text))
        except InvalidArgs as error:
            self._note(Kind.LAYER_CHECK_FAILED, f"{text}: {error.message}")
            return
        try:
            if self._repository.has_stream(name) is None:
                self._note(Kind.LAYER_STREAM_MISSING, text)
        except HostimageError as error:
            self._note(Kind.LAYER_CHECK_FAILED, f"{text}: {error.message}")
        self._check_object(stream_id, Kind.LAYER_OBJECT_MISSING, text)

    def _check_seal(self, config: ImageConfig) -> None:
        seal = config.config.labels.get(_SEAL)
        if seal is None:
            return
        try:
            os.close(self._repository.open_image(seal))
        except HostimageError as error:
            self._note(Kind.SEAL_IMAGE_MISSING, f"{seal}: {error.message}")

    def _check_blobs(self, manifest: Manifest, refs: Mapping[str, ObjectId]) -> None:
        for layer in manifest.layers:
            if layer.digest in refs:
                self._check_object(refs[layer.digest], Kind.ARTIFACT_LAYER_OBJECT_MISSING, layer.digest)
            else:
                self._note(Kind.ARTIFACT_LAYER_REF_MISSING, layer.digest)

    def _check_object(self, id_: ObjectId, kind: Kind, what: str) -> None:
        try:
            os.close(self._repository.open_object(id_))
        except HostimageError as error:
            self._note(kind, f"{what}: {error.message}")

    def _read(
        self, name: str, stream_id: ObjectId | None, content_type: ContentType, limit: int
    ) -> tuple[bytes, Mapping[str, ObjectId]]:
        """The JSON of a stream, as far as the repository vouches for it, and what the stream refers to."""
        with self._repository.open_stream(name, stream_id, content_type) as stream:
            return _only_object(self._repository, stream, name, limit), stream.named_refs


def _only_object(repository: Repository, stream: SplitStream, name: str, limit: int) -> bytes:
    objects = stream.object_refs
    if len(objects) != 1:
        raise CorruptRepository(f"stream {name} holds {len(objects)} objects, not one")
    # Not ``read_object``, which checks the content in every repository: the caller knows its sha256.
    fd = repository.open_object(objects[0])
    try:
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, f"cannot read the object of stream {name}") from error
    finally:
        os.close(fd)
    if len(raw) > limit:
        raise LimitsExceeded(f"the object of stream {name} is larger than {limit} bytes")
    return raw


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"
