"""Names of images in stores: one that is wanted is found however it is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimaged.oci.storage.names import StoreName, has_registry

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        ("localhost/x", "localhost/x:latest"),
        ("localhost/x:latest", "localhost/x:latest"),
        ("busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox:1", "docker.io/library/busybox:1"),
        ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
        ("user/app", "docker.io/user/app:latest"),
        # Without a registry any may be meant: registries.conf decides when it is pulled.
        ("busybox", "quay.io/busybox:latest"),
        ("busybox:3", "localhost/busybox:3"),
        ("user/app:2", "registry.example:5000/user/app:2"),
        (f"user/app@{DIGEST}", f"registry.example/user/app@{DIGEST}"),
        (f"user/app:2@{DIGEST}", f"registry.example/user/app@{DIGEST}"),
        (f"quay.io/a/b:7@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
        ("registry.example:5000/a", "registry.example:5000/a:latest"),
        ("not a name", "not a name"),
    ],
)
def test_the_same(wanted: str, stored: str) -> None:
    assert StoreName.parse(wanted).means(stored)


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        ("localhost/x", "localhost/x:1"),
        ("localhost/x", "docker.io/library/x:latest"),
        ("quay.io/x", "localhost/x:latest"),
        ("busybox", "quay.io/notbusybox:latest"),
        ("busybox:1", "docker.io/library/busybox:latest"),
        (f"quay.io/a/b@{DIGEST}", "quay.io/a/b:latest"),
        (f"quay.io/a/b:7@{DIGEST}", "quay.io/a/b:7"),
        ("not a name", "another"),
        ("", "localhost/x:latest"),
    ],
)
def test_another(wanted: str, stored: str) -> None:
    assert not StoreName.parse(wanted).means(stored)


def test_digests() -> None:
    assert StoreName.parse(f"x:1@{DIGEST}").digest == DIGEST
    assert StoreName.parse("x:1").digest == ""
    assert not has_registry("library/x")
    assert has_registry("localhost/x")
    assert has_registry("UPPER/x")


_PART = st.from_regex(r"[a-z0-9]{1,4}", fullmatch=True)
_REGISTRY = st.sampled_from(
    ["", "docker.io/", "index.docker.io/", "quay.io/", "localhost/", "h.example:5000/"]
)
_END = st.sampled_from(["", ":latest", ":1", f"@{DIGEST}", f":1@{DIGEST}", f":latest@{DIGEST}"])


def naive(registry: str, path: list[str], end: str) -> tuple[str, str, str]:
    """Registry, path and tag or digest in full; the registry "" if any may be meant."""
    host = registry.rstrip("/").replace("index.docker.io", "docker.io")
    parts = ["library", *path] if host == "docker.io" and len(path) == 1 else path
    tag, at, digest = end.partition("@")
    return host, "/".join(parts), at + digest if at else tag or ":latest"


@given(_REGISTRY, st.lists(_PART, min_size=1, max_size=3), _END, _REGISTRY.filter(bool),
       st.lists(_PART, min_size=1, max_size=3), _END)  # fmt: skip
def test_agrees_with_a_naive_model(
    registry: str, path: list[str], end: str, other: str, other_path: list[str], other_end: str
) -> None:
    """A store has names in full; podman drops a tag beside a digest."""
    for stored_path in (path, other_path, ["library", *path]):
        for stored_end in (end, other_end):
            host, full, what = naive(other, stored_path, stored_end)
            stored = f"{host}/{full}{what}"
            wanted_host, wanted_path, wanted_what = naive(registry, path, end)
            if wanted_host:
                same = (host, full, what) == (wanted_host, wanted_path, wanted_what)
            else:
                tail = f"{wanted_path}{wanted_what}"
                same = f"/{full}{what}".endswith(f"/{tail}")
            assert StoreName.parse(f"{registry}{'/'.join(path)}{end}").means(stored) == same
