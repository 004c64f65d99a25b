"""Unified storage: real podman, a real registry, real file systems; judged by podman and composefs-rs."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.loops import loop_filesystem, used
from hostimage_testing.pulling import check_nothing_named, check_whole, pull
from hostimage_testing.registry import CREDENTIALS, Registry, running_registry
from hostimage_testing.runnable import runnable_root
from hostimage_testing.samples import copy, more
from hostimage_testing.tools import require, run
from hostimage_testing.unified import fetch, import_fetched, podman, pull_unified, run_in_image
from hostimaged.composefs.repository import How, Repository, Sharing, SharingImpossible
from hostimaged.errors import NoSpace, PreconditionFailed, RegistryAuth, SignatureRejected
from hostimaged.ids import ObjectId
from hostimaged.oci.pull import PullResult
from hostimaged.oci.storage import owned
from hostimaged.progress import Phase, Silent
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="podman needs root"),
]
MIB = 1 << 20
#: Bytes of a configuration, which is no layer, and more.
SMALL = 4096
#: Objects are in 256 directories, each of which takes a block: the image has to be large beside these.
FILES, FILE_SIZE = 400, 256 << 10
FILESYSTEMS = [("ext4", How.LINKED), ("xfs", How.REFLINKED), ("btrfs", How.REFLINKED)]


@dataclass(frozen=True)
class Published:
    """An image in a registry, and what a plain pull of it gives."""

    registry: Registry
    name: str
    layout: Layout
    direct: PullResult
    layers: dict[str, ObjectId | None]

    @property
    def reference(self) -> str:
        return f"docker://{self.name}"

    def host(self, root: Path, **more: str) -> HostPaths:
        return scratch_host(root, registries=self.registry.registries_conf, **more)


def layer_objects(host: HostPaths) -> dict[str, ObjectId | None]:
    """The streams of layers in the repository of ``host``, with the objects that they are."""
    with Repository.open(host.repository, lock_timeout=0) as repository:
        check_whole(repository)
        names = [name for name in repository.streams() if name.startswith("oci-layer-")]
        return {name: repository.has_stream(name) for name in names}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, registry: Registry, skopeo: str) -> Published:
    require("podman")
    directory = tmp_path_factory.mktemp("published")
    layout = Layout(directory / "layout")
    contents = random.Random(8)
    large = tars.directory(b"opt") + b"".join(
        tars.file(b"opt/%d" % at, contents.randbytes(FILE_SIZE + at)) for at in range(FILES)
    )
    base = layout.layer(runnable_root(b"ID=unified\n"), "gzip")
    layout.image("v1", [base, layout.layer(large + tars.END, "none")])
    layout.image("v2", [base, layout.layer(more(b"second", 3 * MIB), "gzip")])
    name = f"{registry.host}/unified:v1"
    for tag in ("v1", "v2"):
        target = f"docker://{registry.host}/unified:{tag}"
        copy(skopeo, f"oci:{layout.path}:{tag}", target, "--preserve-digests")
    host = scratch_host(directory / "host", registries=registry.registries_conf)
    return Published(registry, name, layout, pull(host, f"docker://{name}"), layer_objects(host))


def stored(host: HostPaths) -> dict[str, str]:
    """Ids of the images in the store by name, all complete."""
    store = owned.open_store(host)
    assert store is not None
    with store:
        assert all(image.complete for image in store.images())
        return {name: image.id for image in store.images() for name in image.names}


# --- both stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), FILESYSTEMS)
def test_r17_r18_r21_one_image_in_both_takes_the_space_of_one(
    tmp_path: Path, cfsctl: str, published: Published, kind: str, how: How
) -> None:
    with loop_filesystem(tmp_path, kind, 1024 * MIB) as filesystem:
        host = published.host(filesystem / "host")
        empty = used(filesystem)
        fetched = fetch(host, published.reference)
        alone = used(filesystem) - empty
        result = import_fetched(host, fetched)
        both = used(filesystem) - empty
        print(f"{kind}: store {alone} bytes, with the repository {both}: {both / alone - 1:+.2%}")
        assert both <= alone * 1.02
        assert alone > FILES * FILE_SIZE
        assert result.shared.keys() <= {how, How.PRESENT}
        assert result.shared[how][0] >= FILES
        # The same as without a store.
        assert result.image_ids == published.direct.image_ids
        assert result.manifest_digest == published.direct.manifest_digest
        assert layer_objects(host) == published.layers
        judge = Judge(cfsctl, host.repository)
        judge.check(images=1)
        assert stored(host) == {published.name: fetched.image_id}
        _check_same_by_cfsctl(cfsctl, filesystem / "theirs", host, published)
        assert run_in_image(host, published.name, "/bin/sh", "-c", "cat /etc/os-release") == "ID=unified\n"
        assert published.name.partition(":v1")[0] in podman(host, "images", own=False).out
        # podman leaves the repository as it was.
        judge.check(images=1)


def _check_same_by_cfsctl(cfsctl: str, path: Path, host: HostPaths, published: Published) -> None:
    """composefs-rs's own import of the same store makes the same layers and images."""
    judge = Judge(cfsctl, path)
    judge("init")
    run(
        cfsctl, "--repo", path, "--insecure", "oci", "pull", "--local-fetch", "zerocopy",
        f"containers-storage:{published.name}", "theirs",
        env=os.environ | {"CONTAINERS_STORAGE_ROOT": str(host.store)},
    )  # fmt: skip
    judge.check(images=1)
    with Repository.open(path, lock_timeout=0) as repository:
        assert {name: repository.has_stream(name) for name in published.layers} == published.layers
        for image_id in published.direct.image_ids.values():
            os.close(repository.open_image(image_id.hex()))


