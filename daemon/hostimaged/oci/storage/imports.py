"""The second of two stages of a pull: an image of the store of the host into the repository."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hostimaged.oci.layers import StoppableReporter
from hostimaged.oci.pull import pull_image
from hostimaged.oci.storage.source import FetchedSource
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Sharing, Verity
    from hostimaged.ids import SourceDigest
    from hostimaged.oci.pull import PullResult
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.source import ImageSource
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths


def import_image(
    paths: HostPaths,
    reference: ImageReference,
    image_id: str,
    manifest_digest: SourceDigest,
    *,
    verity: Verity,
    lock_timeout: float,
    reporter: Reporter,
    sharing: Sharing,
) -> PullResult:
    """Bring the image ``image_id``, which ``fetch_image`` fetched from ``reference``, into the repository.

    As ``pull_image``, of which all is true, but that nothing is downloaded and no signature looked at: that
    was done before anything came into the store. ``reporter.importing`` is told of the bytes.
    """

    def opened(reporting: Reporter) -> ImageSource:
        return FetchedSource(
            reference,
            paths.store,
            image_id,
            manifest_digest,
            kept_manifest=paths.fetched_manifest,
            lock_timeout=lock_timeout,
            check=partial(reporting.at, "source.waiting"),
        )

    return pull_image(
        paths,
        reference,
        expect_digest=None,
        verity=verity,
        lock_timeout=lock_timeout,
        reporter=_Importing(reporter),
        sharing=sharing,
        opener=opened,
    )


class _Importing(StoppableReporter):
    """Tells bytes as those of an import."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter)
        self._total = self._done = 0

    def phase(self, phase: Phase) -> None:
        """Nothing is looked up or fetched."""
        super().phase(Phase.IMPORTING if phase in (Phase.RESOLVING, Phase.PULLING) else phase)

    def totals(self, total: int, cached: int) -> None:
        """What is there already counts as imported."""
        self._total, self._done = total, cached
        self.importing(cached, total)

    def advance(self, count: int) -> None:
        """More of it."""
        self._done = min(self._done + count, self._total)
        self.importing(self._done, self._total)
