"""Looking for a newer image: what a name stands for at its source now, and how much of it is not here yet.

Only the manifest and the configuration are fetched, and nothing is stored: no repository is made or written
to. Signatures are checked by the pull; where skopeo can check them on the way, a rejected image is told here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository
from hostimaged.errors import HostimageError
from hostimaged.ids import ManifestDigest
from hostimaged.oci.images import image_version, manifest_stream, read_config
from hostimaged.oci.layers import plan_layers, stored_layer
from hostimaged.oci.links import changelog_url
from hostimaged.oci.models import parse_config, parse_manifest
from hostimaged.oci.source import open_source
from hostimaged.oci.times import microseconds
from hostimaged.progress import Phase
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from hostimaged.ids import SourceDigest
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.models import ImageConfig, Manifest
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.source import ImageSource
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``.
FAULT_POINTS: Final = ("check.started", "check.resolved")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found. Sizes are bytes as transferred; ``timestamp`` is when the image was made, in
    microseconds since the epoch, 0 if it does not say.

    ``download_size`` is what a pull would fetch; ``downloaded``: nothing, the image is in the repository.
    ``changelog_url``: the page of what changed that the image names, or "".
    """

    reference: ImageReference
    manifest_digest: ManifestDigest
    source_digest: SourceDigest
    version: str
    timestamp: int
    total_size: int
    download_size: int
    downloaded: bool
    changelog_url: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the bus: strings and numbers."""
        found = {
            "reference": str(self.reference),
            "manifest-digest": str(self.manifest_digest),
            "source-digest": str(self.source_digest),
            "version": self.version,
            "timestamp": self.timestamp,
            "total-size": self.total_size,
            "download-size": self.download_size,
            "state": "downloaded" if self.downloaded else "available",
        }
        return found | ({"changelog-url": self.changelog_url} if self.changelog_url else {})


def check_image(
    paths: HostPaths, reference: ImageReference, reporter: Reporter, *, signed: bool = False
) -> CheckResult:
    """Find out what ``reference`` is now. Takes no lock, and writes to nothing but the run directory.

    ``signed``: the signature policy has to demand a signature of the image.

    Raises the errors of the source as ``pull_image`` does, ``UnsupportedImage`` for an image that could not
    be pulled, and ``Cancelled``. Damage of the repository only makes more of the image count as missing.
    """
    reporter.phase(Phase.RESOLVING)
    reporter.at("check.started")
    with (
        private_directory(paths.run_dir / "tmp", "check-") as work_dir,
        open_source(reference, paths, work_dir, reporter, look=True, signed=signed) as source,
    ):
        fetched = source.manifest()
        digest = ManifestDigest.of_hash(hashlib.sha256(fetched.raw).hexdigest())
        manifest = parse_manifest(fetched.raw)
        repository = _open(paths)
        try:
            raw, config_stored = _config(repository, source, manifest)
            reporter.at("check.resolved")
            config = parse_config(raw) if manifest.is_container else None
            missing = _missing(repository, manifest, config)
            complete = not missing and config_stored and _has_manifest(repository, digest)
        finally:
            if repository is not None:
                repository.close()
    return CheckResult(
        reference,
        digest,
        fetched.source_digest,
        image_version(manifest, config),
        microseconds(config.created) if config is not None and config.created else 0,
        manifest.total_size,
        missing + (0 if config_stored else manifest.config.size),
        downloaded=complete,
        changelog_url=changelog_url(manifest, config),
    )


def _open(paths: HostPaths) -> Repository | None:
    """The repository, for looking only; None if there is none that can be read."""
    try:
        return Repository.open_unlocked(paths.repository)
    except HostimageError:
        # None yet, or damaged, which the scan tells; whoever looks for updates is better off with an answer.
        return None


def _config(repository: Repository | None, source: ImageSource, manifest: Manifest) -> tuple[bytes, bool]:
    """The configuration, and whether it is stored."""
    if repository is not None:
        try:
            return read_config(repository, manifest.config_digest).raw, True
        except HostimageError:
            # Not there, or damaged, or unreadable: a pull needs it then.
            pass
    return source.config(manifest.config), False


def _missing(repository: Repository | None, manifest: Manifest, config: ImageConfig | None) -> int:
    """Bytes of the layers that are not stored, one that is there twice counted once."""
    plans = {plan.id: plan for plan in plan_layers(manifest, config)}
    return sum(plan.descriptor.size for plan in plans.values() if not _has_layer(repository, plan))


def _has_layer(repository: Repository | None, plan: LayerPlan) -> bool:
    try:
        return repository is not None and stored_layer(repository, plan) is not None
    except HostimageError:
        return False


def _has_manifest(repository: Repository | None, digest: ManifestDigest) -> bool:
    try:
        return repository is not None and repository.has_stream(manifest_stream(digest)) is not None
    except HostimageError:
        return False