def test_r19_across_two_file_systems_nothing_is_downloaded(tmp_path: Path, published: Published) -> None:
    """A store that lies elsewhere: refused beforehand, or copied as the caller says."""
    with loop_filesystem(tmp_path, "ext4", 512 * MIB) as filesystem:
        host = published.host(tmp_path / "host")
        host.repository.mkdir(parents=True, mode=0o700)
        (filesystem / "bootc").mkdir()
        host.store.parent.symlink_to(filesystem / "bootc")
        before = _downloads(published.registry)
        for sharing in (Sharing.REQUIRE, Sharing.AUTO):
            with pytest.raises(SharingImpossible, match="nothing is downloaded"):
                fetch(host, published.reference, sharing=sharing)
        assert _downloads(published.registry) - before < SMALL
        check_nothing_named(host)
        assert not owned.exists(host)
        fetched = fetch(host, published.reference, sharing=Sharing.COPY)
        result = import_fetched(host, fetched, sharing=Sharing.COPY)
        assert result.image_ids == published.direct.image_ids
        assert result.shared.keys() <= {How.COPIED, How.PRESENT}


def _downloads(registry: Registry) -> int:
    """Bytes of blobs that the registry sent."""
    log = (registry.storage.parent / "log").read_text()
    return sum(map(int, re.findall(r'"GET /v2/unified/blobs/\S+ HTTP/1\.1" 200 (\d+)', log)))


