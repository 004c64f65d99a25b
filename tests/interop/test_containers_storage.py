"""Images out of stores that podman and skopeo filled, on real file systems, judged by composefs-rs's tool."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import ACCEPT_ANYTHING, scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.loops import loop_filesystem, used
from hostimage_testing.pulling import check_nothing_named, check_whole, pull
from hostimage_testing.registry import Registry
from hostimage_testing.samples import BASE, copy, more
from hostimage_testing.tools import require, run
from hostimaged.composefs.repository import How, Repository, Sharing, SharingImpossible
from hostimaged.ids import ObjectId
from hostimaged.oci.pull import PullResult
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers-storage needs root or a user namespace"),
]
MIB = 1 << 20
#: Objects are in 256 directories, each of which takes a block: the image has to be large beside these.
FILES, FILE_SIZE = 512, 256 << 10


# a store that skopeo filled


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[str]:
    """A store that skopeo may fill: it mounts a directory of it onto itself, and leaves it so."""
    yield f"containers-storage:[overlay@{tmp_path}/root+{tmp_path}/run]"
    unmount_all(tmp_path / "root/overlay")


def unmount_all(path: Path) -> None:
    # Nothing but the list of mounts tells whether a program mounted something there.
    while run("umount", path, check=False).code == 0:
        pass


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_stored_by_skopeo(tmp_path: Path, cfsctl: str, skopeo: str, storage: str, form: str) -> None:
    """An image as podman has it: its layers are unpacked, and its manifest names compressed ones."""
    layout = Layout(tmp_path / "layout")
    layout.image("v1", [layout.layer(BASE, "gzip"), layout.layer(more(b"a"), "gzip")])
    stored = f"{storage}localhost/os:v1"
    copy(skopeo, f"oci:{layout.path}:v1", stored, "--format", form)
    host = scratch_host(tmp_path / "host")
    judge = Judge(cfsctl, host.repository)
    direct = pull(host, f"oci:{layout.path}:v1")
    result = pull(host, stored)
    assert result.layers_present == 2
    assert result.image_ids == direct.image_ids
    if form == "oci":
        assert str(result.source_digest) == str(direct.source_digest)
    assert not pull(host, stored).changed
    # The store keeps the manifest as it came; docker's is converted.
    judge.check(images=1 if form == "oci" else 2)
    fresh = scratch_host(tmp_path / "fresh")
    assert pull(fresh, stored).image_ids == direct.image_ids
    assert list(fresh.temporary.iterdir()) == []
    Judge(cfsctl, fresh.repository).check(images=1)


# a store that podman filled


@dataclass(frozen=True)
class Published:
    """An image in a registry, and what a plain pull of it gives."""

    registry: Registry
    name: str
    direct: PullResult
    layers: dict[str, ObjectId | None]


def layer_objects(host: HostPaths) -> dict[str, ObjectId | None]:
    """The streams of layers in the repository of ``host``, with the objects that they are."""
    with Repository.open(host.repository, lock_timeout=0) as repository:
        check_whole(repository)
        names = [name for name in repository.streams() if name.startswith("oci-layer-")]
        return {name: repository.has_stream(name) for name in names}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, registry: Registry, skopeo: str) -> Published:
    directory = tmp_path_factory.mktemp("published")
    layout = Layout(directory / "layout")
    contents = random.Random(8)
    large = tars.directory(b"usr") + tars.directory(b"usr/lib")
    large += b"".join(
        tars.file(b"usr/lib/%d" % at, contents.randbytes(FILE_SIZE + at)) for at in range(FILES)
    )
    layout.image("v1", [layout.layer(BASE, "gzip"), layout.layer(large + tars.END, "none")])
    name = f"{registry.host}/shared:v1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    host = scratch_host(directory / "host", registries=registry.registries_conf)
    return Published(registry, name, pull(host, f"docker://{name}"), layer_objects(host))


@contextmanager
def stored_by_podman(filesystem: Path, published: Published) -> Iterator[Path]:
    """The root of a store on ``filesystem`` into which podman pulled the image."""
    policy = filesystem / "policy.json"
    policy.write_text(ACCEPT_ANYTHING)
    root = filesystem / "storage"
    runs = filesystem / "run"
    runs.mkdir()
    # podman takes no longer name than one of 50 characters for this directory.
    fd = os.open(runs, os.O_PATH)
    try:
        run(
            require("podman"), "--root", root, "--runroot", f"/proc/self/fd/{fd}",
            "--storage-driver", "overlay", "pull", "--quiet", "--tls-verify=false",
            "--signature-policy", policy, published.name, pass_fds=[fd],
        )  # fmt: skip
    finally:
        os.close(fd)
    try:
        yield root
    finally:
        unmount_all(root / "overlay")


@pytest.mark.parametrize(
    ("kind", "how"), [("ext4", How.LINKED), ("xfs", How.REFLINKED), ("btrfs", How.REFLINKED)]
)
def test_r18_store_and_repository_take_the_space_of_one(
    tmp_path: Path, cfsctl: str, published: Published, kind: str, how: How
) -> None:
    with loop_filesystem(tmp_path, kind, 768 * MIB) as filesystem:
        empty = used(filesystem)
        with stored_by_podman(filesystem, published) as root:
            # podman works in a mount namespace of its own where it must be possible to link.
            unmount_all(root / "overlay")
            alone = used(filesystem) - empty
            host = scratch_host(filesystem / "host")
            result = pull(
                host, f"containers-storage:[overlay@{root}]{published.name}", sharing=Sharing.REQUIRE
            )
            both = used(filesystem) - empty
            print(f"{kind}: store {alone} bytes, with the repository {both}: {both / alone - 1:+.2%}")
            assert both <= alone * 1.02
            assert alone > FILES * FILE_SIZE
            _check_shared(result, how)
            assert result.image_ids == published.direct.image_ids
            assert str(result.manifest_digest) == str(published.direct.manifest_digest)
            assert layer_objects(host) == published.layers
            Judge(cfsctl, host.repository).check(images=1)
            _check_same_by_cfsctl(cfsctl, filesystem / "theirs", root, published)


def _check_shared(result: PullResult, how: How) -> None:
    """Everything but what was there already came without being copied."""
    assert result.shared.keys() <= {how, How.PRESENT}
    objects, size = result.shared[how]
    assert objects == FILES + 1
    assert size >= FILES * FILE_SIZE


def _check_same_by_cfsctl(cfsctl: str, path: Path, root: Path, published: Published) -> None:
    """composefs-rs's own import of the same store makes the same layers and images."""
    judge = Judge(cfsctl, path)
    judge("init")
    environment = os.environ | {"CONTAINERS_STORAGE_ROOT": str(root)}
    run(
        cfsctl, "--repo", path, "--insecure", "oci", "pull", "--local-fetch", "zerocopy",
        f"containers-storage:{published.name}", "theirs", env=environment,
    )  # fmt: skip
    judge.check(images=1)
    with Repository.open(path, lock_timeout=0) as repository:
        assert {name: repository.has_stream(name) for name in published.layers} == published.layers
        for image_id in published.direct.image_ids.values():
            os.close(repository.open_image(image_id.hex()))


def test_r19_of_two_file_systems_nothing_is_shared(tmp_path: Path, cfsctl: str, published: Published) -> None:
    """Refused before anything is imported if it must be; else everything is copied."""
    with (
        loop_filesystem(tmp_path, "ext4", 512 * MIB) as filesystem,
        stored_by_podman(filesystem, published) as root,
    ):
        reference = f"containers-storage:[overlay@{root}]{published.name}"
        host = scratch_host(tmp_path / "host")
        with pytest.raises(SharingImpossible, match=str(root)):
            pull(host, reference, sharing=Sharing.REQUIRE)
        check_nothing_named(host)
        assert not [path for path in (host.repository / "objects").rglob("*") if path.is_file()]
        result = pull(host, reference, sharing=Sharing.AUTO)
        _check_shared(result, How.COPIED)
        assert result.image_ids == published.direct.image_ids
        assert layer_objects(host) == published.layers
        Judge(cfsctl, host.repository).check(images=1)
