"""A real Debian 13 root as a real image: through every way in, judged by cfsctl, the kernel and umoci."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hostimage_testing.debian import Debian
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import PULL_TAG, Judge
from hostimage_testing.registry import Registry
from hostimage_testing.tools import require, run
from hostimage_testing.walk import as_os_image, mounted, snapshot
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.oci.images import list_images
from hostimaged.oci.pull import PullResult, pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]
BOTH = FormatSet(Format.V1, (Format.V2,))


def pull(paths: HostPaths, image: str) -> PullResult:
    reference = ImageReference.parse(image)
    return pull_image(
        paths, reference, expect_digest=None, verity=Verity.OPPORTUNISTIC, lock_timeout=10, reporter=Silent()
    )


def host_with_both_formats(root: Path, registries: str = "") -> HostPaths:
    paths = scratch_host(root, registries=registries)
    repository, _ = Repository.init(
        paths.repository, algorithm=Algorithm.SHA512, formats=BOTH, verity=Verity.OPPORTUNISTIC
    )
    repository.close()
    return paths


def check_against_cfsctl(judge: Judge, result: PullResult) -> None:
    """cfsctl finds nothing wrong and computes the image ids that we stored, V1 and V2."""
    judge.check(images=1)
    for version in (Format.V1, Format.V2):
        computed = judge.image_id(f"{PULL_TAG}{result.manifest_digest}", version)
        assert computed == result.image_ids[version].hex()
        assert (judge.repository / "images" / computed).exists()


@pytest.mark.parametrize("image", ["one-gzip", "one-zstd", "eight-gzip", "eight-zstd"])
def test_layout(debian: Debian, cfsctl: str, tmp_path: Path, image: str) -> None:
    paths = host_with_both_formats(tmp_path)
    result = pull(paths, f"oci:{debian.layout}:{image}")
    assert result.changed
    check_against_cfsctl(Judge(cfsctl, paths.repository), result)


@pytest.mark.parametrize("image", ["one-gzip", "one-zstd", "eight-gzip", "eight-zstd"])
def test_registry(
    debian: Debian, cfsctl: str, skopeo: str, registry: Registry, tmp_path: Path, image: str
) -> None:
    target = f"docker://{registry.host}/debian:{image}"
    run(skopeo, "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false",
        f"oci:{debian.layout}:{image}", target)  # fmt: skip
    paths = host_with_both_formats(tmp_path, registry.registries_conf)
    result = pull(paths, target)
    check_against_cfsctl(Judge(cfsctl, paths.repository), result)
    again = pull(paths, target)
    assert not again.changed
    assert again.manifest_digest == result.manifest_digest


def test_compression_makes_no_difference(debian: Debian, tmp_path: Path) -> None:
    """gzip and zstd layers of the same content give the same image; the second pull stores no layer."""
    paths = host_with_both_formats(tmp_path)
    first = pull(paths, f"oci:{debian.layout}:eight-gzip")
    second = pull(paths, f"oci:{debian.layout}:eight-zstd")
    assert second.image_ids == first.image_ids
    assert second.layers_present == second.layers_total == 8


def test_repository_filled_by_cfsctl(debian: Debian, cfsctl: str, tmp_path: Path) -> None:
    """What cfsctl pulled is opened, listed and verified by us, and pulling it ourselves stores no layer."""
    paths = scratch_host(tmp_path)
    judge = Judge(cfsctl, paths.repository)
    run(cfsctl, "init", "--insecure", paths.repository)
    judge("oci", "pull", f"oci:{debian.layout}:eight-gzip", "theirs")
    with Repository.open(paths.repository, insecure=True) as repository:
        rows = list_images(repository)
        assert [row.tag for row in rows] == ["theirs"]
        ids = rows[0].image_ids
        for name in repository.streams():
            with repository.open_stream(name) as stream:
                assert all(repository.has_object(ref) for ref in stream.object_refs)
    objects = sum(len(files) for _, _, files in os.walk(paths.repository / "objects"))
    result = pull(paths, f"oci:{debian.layout}:eight-gzip")
    assert result.layers_present == 8
    assert result.image_ids[Format.V1] == ids[Format.V1]
    assert sum(len(files) for _, _, files in os.walk(paths.repository / "objects")) == objects
    judge.check(images=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_mount_equals_extracted_layers(debian: Debian, tmp_path: Path) -> None:
    """The kernel's view of our image is what umoci extracts from the layers."""
    umoci = require("umoci")
    paths = scratch_host(tmp_path / "host")
    result = pull(paths, f"oci:{debian.layout}:eight-gzip")
    run(umoci, "unpack", "--image", f"{debian.layout}:eight-gzip", tmp_path / "bundle")
    expected = as_os_image(snapshot(tmp_path / "bundle/rootfs"))
    image = paths.repository / "images" / result.image_ids[Format.V1].hex()
    (tmp_path / "mnt").mkdir()
    with mounted(image, paths.repository / "objects", tmp_path / "mnt") as merged:
        found = snapshot(merged)
    assert len(found.nodes) > 14_000
    assert found.nodes.keys() == expected.nodes.keys()
    different = {p: (n, expected.nodes[p]) for p, n in found.nodes.items() if n != expected.nodes[p]}
    assert not different
    assert found.hardlinks == expected.hardlinks


def test_fsck_erofs(debian: Debian, tmp_path: Path) -> None:
    """The file system checker of erofs-utils accepts the images."""
    paths = host_with_both_formats(tmp_path)
    result = pull(paths, f"oci:{debian.layout}:eight-zstd")
    for image_id in result.image_ids.values():
        run(require("fsck.erofs"), paths.repository / "images" / image_id.hex())


def test_stored_config_is_the_image_config(debian: Debian, tmp_path: Path) -> None:
    """Manifest and config are stored byte for byte: their hashes are their names."""
    paths = scratch_host(tmp_path)
    result = pull(paths, f"oci:{debian.layout}:one-zstd")
    index = json.loads((debian.layout / "index.json").read_text())
    wanted = [
        m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == "one-zstd"
    ]
    assert str(result.manifest_digest) == wanted[0]["digest"]
