"""Names of images in a store, so that one that is wanted is found however it is written.

Facts: containers-image (normal form of docker references), podman (short names; a tag beside a digest does
not count), containers-storage (names of images in images.json are in normal form).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from hostimaged.oci.reference import parse_named

#: A tag in front of a digest.
_TAG: Final = re.compile(r":[^/:@]*(?=@)")
_ANY_TAG: Final = re.compile(r":[^/:]*\Z")
_DIGEST: Final = re.compile(r"@(sha256:[0-9a-f]{64})\Z")
#: What podman puts images under that were built, or named without a registry, on the host.
_LOCALHOST: Final = "localhost"


@dataclass(frozen=True, slots=True)
class StoreName:
    """A name of an image: ``normal`` is in normal form, with a registry, and a tag or a digest.

    ``short``: the name as written had no registry, so that any may be meant: then it is the path with its
    tag or digest, else "". Of a text that is no name ``normal`` is the text.
    """

    normal: str
    short: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The name written as ``text``, whatever that is."""
        plain = _TAG.sub("", text, count=1)
        try:
            normal = str(parse_named(plain))
        except ValueError:
            return cls(text)
        if has_registry(plain):
            return cls(normal)
        path = plain if "@" in plain or ":" in plain.rpartition("/")[2] else f"{plain}:latest"
        return cls(normal, path)

    @property
    def digest(self) -> str:
        """The digest in the name, or ""."""
        found = _DIGEST.search(self.normal)
        return "" if found is None else found[1]

    @property
    def repository(self) -> str:
        """``normal`` less the tag or the digest."""
        path = self.normal.partition("@")[0]
        return _ANY_TAG.sub("", path)

    def means(self, stored: str) -> bool:
        """Whether an image that is called ``stored`` in a store is, or may be, what this names."""
        normal = StoreName.parse(stored).normal
        if normal == self.normal:
            return True
        return bool(self.short) and normal.endswith(f"/{self.short}")


def has_registry(text: str) -> bool:
    """Whether a name begins with the host of a registry, by docker's rule."""
    domain, slash, _ = text.partition("/")
    return bool(slash) and (
        "." in domain or ":" in domain or domain == _LOCALHOST or domain.lower() != domain
    )
