"""Names of the tags that keep deployments in the repository.

Facts: operations.md 3.5 and 7 (bootc 1.16), and our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hostimaged.ids import ManifestDigest

#: Keeps a deployment; bootc removes those without one.
BOOTC_TAG: Final = "localhost/bootc-"
#: Keeps what somebody pinned; bootc sees a tag of other people.
PIN_TAG: Final = "localhost/hostimaged-pin-"


def bootc_tag(digest: ManifestDigest) -> str:
    """The tag of a deployment."""
    return f"{BOOTC_TAG}{digest}"


def pin_tag(digest: ManifestDigest) -> str:
    """The tag of a pinned deployment."""
    return f"{PIN_TAG}{digest}"
