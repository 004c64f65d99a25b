"""What stays in a store, on random stores and needs, against a naive model of it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hostimage_testing import stores, tars
from hostimaged.host.storekeep import GRACE, Wanted, decide
from hostimaged.oci.storage.contents import Contents
from hostimaged.oci.storage.names import StoreName
from hostimaged.oci.storage.store import Store

DIGESTS = [f"sha256:{digit * 64}" for digit in "abc"]
NAMES = ["localhost/x:latest", "docker.io/library/x:latest", "quay.io/o/x:1", "quay.io/o/x:latest"]
#: Which names of a store each of them may mean.
MEANT: dict[str, set[str]] = {
    "localhost/x": {"localhost/x:latest"},
    "x": {"localhost/x:latest", "docker.io/library/x:latest", "quay.io/o/x:latest"},
    "docker.io/x": {"docker.io/library/x:latest"},
    "quay.io/o/x:1": {"quay.io/o/x:1"},
    "quay.io/o/x": {"quay.io/o/x:latest"},
    "o/x:1": {"quay.io/o/x:1"},
    f"quay.io/o/x@{DIGESTS[0]}": set(),
}
WRITTEN = sorted(MEANT)
LAYER = tars.directory(b"usr") + tars.file(b"usr/file", b"content " * 1000) + tars.END


@dataclass
class Made:
    """An image of the model: an index into the store's, its names and manifest, and what is true of it."""

    names: list[str]
    digests: list[str] = field(default_factory=list)
    layers: int = 1
    old: bool = True
    known: bool = False
    in_use: bool = False


IMAGES = st.lists(
    st.builds(
        Made,
        st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
        st.lists(st.sampled_from(DIGESTS), unique=True, max_size=2),
        st.integers(1, 3),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=5,
)


def fill(root: Path, images: list[Made]) -> list[str]:
    """Write the store; gives the ids of the images. The layers of one are the lowest of the next."""
    store = stores.Store(root)
    layers: list[str] = []
    for at in range(3):
        layers.append(store.layer(LAYER + bytes(512 * at), reversed(layers)))
    ids = []
    for at, image in enumerate(images):
        own = store.layer(LAYER + bytes(512 * (at + 9)), reversed(layers[: image.layers]))
        identifier = store.image(*image.names, layers=[*layers[: image.layers], own])
        store.images[-1]["big-data-names"] += [f"manifest-{digest}" for digest in image.digests]
        ids.append(identifier)
        if image.old:
            then = time.time() - 2 * GRACE
            os.utime(root / "overlay-images" / identifier, (then, then))
    store.containers([ids[at] for at, image in enumerate(images) if image.in_use])
    return ids


@given(
    IMAGES,
    st.sets(st.sampled_from(WRITTEN)),
    st.sets(st.sampled_from(DIGESTS)),
    st.sets(st.integers(0, 4)),
    st.booleans(),
)
def test_agrees_with_a_naive_model(
    images: list[Made], names: set[str], digests: set[str], by_id: set[int], doubt: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "store"
        ids = fill(root, images)
        wanted = Wanted()
        for name in sorted(names):
            wanted.add_name(StoreName.parse(name), f"named {name}")
        for digest in sorted(digests):
            wanted.add_digest(digest, "digest")
        for at in by_id & set(range(len(ids))):
            wanted.add_id(ids[at], "id")
        known = frozenset(ids[at] for at, image in enumerate(images) if image.known)
        doubts = ("in doubt",) if doubt else ()
        with Store.open(root) as store:
            plan = decide(Contents.read(store), wanted, doubts, known, int(time.time()))
        meant = union(*(MEANT[name] for name in names))
        all_digests = digests | {DIGESTS[0]} if any("@" in name for name in names) else digests
        needed = {
            identifier
            for at, (identifier, image) in enumerate(zip(ids, images, strict=True))
            if meant & set(image.names) or all_digests & set(image.digests) or at in by_id
        }
        staying = needed | {
            identifier
            for identifier, image in zip(ids, images, strict=True)
            if image.in_use or not (image.old or image.known)
        }
        assert plan.needed == needed
        assert {image.id for image, _ in plan.stay} == staying
        assert all(reasons for _, reasons in plan.stay)
        gone = set() if doubt else set(ids) - staying
        assert {image.id for image in plan.gone} == gone
        assert plan.freed == _removed(root, set(ids) - gone, gone)


def union(*sets: set[str]) -> set[str]:
    return set[str]().union(*sets)


def _removed(root: Path, staying: set[str], gone: set[str]) -> int:
    """Bytes in the blocks of what no image needs any more."""
    layers = json.loads((root / "overlay-layers/layers.json").read_text())
    images = json.loads((root / "overlay-images/images.json").read_text())
    parent = {layer["id"]: layer.get("parent", "") for layer in layers}

    def chain(image: dict[str, str]) -> set[str]:
        found: set[str] = set()
        at = image["layer"]
        while at:
            found.add(at)
            at = parent[at]
        return found

    kept = union(*(chain(image) for image in images if image["id"] in staying))
    dead = union(*(chain(image) for image in images if image["id"] in gone)) - kept
    places = [root / "overlay" / layer for layer in dead]
    places += [root / "overlay-images" / image for image in gone]
    return sum(path.lstat().st_blocks * 512 for place in places for path in (place, *place.rglob("*")))
