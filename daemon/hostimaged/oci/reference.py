"""Image references: ``transport:name`` as containers-image writes them (containers-transports(5)).

A reference is parsed once, at the border, into its normal form: two spellings of one name compare equal, and
skopeo accepts what ``str`` gives. Nothing here looks at the file system or the network.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from hostimaged.errors import InvalidReference

#: PATH_MAX: the longest thing a reference can sensibly hold is one path with a name.
MAX_LENGTH: Final = 4096
#: containers-image's limit for a repository name, host included.
MAX_REPOSITORY: Final = 255

_SHOWN: Final = 200
_DEFAULT_DOMAIN: Final = "docker.io"
_OFFICIAL: Final = "library"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_HOST: Final = (
    r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*(?::[0-9]{1,5})?"
)
_COMPONENT: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_TAG: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DOMAIN: Final = re.compile(_HOST + r"\Z")
_PATH: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG_ONLY: Final = re.compile(_TAG + r"\Z")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_IMAGE_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
# Names inside an oci: layout (image-spec, annotation org.opencontainers.image.ref.name).
_REF_PART: Final = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_REF_NAME: Final = re.compile(rf"{_REF_PART}(?:/{_REF_PART})*\Z")
_INDEX: Final = re.compile(r"@[0-9]{1,6}\Z")
_STORE: Final = re.compile(r"\[[^\[\]]{1,4000}\]")


class Transport(StrEnum):
    """The transports an image can be pulled from."""

    DOCKER = "docker"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DIR = "dir"
    DOCKER_ARCHIVE = "docker-archive"
    DOCKER_DAEMON = "docker-daemon"
    CONTAINERS_STORAGE = "containers-storage"


_ALIASES: Final = {"registry": Transport.DOCKER}
_PATH_TRANSPORTS: Final = frozenset(
    {Transport.OCI, Transport.OCI_ARCHIVE, Transport.DIR, Transport.DOCKER_ARCHIVE}
)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """A registry-style name, fully expanded: ``repository`` with its host, and a ``tag`` or a ``digest``."""

    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        if self.digest:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image as a caller names it, in normal form.

    ``name`` is what follows the transport: for ``docker`` the expanded name without ``//``, for transports
    of files an absolute path, then ``:`` and the name inside where one is given. Made by ``parse``.
    """

    transport: Transport
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reference written as ``text``; raises ``InvalidReference``.

        A name without a transport is refused: what ``fedora`` means would depend on a host's search list.
        """
        # Short enough that the message has room for the reason.
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
        if len(text) > MAX_LENGTH:
            raise InvalidReference(f"longer than {MAX_LENGTH} characters", reference=shown)
        if _CONTROL.search(text):
            raise InvalidReference("control characters are not allowed", reference=shown)
        prefix, colon, rest = text.partition(":")
        transport = _transport(prefix) if colon else None
        if transport is None:
            raise InvalidReference("it begins with no known transport", reference=shown)
        try:
            return cls(transport, _normal(transport, rest))
        except ValueError as error:
            raise InvalidReference(error, reference=shown) from None

    @property
    def path(self) -> str:
        """The path of a transport of files, "" for the others."""
        return self.name.partition(":")[0] if self.transport in _PATH_TRANSPORTS else ""

    @property
    def real_path(self) -> Path | None:
        """``path`` without links, as they are now; None for other transports.

        With them where they lead to a path with a colon, which containers-image cannot name.
        """
        if not self.path:
            return None
        real = Path(self.path).resolve()
        return Path(self.path) if ":" in str(real) else real

    @property
    def inner(self) -> str:
        """What a transport of files names inside ``path``: a tag, ``@N`` for the Nth entry, or ""."""
        return self.name.partition(":")[2] if self.transport in _PATH_TRANSPORTS else ""

    @property
    def named(self) -> NamedImage | None:
        """The registry-style name, of ``docker`` and, where it has one, of ``docker-daemon``."""
        if self.transport not in (Transport.DOCKER, Transport.DOCKER_DAEMON) or _DIGEST.match(self.name):
            return None
        return parse_named(self.name)

    def __str__(self) -> str:
        slashes = "//" if self.transport is Transport.DOCKER else ""
        return f"{self.transport}:{slashes}{self.name}"


def parse_named(text: str) -> NamedImage:
    """``text`` as a registry-style name, expanded as docker does; raises ``ValueError`` saying what is wrong.

    ``busybox`` is ``docker.io/library/busybox:latest``. A tag and a digest together are refused, as
    containers-image refuses them: registries cannot be asked for both.
    """
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.match(digest):
        raise ValueError("the digest is not sha256: and 64 lower-case hex digits")
    slash = rest.rfind("/")
    colon = rest.find(":", slash + 1)
    path, tag = (rest[:colon], rest[colon + 1 :]) if colon >= 0 else (rest, "")
    if colon >= 0 and not _TAG_ONLY.match(tag):
        raise ValueError("the tag is not valid")
    if tag and digest:
        raise ValueError("a tag and a digest together are not supported")
    repository = _expanded(path)
    return NamedImage(repository, tag if tag or digest else "latest", digest)


def _expanded(path: str) -> str:
    domain, slash, remainder = path.partition("/")
    # What a first component must have to be a host (docker's rule, kept by containers-image).
    is_host = slash and ("." in domain or ":" in domain or domain == "localhost" or domain.lower() != domain)
    if not is_host:
        domain, remainder = _DEFAULT_DOMAIN, path
    elif domain == "index.docker.io":
        domain = _DEFAULT_DOMAIN
    if domain == _DEFAULT_DOMAIN and remainder and "/" not in remainder:
        remainder = f"{_OFFICIAL}/{remainder}"
    if not _DOMAIN.match(domain):
        raise ValueError("the registry host is not valid")
    if not _PATH.match(remainder):
        raise ValueError("the repository name is not valid")
    if _IMAGE_ID.match(path):
        raise ValueError("64 hex digits name an image id, not a repository")
    if len(domain) + 1 + len(remainder) > MAX_REPOSITORY:
        raise ValueError(f"the repository name is longer than {MAX_REPOSITORY} characters")
    return f"{domain}/{remainder}"


def _transport(prefix: str) -> Transport | None:
    if prefix in _ALIASES:
        return _ALIASES[prefix]
    try:
        return Transport(prefix)
    except ValueError:
        return None


def _normal(transport: Transport, rest: str) -> str:
    """The normal form of what follows the transport; raises ``ValueError`` saying what is wrong."""
    if transport is Transport.DOCKER:
        if not rest.startswith("//"):
            raise ValueError("after docker: two slashes are expected")
        return str(parse_named(rest[2:]))
    if transport is Transport.DOCKER_DAEMON:
        return rest if _DIGEST.match(rest) else str(parse_named(rest))
    if transport is Transport.CONTAINERS_STORAGE:
        return _storage_name(rest)
    return _file_name(transport, rest)


def _file_name(transport: Transport, rest: str) -> str:
    # containers-image splits at the first colon, so a path cannot hold one.
    path, colon, inner = rest.partition(":")
    if not path.startswith("/"):
        raise ValueError("the path must be absolute")
    if ".." in path.split("/"):
        raise ValueError("the path must not contain ..")
    # normpath keeps a leading double slash, which Linux does not tell from one.
    path = "/" + os.path.normpath(path).lstrip("/")
    if not colon or not inner:
        return path
    if transport is Transport.DIR:
        raise ValueError("a path of dir: has no colon")
    if _INDEX.match(inner):
        if (
            transport is Transport.OCI_ARCHIVE
            or transport is Transport.OCI
            or transport is Transport.DOCKER_ARCHIVE
        ):
            return f"{path}:@{int(inner[1:])}"
    elif transport is Transport.DOCKER_ARCHIVE:
        named = parse_named(inner)
        if named.digest:
            raise ValueError("docker-archive: does not know digests")
        return f"{path}:{named}"
    if not _REF_NAME.match(inner):
        raise ValueError("the name after the path is not valid")
    return f"{path}:{inner}"


def _storage_name(rest: str) -> str:
    # The store and the image id are resolved by the storage itself; only the form is checked here.
    store = _STORE.match(rest)
    specifier = store[0] if store else ""
    name = rest[len(specifier) :]
    base, at, image_id = name.rpartition("@")
    if at and _IMAGE_ID.match(image_id):
        name = base
        suffix = "@" + image_id
    else:
        suffix = ""
    if not name and not suffix:
        raise ValueError("no image is named")
    return f"{specifier}{parse_named(name) if name else ''}{suffix}"
