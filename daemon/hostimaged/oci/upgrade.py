"""Brings the images of an older repository up to date: EROFS images in the formats it wants now.

Repositories that composefs-rs 0.6 and bootc up to 1.15 made have none, or have them in format V2 only. What
is there is kept, a V2 image and images for booting too: a deployment may have been started from them. (The
upgrade of composefs-rs 0.9 drops the V2 one.) Meta.json must be there: see ``Repository.upgrade``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostimaged.errors import (
    CorruptRepository,
    ImageNotFound,
    LimitsExceeded,
    StorageError,
    UnsupportedImage,
    VerityMismatch,
)
from hostimaged.oci import images
from hostimaged.oci.commit import Commit, stored_contents

if TYPE_CHECKING:
    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ManifestDigest
    from hostimaged.progress import Reporter

#: What is wrong with one image only.
_DAMAGE: Final = (
    CorruptRepository,
    ImageNotFound,
    LimitsExceeded,
    StorageError,
    UnsupportedImage,
    VerityMismatch,
)


@dataclass(slots=True)
class Upgraded:
    """What became of the images that have a tag, each counted once; filled in image by image."""

    #: Those that had all the repository wants.
    current: int = 0
    #: Those that were completed.
    upgraded: int = 0
    #: Artifacts, which have no EROFS image.
    artifacts: int = 0
    #: Why others were left as they are.
    problems: dict[ManifestDigest, str] = field(default_factory=dict)


def upgrade_images(repository: Repository, reporter: Reporter) -> Upgraded:
    """Complete every tagged image; a damaged one costs nothing but itself.

    Each is whole before its names are pointed anew: after a crash it has what it had, or all, and doing this
    again completes the rest. Raises ``NotSupported`` for a repository of format V0, ``NoSpace`` and
    ``ReadOnly``.
    """
    images.check_formats(repository)
    repository.check_writable()
    result = Upgraded()
    for digest in sorted(set(images.tags(repository).values())):
        try:
            _upgrade(repository, digest, reporter, result)
        except _DAMAGE as error:
            result.problems[digest] = error.message
    if result.upgraded:
        repository.sync()
    return result


def _upgrade(repository: Repository, digest: ManifestDigest, reporter: Reporter, result: Upgraded) -> None:
    image = images.open_image(repository, digest)
    if image.config is None:
        result.artifacts += 1
        return
    commit = Commit(repository, stored_contents(image), reporter)
    commit.store()
    if commit.changed:
        result.upgraded += 1
    else:
        result.current += 1