class Recorder(Silent):
    """Remembers bytes and phases, which must not run backwards."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.total = self.cached = -1
        self.advanced = 0
        self.imported: list[tuple[int, int]] = []
        self.steps = 0

    def phase(self, phase: Phase) -> None:
        self.phases.append(phase)

    def totals(self, total: int, cached: int) -> None:
        assert self.total == -1
        assert self.imported, "that an import follows is told first"
        self.total, self.cached = total, cached

    def advance(self, count: int) -> None:
        assert count > 0
        assert self.total >= 0
        self.advanced += count
        self.steps += 1

    def importing(self, done: int, total: int) -> None:
        assert not self.imported or done >= self.imported[-1][0]
        self.imported.append((done, total))


def test_r26_bytes_of_both_stages_with_totals_up_front(tmp_path: Path, published: Published) -> None:
    host = published.host(tmp_path / "host")
    recorder = Recorder()
    fetched = fetch(host, published.reference, recorder)
    assert recorder.phases == [Phase.RESOLVING, Phase.PULLING]
    assert (recorder.total, recorder.cached) == (published.direct.bytes_total, 0)
    assert recorder.advanced == recorder.total == fetched.bytes_fetched
    assert recorder.steps > 3, "more than the beginning and the end"
    assert recorder.imported == [(0, recorder.total)]
    import_fetched(host, fetched, recorder)
    assert recorder.imported[-1] == (recorder.total, recorder.total)
    assert len(recorder.imported) >= 4


# --- what is there is not fetched again -------------------------------------------------------------------


def test_what_the_store_has_is_not_fetched_again(tmp_path: Path, published: Published) -> None:
    host = published.host(tmp_path / "host")
    pull_unified(host, published.reference)
    before = _downloads(published.registry)
    again = pull_unified(host, published.reference)
    assert (again.fetched.bytes_fetched, again.result.changed) == (0, False)
    second = fetch(host, published.reference.replace(":v1", ":v2"))
    assert second.layers_present == 1
    assert 0 < second.bytes_fetched < second.bytes_total
    assert len(stored(host)) == 2
    sent = _downloads(published.registry) - before
    print(f"sent by the registry: {sent} bytes; the image has {second.bytes_total}")
    assert sent < second.bytes_fetched + 3 * SMALL


def test_r24_half_an_image_is_completed(tmp_path: Path, published: Published) -> None:
    """podman that is killed before it stores the manifest leaves an image without it, and without a name."""
    host = published.host(tmp_path / "host")
    first = pull_unified(host, published.reference)
    index = host.store / "overlay-images/images.json"
    (entry,) = json.loads(index.read_text())
    for name in [name for name in entry["big-data-names"] if name.startswith("manifest")]:
        encoded = name if name == "manifest" else "=" + base64.b64encode(name.encode()).decode()
        (host.store / "overlay-images" / entry["id"] / encoded).unlink()
        entry["big-data-names"].remove(name)
    del entry["names"]
    index.write_text(json.dumps([entry]))
    again = pull_unified(host, published.reference)
    assert again.fetched.image_id == first.fetched.image_id
    assert again.fetched.bytes_fetched < SMALL
    assert stored(host) == {published.name: first.fetched.image_id}
    assert again.result.manifest_digest == first.result.manifest_digest


def test_what_the_repository_has_is_not_fetched_again(
    tmp_path: Path, cfsctl: str, published: Published
) -> None:
    """A host that pulled plainly goes over: what neither place has is all that is downloaded."""
    host = published.host(tmp_path / "host")
    pull(host, published.reference)
    before = _downloads(published.registry)
    first = pull_unified(host, published.reference)
    assert first.fetched.bytes_fetched <= first.fetched.bytes_total - FILES * FILE_SIZE
    assert _downloads(published.registry) - before < SMALL
    assert (first.fetched.layers_present, first.result.layers_present) == (2, 2)
    assert first.result.manifest_digest == published.direct.manifest_digest
    assert stored(host) == {published.name: first.fetched.image_id}
    assert run_in_image(host, published.name, "/bin/sh", "-c", "echo runs") == "runs\n"
    second = pull_unified(host, published.reference.replace(":v1", ":v2"))
    assert second.fetched.layers_present == 1
    again = fetch(host, published.reference)
    assert again.bytes_fetched == 0
    Judge(cfsctl, host.repository).check(images=2)


def test_the_import_beside_a_plain_pull(tmp_path: Path, published: Published) -> None:
    """Figures; the import must not take longer than fetching and unpacking all."""
    unified, plain = published.host(tmp_path / "unified"), published.host(tmp_path / "plain")
    fetched = fetch(unified, published.reference)
    times = {}
    for what, work in (
        ("import", lambda: import_fetched(unified, fetched)),
        ("plain pull", lambda: pull(plain, published.reference)),
    ):
        written, began = _written(), time.monotonic()
        work()
        times[what] = time.monotonic() - began
        print(f"{what}: {times[what]:.2f} s, {_written() - written} bytes written by this process")
    assert times["import"] < 2 * times["plain pull"]


def _written() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["wchar"])


# --- other sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["oci", "dir", "oci-archive"])
def test_other_transports(tmp_path: Path, published: Published, skopeo: str, transport: str) -> None:
    """Two images of one layout have two names: podman itself knows but one."""
    host = published.host(tmp_path / "host")
    found = []
    for tag in ("v1", "v2"):
        if transport == "oci":
            reference = f"oci:{published.layout.path}:{tag}"
        else:
            path = tmp_path / transport / tag / "image"
            path.parent.mkdir(parents=True)
            reference = f"{transport}:{path}"
            copy(skopeo, f"oci:{published.layout.path}:{tag}", reference)
        found.append(pull_unified(host, reference))
        assert str(found[-1].result.reference) == reference
    assert stored(host) == {each.fetched.name: each.fetched.image_id for each in found}
    assert len({each.fetched.name for each in found}) == 2
    assert found[0].result.image_ids == published.direct.image_ids
    for each in found:
        assert run_in_image(host, each.fetched.name, "/bin/sh", "-c", "echo $0") == "/bin/sh\n"


def test_an_image_of_roots_own_store(tmp_path: Path, published: Published) -> None:
    """Built or pulled by root's podman, it is copied without a registry; no container of that store is
    forgotten."""
    host = published.host(tmp_path / "host")
    own = host.containers.storage
    own.mkdir(parents=True)
    _with_own_store(host, published)
    before = _downloads(published.registry)
    reference = "containers-storage:localhost/built:1"
    got = pull_unified(host, reference)
    assert stored(host) == {"localhost/built:1": got.fetched.image_id}
    assert got.result.image_ids == published.direct.image_ids
    assert str(got.result.source_digest) == str(published.direct.source_digest)
    begun = fetch(host, published.reference, imports=False, local_first=True)
    assert stored(host).keys() == {"localhost/built:1", published.name}
    assert begun.image_id == got.fetched.image_id
    assert _downloads(published.registry) == before


def _with_own_store(host: HostPaths, published: Published) -> None:
    policy = host.containers.policy
    script = 'mount --bind "$0" /var/lib/containers && mount -t tmpfs tmpfs /run && exec "$@"'
    home = host.containers.storage.parent
    for arguments in (
        ("pull", "--quiet", "--tls-verify=false", "--signature-policy", str(policy), published.name),
        ("tag", published.name, "localhost/built:1"),
    ):
        run(
            "unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(home),
            require("podman"), "--root", "/var/lib/containers/storage", "--runroot", "/run/x",
            "--storage-driver", "overlay", *arguments,
        )  # fmt: skip


# --- refused ----------------------------------------------------------------------------------------------


def test_what_is_refused_beforehand_leaves_no_store(tmp_path: Path, published: Published) -> None:
    host = published.host(tmp_path / "host")
    with pytest.raises(PreconditionFailed, match="not the expected"):
        fetch(host, published.reference, expect_digest="sha256:" + "0" * 64)
    with pytest.raises(SignatureRejected):
        fetch(host, published.reference, signed=True)
    rejecting = published.host(tmp_path / "rejecting", policy='{"default": [{"type": "reject"}]}')
    with pytest.raises(SignatureRejected):
        fetch(rejecting, published.reference)
    assert not owned.exists(host)
    assert not owned.exists(rejecting)


def test_r25_space_for_what_is_missing(
    tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before the download, and only for layers that are not there."""
    host = published.host(tmp_path / "host")
    real = os.statvfs
    free = 4 * MIB

    def statvfs(path: str | int) -> os.statvfs_result:
        found = list(real(path))
        found[4] = free // found[1]
        return os.statvfs_result(found)

    before = _downloads(published.registry)
    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(NoSpace, match="needs at least"):
        fetch(host, published.reference)
    assert not owned.exists(host)
    assert _downloads(published.registry) - before < SMALL
    free = 1 << 40
    fetch(host, published.reference)
    # The second image is larger than what is free, and what is missing of it is not.
    free = 1 * MIB
    second = fetch(host, published.reference.replace(":v1", ":v2"))
    assert second.bytes_total > free


