"""Manifest and configuration of a deployment: from the repository, or from what is beside its origin.

Facts: deployments.md 5 (bootc 1.16). The network is never asked. An old deployment whose origin names no
manifest has one nevertheless if the repository proves which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.errors import HostimageError, ImageNotFound, InvalidArgs
from hostimaged.host.imginfo import ImgInfo, read_imginfo
from hostimaged.host.model import ImageFacts, Problem, ProblemId, Severity
from hostimaged.host.tags import BOOTC_TAG
from hostimaged.ids import ManifestDigest
from hostimaged.oci.images import StoredImage, manifest_stream, open_image, tags

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Repository
    from hostimaged.host.origin import Origin
    from hostimaged.ids import ConfigDigest, DeploymentId, ObjectId

_VERSION: Final = "org.opencontainers.image.version"
#: Where images put their version, the one that bootc looks at for composefs hosts first.
_VERSION_LABELS: Final = (_VERSION, "version")
_MANIFESTS: Final = "oci-manifest-"
#: References of a configuration to images made of it, for booting or not.
_IMAGES: Final = "composefs.image"


class ImageSource:
    """Images of a repository, each read once."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._opened: dict[ManifestDigest, StoredImage] = {}
        self._by_config: dict[ConfigDigest, ManifestDigest] | None = None
        self._by_image: dict[ObjectId, ManifestDigest] = {}

    def open(self, digest: ManifestDigest) -> StoredImage:
        """The image ``digest``; raises as ``open_image`` does."""
        image = self._opened.get(digest)
        if image is None:
            image = self._opened[digest] = open_image(self.repository, digest)
        return image

    def prove(self, id_: DeploymentId, sidecar: ImgInfo | None) -> ManifestDigest | None:
        """The manifest of an old deployment.

        One whose bytes are those of the sidecar, or whose configuration is, or from which the boot image
        ``id_`` was made; None if there is none.
        """
        if sidecar is not None:
            same = ManifestDigest.of_hash(sidecar.manifest_sha256)
            if self.repository.has_stream(manifest_stream(same)) is not None:
                return same
        by_config = self._index()
        if id_.object_id in self._by_image:
            return self._by_image[id_.object_id]
        return None if sidecar is None else by_config.get(sidecar.manifest.config_digest)

    def _index(self) -> dict[ConfigDigest, ManifestDigest]:
        """Manifests by their configurations; where several share one, a tagged one counts."""
        if self._by_config is None:
            self._by_config = {}
            for digest in self._manifests():
                try:
                    image = self.open(digest)
                except HostimageError:
                    continue
                self._by_config.setdefault(image.config_digest, digest)
                for name, object_id in image.config_refs.items():
                    if name.startswith(_IMAGES):
                        self._by_image.setdefault(object_id, digest)
        return self._by_config

    def _manifests(self) -> list[ManifestDigest]:
        named = [
            name.removeprefix(_MANIFESTS) for name in self.repository.streams() if name.startswith(_MANIFESTS)
        ]
        # Of several that say the same, that which already has the tag of a deployment.
        tagged = sorted(tags(self.repository).items(), key=lambda tag: not tag[0].startswith(BOOTC_TAG))
        found = dict.fromkeys(digest for _, digest in tagged)
        for text in named:
            try:
                found[ManifestDigest(text)] = None
            except InvalidArgs:
                continue
        return list(found)


def read_facts(
    images: ImageSource | None, directory: int, id_: DeploymentId, origin: Origin
) -> tuple[ImageFacts | None, list[Problem]]:
    """What is known of the image of the deployment whose state is open as ``directory``.

    ``images`` is None where the repository cannot be opened. Never raises for damage: each costs what it
    tells, and adds a problem.
    """
    digest = origin.manifest_digest
    problems: list[Problem] = []
    if digest is not None and images is not None:
        try:
            return _stored(images.open(digest)), []
        except HostimageError as error:
            problems.append(_problem(error))
    sidecar = _sidecar(directory, id_, problems)
    if digest is None and images is not None:
        try:
            proven = images.prove(id_, sidecar)
            if proven is not None:
                return _stored(images.open(proven)), []
        except HostimageError as error:
            problems.append(_problem(error))
    if sidecar is not None:
        return _beside(sidecar, digest), problems
    if digest is None and not problems:
        text = "its origin names no manifest, there is no .imginfo, and the repository does not tell either"
        problems.append(Problem(ProblemId.METADATA_MISSING, text))
    return None, problems


def _sidecar(directory: int, id_: DeploymentId, problems: list[Problem]) -> ImgInfo | None:
    try:
        return read_imginfo(directory, id_)
    except HostimageError as error:
        problems.append(Problem(ProblemId.METADATA_DAMAGED, error.message, Severity.WARNING))
        return None


def _problem(error: HostimageError) -> Problem:
    kind = ProblemId.METADATA_MISSING if isinstance(error, ImageNotFound) else ProblemId.METADATA_DAMAGED
    return Problem(kind, error.message)


def _stored(image: StoredImage) -> ImageFacts:
    config = image.config
    if config is None:
        raise ImageNotFound(f"{image.manifest_digest} is no image of an operating system")
    labels = config.config.labels
    return ImageFacts(
        image.manifest_digest,
        image.config_digest,
        version=_version(image.manifest.annotations, labels),
        created=config.created or "",
        architecture=config.architecture,
        labels=labels,
        annotations=image.manifest.annotations,
        proven=True,
    )


def _beside(sidecar: ImgInfo, digest: ManifestDigest | None) -> ImageFacts:
    labels = sidecar.config.config.labels
    return ImageFacts(
        digest,
        sidecar.manifest.config_digest,
        version=_version(sidecar.manifest.annotations, labels),
        created=sidecar.config.created or "",
        architecture=sidecar.config.architecture,
        labels=labels,
        annotations=sidecar.manifest.annotations,
        sidecar_digest=sidecar.manifest_sha256,
    )


def _version(annotations: dict[str, str], labels: dict[str, str]) -> str:
    candidates = [annotations.get(_VERSION), *(labels.get(name) for name in _VERSION_LABELS)]
    return next((version for version in candidates if version), "")
