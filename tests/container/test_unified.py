"""Unified storage on Debian 13: its podman, started by the confined service, and by a person afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.container import PROGRAMS, Container
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.runnable import runnable_root
from hostimage_testing.tools import require

STORE = "/sysroot/composefs/bootc/storage"
#: A layout, and a registry in the container, which has a loopback of its own.
REGISTRY = "127.0.0.1:5000"
LAYOUT = "/srv/runnable"
SOURCES = {
    "files": f"oci:{LAYOUT}:latest",
    # Where podman keeps its own, and where a desktop mounts a stick; behind a link.
    "stick": "oci:/run/stick:latest",
    "registry": f"docker://{REGISTRY}/runnable:latest",
}
_REGISTRY_CONFIG = f"""\
version: 0.1
storage: {{filesystem: {{rootdirectory: /var/tmp/registry}}}}
http: {{addr: {REGISTRY}}}
"""
_INSECURE = f'[[registry]]\nlocation = "{REGISTRY}"\ninsecure = true\n'
#: podman as any administrator calls it, with the store of the host beside its own.
PODMAN = (
    "podman", "--root=/var/tmp/own", "--runroot=/run/own", "--storage-driver=overlay",
    f"--storage-opt=additionalimagestore={STORE}",
)  # fmt: skip
#: As a collection removes images, which it does on hosts with deployments only.
_REMOVE = """
import sys
from hostimaged.oci.storage import owned
from hostimaged.system.paths import HostPaths
from hostimaged.system.workdir import private_directory
paths = HostPaths.live()
with private_directory(paths.temporary, "test-") as work, owned.podman(paths, work, lambda: None) as podman:
    podman.tag(sys.argv[1], "localhost/another:name")
    podman.untag(sys.argv[1], "localhost/another:name")
    podman.remove(sys.argv[1:])
"""
RUN = ("run", "--rm", "--pull=never", "--network=none", "--cgroups=disabled")


@pytest.fixture
def offered(container: Container) -> Iterator[Layout]:
    """A layout without images, and a registry."""
    root = container.root
    layout = Layout(root / LAYOUT.lstrip("/"))
    shutil.copy(require("docker-registry"), root / PROGRAMS.lstrip("/"))
    (root / "srv/registry.yml").write_text(_REGISTRY_CONFIG)
    (root / "etc/containers/registries.conf.d/test.conf").write_text(_INSECURE)
    serve = [f"{PROGRAMS}/docker-registry", "serve", "/srv/registry.yml"]
    container.run("systemd-run", "--quiet", "--collect", "--unit=registry", *serve)
    yield layout
    container.run("systemctl", "stop", "registry.service")
    for path in ("srv/runnable", "var/tmp/registry", "var/tmp/own"):
        shutil.rmtree(root / path, ignore_errors=True)


def offer(container: Container, layout: Layout, source: str, os_release: str) -> None:
    """Let ``source`` be an image with a shell and this /etc/os-release."""
    device = tars.directory(b"dev") + tars.header(b"dev/console", 0, b"3", device=(5, 1)) + tars.END
    layout.image("latest", [layout.layer(runnable_root(os_release.encode()), "gzip"), layout.layer(device)])
    if source == "stick":
        container.run("mkdir", "-p", "/run/media/bob")
        container.run("cp", "-rT", LAYOUT, "/run/media/bob/stick")
        container.run("ln", "-sfn", "media/bob/stick", "/run/stick")
    if source == "registry":
        to = ["--dest-tls-verify=false", SOURCES["files"], SOURCES["registry"]]
        # The registry may just be starting.
        container.run("skopeo", "copy", "--quiet", "--retry-times=5", *to)


def result(container: Container, *command: str) -> dict[str, Any]:
    """What a job of root gives."""
    done = container.run("hostimagectl", "--json", *command, limit=300)
    found: dict[str, Any] = json.loads(done.out)["result"]
    return found


def stored(container: Container) -> set[str]:
    """Ids of the images of the store, as podman sees them."""
    return {image["Id"] for image in json.loads(container.run(*PODMAN, "images", "--format=json").out)}


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_is_pulled_once_runs_and_goes(
    container: Container, offered: Layout, cfsctl: str, source: str
) -> None:
    judge = Judge(cfsctl, Path(container.root) / "sysroot/composefs")
    ids = []
    for os_release in (f"ID=first-of-{source}\n", f"ID=second-of-{source}\n"):
        offer(container, offered, source, os_release)
        pulled = result(container, "pull", "--unified", SOURCES[source])
        assert pulled["unified"]
        assert not pulled.get("objects-copied")
        judge.check()
        ids.append(pulled["image-id"])
        assert ids[-1] in stored(container)
        ran = container.run(*PODMAN, *RUN, pulled["stored-as"], "/bin/cat", "/etc/os-release")
        assert ran.out == os_release
    container.run("python3", "-c", _REMOVE, *ids)
    assert not stored(container) & set(ids)
    judge.check()
