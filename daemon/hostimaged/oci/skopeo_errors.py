"""What skopeo's error texts mean, in our terms.

The proxy reports errors as the text of containers-image, and before protocol 0.2.8 as nothing else; so does
``skopeo copy``. The texts are matched by the words that registries and containers-image have kept over many
releases. What is passed on to callers is one line, without private paths, credentials or query strings.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hostimaged.errors import (
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    NetworkError,
    NoSpace,
    RegistryAuth,
    SignatureRejected,
    StorageError,
    Unavailable,
    UnsupportedImage,
    printable,
)
from hostimaged.oci.reference import ImageReference, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_REASON_LIMIT: Final = 300
_NETWORKED: Final = frozenset({Transport.DOCKER, Transport.DOCKER_DAEMON})

#: In order: the first class with a matching word is the cause.
_CAUSES: Final[tuple[tuple[type[HostimageError], tuple[str, ...]], ...]] = (
    (
        SignatureRejected,
        (
            "source image rejected",
            "signature was required",
            "rejected by policy",
            "policy requirement",
            "no policy.json file",
            "invalid policy in",
            "error loading trust policy",
        ),
    ),
    (
        DigestMismatch,
        (
            "corrupted blob",
            "bytes in blob",
            "digest did not match",
            "does not match provided manifest digest",
        ),
    ),
    (NoSpace, ("no space left on device", "disk quota exceeded")),
    (
        RegistryAuth,
        (
            "unauthorized",
            "authentication required",
            "invalid username/password",
            "access to the resource is denied",
            "no basic auth credentials",
            "denied:",
            "403 (forbidden)",
            "401 (unauthorized)",
            "statuscode: 401",
            "statuscode: 403",
        ),
    ),
    (
        UnsupportedImage,
        (
            "unsupported legacy manifest",
            "unsupported manifest",
            "unsupported mime type",
            "unsupported docker v2s1",
            "unexpectedly received a manifest list",
            "unimplemented manifest",
            "unknown media type during manifest conversion",
            # A manifest that is no JSON, or has no end.
            "looking for beginning of",
            "unexpected end of json input",
            "json: cannot unmarshal",
            "exceeded maximum allowed size",
        ),
    ),
    (
        ImageNotFound,
        (
            "manifest unknown",
            "name unknown",
            "repository name not known",
            "no image found",
            "no descriptor found for reference",
            "more than one image in oci",
            "image not known",
            "does not resolve to an image id",
            "identifier is not an image",
            "no such image",
            "no such file or directory",
            '" not found',
            "404 (not found)",
            "statuscode: 404",
        ),
    ),
)
#: What is said for a skopeo that died without a word.
ENDED: Final = "skopeo ended unexpectedly"
#: What passes: the same request may well succeed later.
_PASSING: Final = (
    "connection refused",
    "connection reset",
    "connection timed out",
    "broken pipe",
    "unexpected eof",
    "server closed idle connection",
    "server sent goaway",
    "stream error",
    "i/o timeout",
    "tls handshake timeout",
    "timeout awaiting response headers",
    "client.timeout exceeded",
    "deadline exceeded",
    "network is unreachable",
    "network is down",
    "no route to host",
    "host is down",
    "temporary failure in name resolution",
    "server misbehaving",
    "too many requests",
    "toomanyrequests",
    ENDED,
)
#: The connection ended before the answer came.
_NO_ANSWER: Final = re.compile(r"\beof$")
#: Statuses that ask for patience: 408, 425, 429, and faults of the server, gateways among them.
_PASSING_STATUS: Final = re.compile(r"status\D{0,32}\b(?:408|425|429|50[0234])\b")
_URL_QUERY: Final = re.compile(r"(https?://[^\s\"'?]*)\?[^\s\"']*")
_USERINFO: Final = re.compile(r"(https?://)[^\s/@\"']*@")
_HTTP_VERB: Final = re.compile(r"\b(?:Get|Head|Post) \"(https?://[^\"]*)\": ")
_FATAL: Final = re.compile(r'level=fatal msg=(?:"((?:[^"\\]|\\.)*)"|(\S+))')


def mapped(text: str, reference: ImageReference, private: Iterable[Path] = ()) -> HostimageError:
    """The error for ``text``, met while fetching ``reference``; ``private`` paths are not shown."""
    lowered = text.lower()
    reason = cleaned(text, private)
    for cause, words in _CAUSES:
        if any(word in lowered for word in words):
            if cause is DigestMismatch:
                return DigestMismatch(
                    what=f"{reference}", expected="the bytes its digest names", actual=reason
                )
            return cause(f"{reference}: {reason}")
    if reference.transport not in _NETWORKED:
        return StorageError(f"{reference}: {reason}")
    return (Unavailable if _passes(lowered) else NetworkError)(f"{reference}: {reason}")


def _passes(lowered: str) -> bool:
    return (
        any(word in lowered for word in _PASSING)
        or _NO_ANSWER.search(lowered) is not None
        or _PASSING_STATUS.search(lowered) is not None
    )


def fatal_message(log: str) -> str:
    """What a failed skopeo command says in its ``log``: its fatal line, else its last line."""
    found = _FATAL.findall(log)
    if found:
        quoted, bare = found[-1]
        text: str = quoted or bare
        return text.replace('\\"', '"').replace("\\n", " ").replace("\\\\", "\\")
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def cleaned(text: str, private: Iterable[Path]) -> str:
    """``text`` as one line for callers, without ``private`` paths, credentials and query strings."""
    for path in private:
        text = text.replace(str(path), "…")
    text = _HTTP_VERB.sub("", text)
    text = _URL_QUERY.sub(r"\1", text)
    text = _USERINFO.sub(r"\1", text)
    text = printable(" ".join(text.split()))
    return text if len(text) <= _REASON_LIMIT else text[: _REASON_LIMIT - 1] + "…"
