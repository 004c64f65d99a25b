"""hostimagectl and the daemon as shipped: real images, good and bad, from a layout to the repository."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_testing.bus import Bus, Daemon
from hostimage_testing.host import scratch_host
from hostimage_testing.hostimagectl import Hostimagectl, run
from hostimage_testing.layout import LAYER_TYPE, Layer, Layout

REJECT = '{"default": [{"type": "reject"}]}'
MISMATCH = EXIT_CODES[ErrorName.DIGEST_MISMATCH]


def make_tar(seed: str) -> bytes:
    """A layer's tar: a few directories, and a file too large to be stored inline."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("usr", "usr/lib"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        data = seed.encode() * 50_000
        entry = tarfile.TarInfo(f"usr/lib/{seed}")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def good(layout: Layout) -> dict[str, Any]:
    layers = [layout.layer(make_tar("one")), layout.layer(make_tar("two"), "zstd")]
    return layout.image("good", layers, labels={"org.opencontainers.image.version": "7"})


def names(daemon: Daemon) -> set[str]:
    """Everything that has a name in the repository: streams, images and references."""
    repository = daemon.root / "sysroot/composefs"
    return {
        str(path.relative_to(repository))
        for part in ("streams", "images")
        for path in (repository / part).rglob("*")
        if path.is_symlink()
    }


async def pull(bus: Bus, layout: Layout, tag: str, *options: str) -> Hostimagectl:
    return await run(bus, "pull", f"oci:{layout.path}:{tag}", *options)


async def test_pull_list_and_pull_again(real_daemon: Daemon, bus: Bus, layout: Layout, good: Any) -> None:
    scratch_host(real_daemon.root)
    await real_daemon.start()
    first = await pull(bus, layout, "good", "--json", "--expect-digest", good["digest"])
    assert first.code == 0, first.err
    document = json.loads(first.out)
    assert document["result"]["manifest-digest"] == document["result"]["source-digest"] == good["digest"]
    assert document["result"]["changed"] is True
    assert document["result"]["version"] == "7"
    assert document["job"]["bytesDone"] == document["job"]["bytesTotal"] > 0

    (row,) = json.loads((await run(bus, "images", "--json")).out)["images"]
    assert row["manifest-digest"] == good["digest"]
    assert row["reference"] == f"oci:{layout.path}:good"
    assert (row["version"], row["deployed"], row["problem"]) == ("7", False, None)

    before = names(real_daemon)
    again = await pull(bus, layout, "good")
    assert again.code == 0
    assert again.out.startswith("nothing to do, already there: ")
    assert names(real_daemon) == before
    assert (await pull(bus, layout, "good", "-q")).out == good["digest"] + "\n"


def flip_a_bit(layout: Layout) -> int:
    layer = layout.layer(make_tar("bad"), "none")
    layout.image("bad", [layer])
    path = layout.blob_path(layer.descriptor["digest"])
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    return MISMATCH


def lie_about_the_diff_id(layout: Layout) -> int:
    layer = layout.layer(make_tar("bad"))
    layout.image("bad", [replace(layer, diff_id="sha256:" + "0" * 64)])
    return MISMATCH


def cut_the_gzip_short(layout: Layout) -> int:
    data = gzip.compress(make_tar("bad"))[:-20]
    descriptor = layout.blob(data, LAYER_TYPE + "+gzip")
    layout.image("bad", [Layer(descriptor, layout.layer(make_tar("bad")).diff_id)])
    return EXIT_CODES[ErrorName.UNSUPPORTED_IMAGE]


def lose_a_blob(layout: Layout) -> int:
    layer = layout.layer(make_tar("bad"))
    layout.image("bad", [layer])
    layout.blob_path(layer.descriptor["digest"]).unlink()
    return EXIT_CODES[ErrorName.IMAGE_NOT_FOUND]


@pytest.mark.parametrize("spoil", [flip_a_bit, lie_about_the_diff_id, cut_the_gzip_short, lose_a_blob])
async def test_a_bad_image_leaves_no_name_and_the_next_pull_works(
    real_daemon: Daemon, bus: Bus, layout: Layout, good: Any, spoil: Any
) -> None:
    scratch_host(real_daemon.root)
    code = spoil(layout)
    await real_daemon.start()
    bad = await pull(bus, layout, "bad")
    assert (bad.code, bad.out) == (code, "")
    assert "hostimagectl: " in bad.err
    assert names(real_daemon) == set()
    assert (await run(bus, "images", "-q")).out == ""
    assert "failed" in (await run(bus, "status")).out
    assert (await pull(bus, layout, "good")).code == 0


async def test_an_unexpected_digest(real_daemon: Daemon, bus: Bus, layout: Layout, good: Any) -> None:
    scratch_host(real_daemon.root)
    await real_daemon.start()
    other = "sha256:" + "1" * 64
    done = await pull(bus, layout, "good", "--json", "-q", "--expect-digest", other)
    assert done.code == EXIT_CODES[ErrorName.PRECONDITION_FAILED]
    document = json.loads(done.out)
    assert document["error"]["name"] == ErrorName.PRECONDITION_FAILED
    assert other in document["error"]["message"]
    assert good["digest"] in document["error"]["message"]
    assert names(real_daemon) == set()


@pytest.mark.parametrize("policy", [REJECT, None])
async def test_a_policy_that_does_not_accept(
    real_daemon: Daemon, bus: Bus, layout: Layout, good: Any, policy: str | None
) -> None:
    scratch_host(real_daemon.root, policy=policy or "")
    if policy is None:
        (real_daemon.root / "etc/containers/policy.json").unlink()
    await real_daemon.start()
    done = await pull(bus, layout, "good")
    assert done.code == EXIT_CODES[ErrorName.SIGNATURE_REJECTED]
    assert "hint: /etc/containers/policy.json decides" in done.err
