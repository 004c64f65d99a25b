"""Image references as origins have them: what must be verified, then the transport and the name.

Facts: deployments.md 4.3 (bootc 1.16; the grammar is ostree's). The text of what bootc wrote is kept as it
is: a name that we would write in another way, or refuse to pull, is no reason to change an origin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from hostimaged.errors import InvalidReference
from hostimaged.oci.reference import ImageReference, Transport

#: As for ImageReference; a scheme and a remote's name come on top.
MAX_LENGTH: Final = 4096 + 256
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_REGISTRY: Final = "registry"
_SHOWN: Final = 200


class Scheme(StrEnum):
    """What an origin demands of signatures."""

    #: Nothing. The only one that bootc writes on a composefs host.
    UNVERIFIED = "ostree-unverified-image"
    #: policy.json must demand signatures.
    SIGNED = "ostree-image-signed"
    #: The keys of an ostree remote; without meaning here.
    REMOTE = "ostree-remote-image"


#: Spellings that name a registry without a transport.
_SHORTHANDS: Final = {
    "ostree-unverified-registry": Scheme.UNVERIFIED,
    "ostree-remote-registry": Scheme.REMOTE,
}


@dataclass(frozen=True, slots=True)
class OriginReference:
    """The reference of an origin; ``remote`` is that of ``Scheme.REMOTE``.

    ``name`` is what follows the transport as it was written, for a registry without ``//``.
    """

    scheme: Scheme
    transport: Transport
    name: str
    remote: str = ""

    @classmethod
    def of(cls, image: ImageReference) -> Self:
        """The reference that bootc would write for ``image``."""
        return cls(Scheme.UNVERIFIED, image.transport, image.name)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reference written as ``text``; raises ``InvalidReference``."""
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
        if len(text) > MAX_LENGTH:
            raise InvalidReference(f"longer than {MAX_LENGTH} characters", reference=shown)
        if _CONTROL.search(text):
            raise InvalidReference("control characters are not allowed", reference=shown)
        try:
            return cls._parse(text)
        except ValueError as error:
            raise InvalidReference(error, reference=shown) from None

    @classmethod
    def _parse(cls, text: str) -> Self:
        prefix, colon, rest = text.partition(":")
        if not colon:
            raise ValueError("it begins with no signature scheme")
        is_registry = prefix in _SHORTHANDS
        try:
            scheme = _SHORTHANDS[prefix] if is_registry else Scheme(prefix)
        except ValueError:
            raise ValueError("its signature scheme is unknown") from None
        remote = ""
        if scheme is Scheme.REMOTE:
            remote, colon, rest = rest.partition(":")
            if not colon or not remote:
                raise ValueError("the ostree remote is missing")
        transport, name = (Transport.DOCKER, rest) if is_registry else _split(rest)
        if not name:
            raise ValueError("no image is named")
        return cls(scheme, transport, name, remote)

    @property
    def image(self) -> ImageReference | None:
        """The reference in normal form, to pull from; None if it cannot be pulled from by name."""
        try:
            return ImageReference.parse(self.image_text)
        except InvalidReference:
            return None

    def names_same(self, other: OriginReference) -> bool:
        """Whether both lead to the same image, however it is written and whatever they demand."""
        one, two = self.image, other.image
        return self.image_text == other.image_text if one is None or two is None else one == two

    @property
    def image_text(self) -> str:
        """Transport and name as they were written, in the transport's common spelling."""
        slashes = "//" if self.transport is Transport.DOCKER else ""
        return f"{self.transport}:{slashes}{self.name}"

    @property
    def transport_label(self) -> str:
        """The transport as bootc's status names it."""
        return _REGISTRY if self.transport is Transport.DOCKER else str(self.transport)

    @property
    def signature(self) -> str | dict[str, str] | None:
        """What bootc's status says of signatures; None: it says nothing."""
        if self.scheme is Scheme.REMOTE:
            return {"ostreeRemote": self.remote}
        return "containerPolicy" if self.scheme is Scheme.SIGNED else None

    def __str__(self) -> str:
        remote = f"{self.remote}:" if self.scheme is Scheme.REMOTE else ""
        return f"{self.scheme}:{remote}{self.image_text}"


def _split(text: str) -> tuple[Transport, str]:
    prefix, colon, name = text.partition(":")
    if not colon:
        raise ValueError("it names no transport")
    if prefix == _REGISTRY:
        return Transport.DOCKER, name
    try:
        transport = Transport(prefix)
    except ValueError:
        raise ValueError("its transport is unknown") from None
    if transport is not Transport.DOCKER:
        return transport, name
    if not name.startswith("//"):
        raise ValueError("after docker: two slashes are expected")
    return transport, name[2:]
