"""Links of images: only what can be offered to people."""

from __future__ import annotations

import json

import pytest

from hostimaged.oci.links import MAX_URL, changelog_url, is_web_page
from hostimaged.oci.models import CONFIG_TYPE, ImageConfig, Manifest, parse_config, parse_manifest

PAGE = "https://os.example/changes"
OTHER = "http://os.example:8080/other?from=1&to=2#new"
CUSTOM, COMMON = "changelog-url", "org.opencontainers.image.changelog"


def manifest(**annotations: str) -> Manifest:
    digest = "sha256:" + "a" * 64
    config = {"mediaType": CONFIG_TYPE, "digest": digest, "size": 1}
    return parse_manifest(
        json.dumps({"schemaVersion": 2, "config": config, "annotations": annotations}).encode()
    )


def config(**labels: str) -> ImageConfig:
    return parse_config(json.dumps({"config": {"Labels": labels}, "rootfs": {"diff_ids": []}}).encode())


def test_labels_go_before_annotations() -> None:
    assert changelog_url(manifest(**{CUSTOM: OTHER}), config(**{COMMON: PAGE})) == PAGE
    assert changelog_url(manifest(**{COMMON: OTHER}), config()) == OTHER
    assert changelog_url(manifest(**{CUSTOM: OTHER}), None) == OTHER, "an artifact has no labels"
    assert changelog_url(manifest(), config(**{CUSTOM: PAGE, COMMON: OTHER})) == PAGE
    assert changelog_url(manifest(), config(**{"org.opencontainers.image.url": PAGE})) == ""


def test_what_is_no_link_is_passed_over() -> None:
    assert changelog_url(manifest(**{COMMON: PAGE}), config(**{CUSTOM: "see the wiki"})) == PAGE


@pytest.mark.parametrize("url", [PAGE, OTHER, "HTTPS://a", "https://[::1]/x", "https://a/%20(b)"])
def test_links(url: str) -> None:
    assert is_web_page(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/changes",
        "os.example/changes",
        "ftp://os.example/x",
        "file:///etc/passwd",
        "javascript:alert(1)//https://x",
        "https://",
        "https:///x",
        "https://?x",
        "https://user:secret@os.example/x",
        "https://trusted.example@os.example/x",
        "https://os.example:port/x",
        "https://os.example:99999/x",
        "https://[::1/x",
        "https://os.example/a b",
        "https://os.example/\n",
        "https://os.example/<b>",
        'https://os.example/"x',
        "https://os.example/\u202egnp",
        "https://\u0430pple.example/",
        "https://os.example/" + "x" * MAX_URL,
    ],
)
def test_what_is_no_link(url: str) -> None:
    assert not is_web_page(url)
