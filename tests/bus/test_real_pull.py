"""The daemon as it is shipped, with its own confined workers, pulling a real image from a layout."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_testing import stores
from hostimage_testing.bus import Client, Daemon
from hostimage_testing.layout import Layout

SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())
ACCEPT_ANYTHING = {"default": [{"type": "insecureAcceptAnything"}]}


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted({str(parent) for file in files for parent in Path(file).parents} - {"."}):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def daemon_with_policy(real_daemon: Daemon) -> Iterator[Daemon]:
    containers = real_daemon.root / "etc/containers"
    containers.mkdir(parents=True)
    (real_daemon.root / "sysroot").mkdir()
    (containers / "policy.json").write_text(json.dumps(ACCEPT_ANYTHING))
    # The file system of a test machine may have no fs-verity.
    (real_daemon.root / "etc/hostimaged.toml").write_text('verity = "opportunistic"\n')
    return real_daemon


async def test_pull_list_and_pull_again(daemon_with_policy: Daemon, client: Client, layout: Layout) -> None:
    layers = [
        layout.layer(_tar({"usr/lib/os-release": b"ID=test\n", "usr/bin/tool": bytes(100_000)}), "gzip"),
        layout.layer(_tar({"usr/share/doc": b"x" * 5000}), "zstd"),
    ]
    descriptor = layout.image("v1", layers, labels={"org.opencontainers.image.version": "1.0"})
    await daemon_with_policy.start()
    image = f"oci:{layout.path}:v1"
    path = await client.pull(image, expect_digest=descriptor["digest"])
    assert (await client.removed(path))[3:] == ["done", "", ""]
    result = (await client.job(path))["Result"]
    assert result["manifest-digest"] == descriptor["digest"]
    assert result["changed"] is True
    phases = client.changes(path, JOB_INTERFACE, "Phase")
    assert phases[0] == "resolving"
    total = sum(layer.descriptor["size"] for layer in layers)
    assert (await client.job(path))["BytesTotal"] > total
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert document["repository"]["used"] > 0
    assert document["problems"] == []
    (row,) = document["images"]
    assert row["manifest-digest"] == descriptor["digest"]
    assert row["reference"] == image
    assert row["version"] == "1.0"
    size = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["RepositorySize"]
    assert size == [document["repository"]["used"], 0]
    again = await client.pull(image)
    assert (await client.removed(again))[3] == "done"
    job = await client.job(again)
    assert job["Result"]["changed"] is False
    assert job["Progress"] == 1.0


async def test_a_store_is_shared_as_asked(daemon_with_policy: Daemon, client: Client, tmp_path: Path) -> None:
    """Each way in a repository of its own: what is there already is not imported again."""
    store = stores.Store(tmp_path / "store")
    tar = _tar({"usr/lib/os-release": b"ID=test\n", "usr/bin/tool": b"tool" * 30_000})
    store.image("localhost/os:v1", layers=[store.layer(tar)])
    image = f"containers-storage:[overlay@{store.root}]localhost/os:v1"
    await daemon_with_policy.start()
    found = {}
    for sharing in ("copy", "auto"):
        path = await client.pull(image, sharing=sharing)
        assert (await client.removed(path))[3:] == ["done", "", ""]
        result = (await client.job(path))["Result"]
        found[sharing] = {
            how: (result[f"objects-{how}"], result[f"bytes-{how}"])
            for how in ("reflinked", "linked", "copied")
        }
        shutil.rmtree(daemon_with_policy.root / "sysroot/composefs")
    nothing, file = (0, 0), (1, 120_000)
    assert found["copy"] == {"reflinked": nothing, "linked": nothing, "copied": file}
    assert sorted(found["auto"].values()) == [nothing, nothing, file]
    required = await client.removed(await client.pull(image, sharing="require"))
    # Where the temporary directory is decides.
    if found["auto"]["copied"] == nothing:
        assert required[3:5] == ["done", ""]
    else:
        assert required[3:5] == ["failed", ErrorName.NOT_SUPPORTED]
        assert not list((daemon_with_policy.root / "sysroot/composefs/streams").glob("oci-*"))


async def test_an_image_that_did_not_start_is_not_fetched_again_by_itself(
    daemon_with_policy: Daemon, client: Client, layout: Layout
) -> None:
    descriptor = layout.image("v1", [layout.layer(_tar({"usr/a": b"1" * 1000}))])
    state = daemon_with_policy.root / "sysroot/state/hostimaged"
    state.mkdir(parents=True)
    row = {"deployment": "a" * 128, "manifest-digest": descriptor["digest"], "time": 1}
    (state / "failed-boots.json").write_text(json.dumps({"version": 1, "deployments": [row]}))
    await daemon_with_policy.start()
    image = f"oci:{layout.path}:v1"
    refused = await client.removed(await client.pull(image))
    assert refused[3:5] == ["failed", ErrorName.PRECONDITION_FAILED]
    assert descriptor["digest"] in refused[5]
    assert not list((daemon_with_policy.root / "sysroot/composefs").glob("streams/oci-*"))
    wanted = await client.pull(image, **{"retry-failed": True})
    assert (await client.removed(wanted))[3:] == ["done", "", ""]
    assert (await client.removed(await client.pull(image)))[3] == "done", (
        "of what is there nothing is fetched"
    )


async def test_failure_of_the_real_worker_has_its_name(
    daemon_with_policy: Daemon, client: Client, layout: Layout
) -> None:
    await daemon_with_policy.start()
    result = await client.removed(await client.pull(f"oci:{layout.path}:missing"))
    assert result[3:5] == ["failed", ErrorName.IMAGE_NOT_FOUND]
    descriptor = layout.image("v1", [layout.layer(_tar({"usr/a": b"1"}))])
    wrong = await client.pull(f"oci:{layout.path}:v1", expect_digest="sha256:" + "0" * 64)
    assert (await client.removed(wrong))[3:5] == ["failed", ErrorName.PRECONDITION_FAILED]
    blob = layout.blob_path(descriptor["digest"])
    blob.write_bytes(blob.read_bytes().replace(b"layers", b"Layers"))
    broken = await client.pull(f"oci:{layout.path}:v1")
    assert (await client.removed(broken))[3:5] == ["failed", ErrorName.DIGEST_MISMATCH]
    assert (await client.status())["images"] == []


async def test_a_damaged_repository_is_a_problem_and_the_daemon_serves(
    daemon_with_policy: Daemon, client: Client
) -> None:
    repository = daemon_with_policy.root / "sysroot/composefs"
    repository.mkdir()
    (repository / "meta.json").write_text("{")
    await daemon_with_policy.start()
    await client.until(lambda: client.changes(ROOT_PATH, MANAGER_INTERFACE, "Problems"))
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert document["repository"] is None
    assert [p["severity"] for p in document["problems"]] == ["error"]
