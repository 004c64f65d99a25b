"""Web pages that images name. They are offered to people as links, so what is none counts as missing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from hostimaged.oci.models import ImageConfig, Manifest

#: Where images name a page of what changed: the label of Project Atomic's ContainerApplicationGenericLabels,
#: and the key that some builders use. image-spec 1.1 has none: "url" and "documentation" say other things.
_CHANGELOG: Final = ("changelog-url", "org.opencontainers.image.changelog")
#: What browsers and proxies take; real ones have a hundred characters.
MAX_URL: Final = 2048
#: Characters of RFC 3986: all are visible ASCII, and none ends the URL in a text.
_URL: Final = re.compile(r"https?://[a-z0-9\[][a-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*\Z", re.ASCII | re.IGNORECASE)


def changelog_url(manifest: Manifest, config: ImageConfig | None) -> str:
    """The page of what changed that an image names, by label, else by annotation; or ""."""
    labels = config.config.labels if config is not None else {}
    for source in (labels, manifest.annotations):
        for key in _CHANGELOG:
            if is_web_page(url := source.get(key, "")):
                return url
    return ""


def is_web_page(url: str) -> bool:
    """Whether ``url`` can be offered as a link: https or http, a host, no credentials, an ordinary length."""
    if len(url) > MAX_URL or not _URL.match(url):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return bool(parts.hostname) and "@" not in parts.netloc