def test_credentials_are_those_of_bootc(tmp_path: Path, published: Published, skopeo: str) -> None:
    """An auth file of the host, and none of whoever runs this; podman has it without a copy on disk."""
    with running_registry(tmp_path / "private", password=True) as private:
        name = f"{private.host}/private:v2"
        options = ("--preserve-digests", "--dest-creds", CREDENTIALS)
        copy(skopeo, f"oci:{published.layout.path}:v2", f"docker://{name}", *options)
        host = scratch_host(tmp_path / "host", registries=private.registries_conf)
        with pytest.raises(RegistryAuth):
            fetch(host, f"docker://{name}")
        assert not owned.exists(host)
        auth = host.etc / "ostree/auth.json"
        auth.parent.mkdir()
        secret = base64.b64encode(CREDENTIALS.encode()).decode()
        auth.write_text(json.dumps({"auths": {private.host: {"auth": secret}}}))
        got = pull_unified(host, f"docker://{name}")
        assert got.fetched.bytes_fetched == got.fetched.bytes_total
        assert stored(host) == {name: got.fetched.image_id}


def test_podman_enforces_the_signature_policy(tmp_path: Path, published: Published) -> None:
    """An image that is to be signed and is not comes into neither place."""
    key = tmp_path / "key.pub"
    key.write_text(
        "-----BEGIN PUBLIC KEY-----\n"
        "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt\n"
        "6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==\n"
        "-----END PUBLIC KEY-----\n"
    )
    signed = [{"type": "sigstoreSigned", "keyPath": str(key)}]
    policy = {"default": [{"type": "insecureAcceptAnything"}], "transports": {"docker": {"": signed}}}
    host = published.host(tmp_path / "host", policy=json.dumps(policy))
    with pytest.raises(SignatureRejected):
        fetch(host, published.reference)
    store = owned.open_store(host)
    if store is not None:
        with store:
            assert store.images() == ()
    check_nothing_named(host)


@pytest.fixture(autouse=True)
def nothing_mounted(tmp_path: Path) -> Iterator[None]:
    """Nothing of all this leaves a mount on the machine."""
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
