"""Images out of containers-storage: right whatever the store is like, or an error naming what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing import stores, tars
from hostimage_testing.host import ACCEPT_ANYTHING, scratch_host
from hostimage_testing.layout import Layout
from hostimage_testing.pulling import check_nothing_named, check_whole, pull
from hostimaged.composefs.repository import How, Repository, Sharing, SharingImpossible, Verity
from hostimaged.errors import (
    DigestMismatch,
    HostimageError,
    ImageNotFound,
    LockTimeout,
    SignatureRejected,
    StorageError,
)
from hostimaged.ids import DiffId
from hostimaged.oci.storage.layer import MAX_LOWER
from hostimaged.oci.storage.store import Store
from hostimaged.oci.storage.tarsplit import MAX_LINE
from hostimaged.system.paths import HostPaths

LARGE = hashlib.sha256(b"large").digest() * 4000
BASE = (
    tars.directory(b"usr")
    + tars.directory(b"usr/bin")
    + tars.file(b"usr/bin/tool", b"#!/bin/sh\n" * 2000, mode=0o755)
    + tars.file(b"usr/small", b"inline")
    + tars.file(b"usr/zeros", bytes(5000))
    + tars.file(b"usr/large", LARGE)
    + tars.directory(b"run")
    + tars.END
)
MORE = tars.directory(b"usr") + tars.file(b"usr/more", b"0123456789abcdef" * 600) + tars.END
NAME = "localhost/os:v1"


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return scratch_host(tmp_path / "host")


@pytest.fixture
def store(tmp_path: Path) -> stores.Store:
    return stores.Store(tmp_path / "store")


def reference(store: stores.Store, name: str = NAME) -> str:
    return f"containers-storage:[overlay@{store.root}]{name}"


def filled(store: stores.Store) -> tuple[str, str]:
    """Two layers, the second above the first, and the image made of them."""
    lower = store.layer(BASE)
    upper = store.layer(MORE, [lower])
    store.image(NAME, layers=[lower, upper])
    return lower, upper


# what is there


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("sharing", [Sharing.COPY, Sharing.AUTO])
def test_it_is_the_image_that_a_layout_gives(
    tmp_path: Path, host: HostPaths, store: stores.Store, docker: bool, sharing: Sharing
) -> None:
    layout = Layout(tmp_path / "layout")
    layers = [layout.layer(tar, "gzip") for tar in (BASE, MORE)]
    layout.image("v1", layers)
    lower, upper = store.layer(BASE), store.layer(MORE)
    store.image(NAME, layers=[lower, upper], docker=docker)
    direct = pull(scratch_host(tmp_path / "direct"), f"oci:{layout.path}:v1")
    found = pull(host, reference(store), sharing=sharing)
    assert found.image_ids == direct.image_ids
    assert found.layers_present == 0
    with (
        Repository.open(host.repository, lock_timeout=0) as ours,
        Repository.open(tmp_path / "direct/sysroot/composefs", lock_timeout=0) as theirs,
    ):
        check_whole(ours)
        streams = {name for name in theirs.streams() if name.startswith("oci-layer-")}
        assert len(streams) == 2
        assert all(ours.has_stream(name) == theirs.has_stream(name) for name in streams)


@pytest.mark.parametrize(
    "name",
    ["localhost/os:v1", "os:v1", "sha256:{id}", "{id}", "localhost/os@{digest}", "org.example/other"],
)
def test_an_image_has_many_names(store: stores.Store, name: str) -> None:
    layer = store.layer(MORE)
    image = store.image(NAME, "quay.io/org.example/other:latest", layers=[layer])
    text = name.format(id=image, digest=store.images[0]["digest"])
    with Store.open(store.root) as opened:
        found = opened.find(text)
        assert found is not None
        assert (found.id, found.layers()) == (image, {DiffId(store.layers[0]["diff-digest"]): layer})


@pytest.mark.parametrize(
    "name", ["", "s:v1", "localhost/os", "other", "v1", "0" * 64, "localhost/os@sha256:0"]
)
def test_and_no_others(store: stores.Store, name: str) -> None:
    store.image(NAME, "quay.io/another:v1", layers=[store.layer(MORE)])
    with Store.open(store.root) as opened:
        assert opened.find(name) is None


def test_content_of_a_stub_is_in_a_layer_below(tmp_path: Path, host: HostPaths, store: stores.Store) -> None:
    """overlayfs copies only metadata up: the file has its size, and no blocks."""
    lower, middle = store.layer(BASE), store.layer(MORE)
    tar = tars.file(b"usr/large", LARGE, mode=0o600) + tars.END
    upper = store.layer(tar, [middle, lower])
    stub = store.diff(upper) / "usr/large"
    with stub.open("wb") as file:
        file.truncate(len(LARGE))
    os.setxattr(stub, "user.overlay.metacopy", b"")
    store.image(NAME, layers=[lower, middle, upper])
    pull(host, reference(store))
    stub.unlink()
    pull(scratch_host(tmp_path / "again"), reference(store))


def test_a_file_of_zeros_without_blocks_is_no_stub(host: HostPaths, store: stores.Store) -> None:
    layer = store.layer(BASE)
    with (store.diff(layer) / "usr/zeros").open("wb") as file:
        file.truncate(5000)
    store.image(NAME, layers=[layer])
    pull(host, reference(store))


# what is not


def _delete(store: stores.Store, layer: str) -> None:
    (store.diff(layer) / "usr/large").unlink()


def _flip(store: stores.Store, layer: str) -> None:
    path = store.diff(layer) / "usr/large"
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)


def _grow(store: stores.Store, layer: str) -> None:
    with (store.diff(layer) / "usr/large").open("ab") as file:
        file.write(b"!")


def _lead_out(store: stores.Store, layer: str) -> None:
    """The same bytes, but by a link that leaves the directory."""
    path = store.diff(layer) / "usr/large"
    outside = store.root.parent / "outside"
    outside.mkdir()
    path.rename(outside / "large")
    path.symlink_to("../../../../../outside/large")


def _lead_out_above(store: stores.Store, layer: str) -> None:
    usr = store.diff(layer) / "usr"
    usr.rename(store.root.parent / "usr")
    usr.symlink_to("../../../../usr")


def _pipe(store: stores.Store, layer: str) -> None:
    path = store.diff(layer) / "usr/large"
    path.unlink()
    os.mkfifo(path)


def _truncate(store: stores.Store, layer: str) -> None:
    entries = stores.tar_split(BASE)
    store.split(layer, entries[:3])


def _cut_short(store: stores.Store, layer: str) -> None:
    path = store.split_path(layer)
    path.write_bytes(path.read_bytes()[:-20])


def _none(store: stores.Store, layer: str) -> None:
    store.split_path(layer).unlink()


def _junk(store: stores.Store, layer: str) -> None:
    store.split_path(layer).write_bytes(gzip.compress(b"[]\n"))


def _unknown(store: stores.Store, layer: str) -> None:
    store.split(layer, [{"type": 3}])


def _remove(store: stores.Store, layer: str) -> None:
    shutil.rmtree(store.diff(layer))


def _expand(store: stores.Store, layer: str) -> None:
    """Some KiB that become one line without end."""
    line = b'{"type":2,"payload":"' + b"A" * (4 * MAX_LINE)
    store.split_path(layer).write_bytes(gzip.compress(line))


def _expand_much(store: stores.Store, layer: str) -> None:
    """Some KiB that become a tar of zeros, of 48 MiB."""
    lines = (json.dumps(stores.segment(bytes(3 << 20))) + "\n") * 16
    store.split_path(layer).write_bytes(gzip.compress(lines.encode(), 1))


def _claim(store: stores.Store, layer: str) -> None:
    entries = stores.tar_split(BASE)
    store.split(layer, [e | {"size": 1 << 40} if e.get("name") == "usr/large" else e for e in entries])


def _claim_more(store: stores.Store, layer: str) -> None:
    entries = stores.tar_split(BASE)
    store.split(layer, [e | {"size": 1 << 70} if e.get("name") == "usr/large" else e for e in entries])


def _upwards(store: stores.Store, layer: str) -> None:
    entries = stores.tar_split(BASE)
    (store.root / "large").write_bytes(LARGE)
    store.split(
        layer, [e | {"name": "../../../large"} if e.get("name") == "usr/large" else e for e in entries]
    )


@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        (_delete, StorageError, "usr/large"),
        (_flip, DigestMismatch, "usr/large"),
        (_grow, StorageError, "usr/large"),
        (_lead_out, StorageError, "usr/large"),
        (_lead_out_above, StorageError, "usr/"),
        (_pipe, StorageError, "usr/large"),
        (_truncate, DigestMismatch, "sha256:"),
        (_cut_short, StorageError, "tar-split"),
        (_none, StorageError, "tar-split"),
        (_junk, StorageError, "tar-split"),
        (_unknown, StorageError, "tar-split"),
        (_remove, StorageError, "diff"),
        (_expand, StorageError, "tar-split"),
        (_expand_much, DigestMismatch, "sha256:"),
        (_claim, StorageError, "usr/large"),
        (_claim_more, StorageError, "tar-split"),
        (_upwards, StorageError, "large"),
    ],
)
def test_damage_is_told_and_nothing_is_named(
    tmp_path: Path,
    host: HostPaths,
    store: stores.Store,
    damage: Callable[[stores.Store, str], None],
    error: type[HostimageError],
    told: str,
) -> None:
    lower, _ = filled(store)
    damage(store, lower)
    with pytest.raises(error, match=told):
        pull(host, reference(store))
    check_nothing_named(host, hashlib.sha256(MORE).hexdigest())
    # Whoever makes it whole again can go on.
    fresh = stores.Store(tmp_path / "fresh")
    filled(fresh)
    pull(host, reference(fresh))


def test_whole_layers_keep_their_names(host: HostPaths, store: stores.Store) -> None:
    _, upper = filled(store)
    (store.diff(upper) / "usr/more").write_bytes(b"x" * 9600)
    with pytest.raises(DigestMismatch, match="usr/more"):
        pull(host, reference(store))
    check_nothing_named(host, "sha256:" + hashlib.sha256(BASE).hexdigest())


def test_a_wrong_checksum_in_whole_data_is_no_damage(host: HostPaths, store: stores.Store) -> None:
    """The digest of the whole says more than any checksum of a part."""
    entries = stores.tar_split(MORE)
    entries[1]["payload"] = "AAAAAAAAAAA="
    store.image(NAME, layers=[store.layer(MORE, entries=entries)])
    pull(host, reference(store))


@pytest.mark.parametrize("payload", ["AAAA", "!", 5])
def test_a_checksum_that_is_none(host: HostPaths, store: stores.Store, payload: object) -> None:
    entries = stores.tar_split(MORE)
    entries[1]["payload"] = payload
    store.image(NAME, layers=[store.layer(MORE, entries=entries)])
    with pytest.raises(StorageError, match="tar-split"):
        pull(host, reference(store))
    check_nothing_named(host)


@pytest.mark.parametrize(("count", "works"), [(MAX_LOWER, True), (MAX_LOWER + 1, False)])
def test_layers_below(host: HostPaths, store: stores.Store, count: int, works: bool) -> None:
    """A chain in which each layer names only the next, as none is in practice; the file is in the last."""
    chain = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(count)]
    for at, layer in enumerate(chain):
        store.diff(layer).mkdir(parents=True)
        (store.root / "overlay/l" / store.link(layer)).symlink_to(f"../{layer}/diff")
        if at + 1 < count:
            (store.diff(layer).parent / "lower").write_text(f"l/{store.link(chain[at + 1])}")
    top = store.layer(MORE, chain[:1])
    (store.diff(chain[-1]) / "usr").mkdir()
    (store.diff(top) / "usr/more").rename(store.diff(chain[-1]) / "usr/more")
    store.image(NAME, layers=[top])
    if works:
        pull(host, reference(store))
        return
    with pytest.raises(StorageError, match=str(MAX_LOWER)):
        pull(host, reference(store))
    check_nothing_named(host)


def test_layers_below_each_other(host: HostPaths, store: stores.Store) -> None:
    lower, upper = filled(store)
    (store.diff(lower).parent / "lower").write_text(f"l/{store.link(upper)}")
    (store.diff(upper) / "usr/more").unlink()
    with pytest.raises(StorageError, match="usr/more"):
        pull(host, reference(store))


@pytest.mark.parametrize("text", ["l/../../x", "/etc", "l/A B", "x" * 70_000])
def test_a_chain_that_is_none(host: HostPaths, store: stores.Store, text: str) -> None:
    _, upper = filled(store)
    (store.diff(upper) / "usr/more").unlink()
    (store.diff(upper).parent / "lower").write_text(text)
    with pytest.raises(StorageError, match="lower"):
        pull(host, reference(store))


def test_a_link_that_leads_elsewhere(host: HostPaths, store: stores.Store) -> None:
    lower, upper = filled(store)
    (store.diff(upper) / "usr/more").unlink()
    link = store.root / "overlay/l" / store.link(lower)
    link.unlink()
    link.symlink_to("/etc")
    with pytest.raises(StorageError, match="leads to no layer"):
        pull(host, reference(store))


# the store as a whole


def test_layers_that_are_gone(host: HostPaths, store: stores.Store) -> None:
    filled(store)
    store.layers.pop()
    (store.root / "overlay-layers/layers.json").write_text("[]")
    with pytest.raises(ImageNotFound, match="missing from containers-storage"):
        pull(host, reference(store))
    check_nothing_named(host)


@pytest.mark.parametrize("name", ["overlay-images/images.json", "overlay-layers/layers.json"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_an_index_that_is_none(host: HostPaths, store: stores.Store, name: str, data: bytes) -> None:
    filled(store)
    (store.root / name).write_bytes(data)
    with pytest.raises(StorageError, match=name):
        pull(host, reference(store))


@pytest.mark.parametrize("name", ["overlay", "overlay-images", "overlay-layers"])
def test_a_directory_that_is_no_store(host: HostPaths, store: stores.Store, name: str) -> None:
    (store.root / name).rename(store.root / "elsewhere")
    with pytest.raises(ImageNotFound, match="no containers-storage"):
        pull(host, reference(store))


def test_no_such_image(host: HostPaths, store: stores.Store) -> None:
    filled(store)
    with pytest.raises(ImageNotFound, match="localhost/none"):
        pull(host, reference(store, "localhost/none:v1"))


#: Holds the record lock of a file until its input ends.
_HOLD = """import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["overlay-images/images.lock", "overlay-layers/layers.lock"])
def test_locks_of_podman_are_waited_for(host: HostPaths, store: stores.Store, name: str) -> None:
    filled(store)
    argv = [sys.executable, "-c", _HOLD, str(store.root / name)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        with pytest.raises(LockTimeout, match=name):
            pull(host, reference(store), lock_timeout=0.2)
        holder.communicate()
    pull(host, reference(store))


@pytest.mark.parametrize(
    "policy",
    [
        '{"default": [{"type": "reject"}]}',
        '{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/key"}]}',
        ACCEPT_ANYTHING[:-1] + ', "transports": {"containers-storage": {"": [{"type": "reject"}]}}}',
    ],
)
def test_a_policy_that_asks_for_more(tmp_path: Path, store: stores.Store, policy: str) -> None:
    filled(store)
    with pytest.raises(SignatureRejected):
        pull(scratch_host(tmp_path / "strict", policy=policy), reference(store))


# sharing


def test_nothing_is_copied_where_files_can_be_linked(host: HostPaths, store: stores.Store) -> None:
    filled(store)
    try:
        result = pull(host, reference(store), sharing=Sharing.REQUIRE)
    except SharingImpossible:
        pytest.skip("files can neither be cloned nor linked below the temporary directory")
    assert {str(how) for how in result.shared} <= {"reflinked", "linked", "present"}
    assert sum(count for count, _ in result.shared.values()) == 4


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
@pytest.mark.parametrize(("owner", "mode"), [(1000, 0o644), (0, 0o666), (0, 0o664)])
def test_what_others_may_write_to_is_not_linked(
    host: HostPaths, store: stores.Store, owner: int, mode: int
) -> None:
    """They could change what was verified: only fs-verity would keep them from it."""
    lower, _ = filled(store)
    path = store.diff(lower) / "usr/large"
    os.chown(path, owner, owner)
    path.chmod(mode)
    with Repository.ensure(host.repository, verity=Verity.OPPORTUNISTIC)[0] as repository:
        ways = repository.can_share(store.root / "overlay")
        secure = repository.secure
    if ways.reflink or secure:
        pytest.skip("they have no part in what is cloned, and may not write where fs-verity is")
    with pytest.raises(SharingImpossible):
        pull(host, reference(store), sharing=Sharing.REQUIRE)
    result = pull(host, reference(store))
    assert result.shared.keys() >= {How.COPIED}
    assert path.stat().st_nlink == 1
