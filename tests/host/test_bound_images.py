"""Bound images come before what is bound to them: fetched from a real registry, or nothing is staged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hostimage_testing.disk import Crash
from hostimage_testing.host import ACCEPT_ANYTHING
from hostimage_testing.hosts import RecordedHost
from hostimage_testing.layout import Layout
from hostimage_testing.lives import Life, installed
from hostimage_testing.operating import At, session
from hostimage_testing.os_images import OsImage, Recipe
from hostimage_testing.owned_stores import names, stored
from hostimage_testing.registry import Registry
from hostimage_testing.samples import copy, three_layers
from hostimage_testing.tools import require
from hostimaged.errors import HostimageError, ImageNotFound, NetworkError, ProgramMissing
from hostimaged.host import boundimages, boundstore, commands
from hostimaged.host.collect import collect
from hostimaged.host.imgref import OriginReference
from hostimaged.host.stage import StageRequest, stage
from hostimaged.host.status import scan
from hostimaged.ids import DeploymentId, ManifestDigest
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Reporter, Silent
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts of its own need root"),
    pytest.mark.timeout(600),
]
Recorded = Callable[..., Life]


@pytest.fixture(autouse=True)
def podman_program() -> str:
    return require("podman")


@pytest.fixture
def app(tmp_path: Path, registry: Registry, skopeo: str) -> str:
    """An image in the registry; gives its name."""
    layout = Layout(tmp_path / "app")
    three_layers(layout)
    name = f"{registry.host}/app{os.getpid()}:1"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{name}", "--preserve-digests")
    return name


def reachable(host: RecordedHost, registry: Registry) -> None:
    (host.root / "etc/containers/registries.conf").write_text(registry.registries_conf)


def new_image(host: RecordedHost, *bound: str) -> OsImage:
    return host.image(Recipe(version="9", kernel=b"kernel nine ", bound=bound))


def staged(
    host: RecordedHost, image: OsImage, *, fetched: bool = False, reporter: Reporter | None = None
) -> dict[str, object]:
    request = StageRequest(
        ManifestDigest(image.manifest_digest),
        OriginReference.of(ImageReference.parse(image.recipe.reference)),
        bound_fetched=fetched,
    )
    with session(host, reporter) as opened:
        return stage(opened, request)


def fetch(host: RecordedHost, image: OsImage, reporter: Reporter | None = None) -> dict[str, object]:
    paths = HostPaths.scratch(host.root)
    with session(host) as opened:
        bound = boundimages.of_deployment(opened.repository, DeploymentId(image.id))
    return boundstore.fetch(paths, bound, reporter or Silent())


def nothing_staged(host: RecordedHost) -> None:
    assert not host.marker.exists()
    assert not host.entries_staged.exists()
    assert not list((host.sysroot / "state/hostimaged").glob("transaction*"))


def test_not_there_not_staged_then_fetched_and_staged(
    recorded: Recorded, registry: Registry, app: str
) -> None:
    host = recorded(installed).host
    reachable(host, registry)
    image = new_image(host, app)
    found = staged(host, image)
    assert found["result"] == "bound-missing"
    assert found["deployment"] == image.id
    nothing_staged(host)
    with pytest.raises(ImageNotFound, match="which was fetched, and is gone again"):
        staged(host, image, fetched=True)
    nothing_staged(host)
    assert fetch(host, image) == {"bound-fetched": [app]}
    assert names(host) == {app}
    done = staged(host, image, fetched=True)
    assert done["result"] == "staged"
    assert done["bound-images"] == [app]
    # What is there is not fetched again, and is known to be there.
    assert fetch(host, image) == {}
    status = scan(HostPaths.scratch(host.root))
    (row,) = [row for row in status["deployments"] if row["staged"]]
    assert row["bound-images"] == [{"image": app, "present": True}]
    with session(host) as opened:
        collect(opened)
    assert names(host) == {app}


def test_what_is_there_already_is_not_asked_for(recorded: Recorded, registry: Registry, app: str) -> None:
    host = recorded(installed).host
    reachable(host, registry)
    fetch(host, new_image(host, app))
    (host.root / "etc/containers/registries.conf").write_text("")
    again = host.image(Recipe(version="10", kernel=b"kernel ten ", bound=(app,)))
    assert staged(host, again)["result"] == "staged"


def test_staged_without_them_they_are_fetched_when_it_is_staged_again(
    recorded: Recorded, registry: Registry, app: str
) -> None:
    """As bootc does on such hosts, which fetches none."""
    host = recorded(installed).host
    reachable(host, registry)
    image = new_image(host, app)
    fetch(host, image)
    assert staged(host, image)["result"] == "staged"
    shutil.rmtree(host.repository / "bootc")
    paths = HostPaths.scratch(host.root)
    (row,) = [row for row in scan(paths)["deployments"] if row["staged"]]
    assert row["bound-images"] == [{"image": app, "present": False}]
    assert staged(host, image)["result"] == "bound-missing"
    assert host.marker.exists()
    fetch(host, image)
    assert staged(host, image, fetched=True)["result"] == "already-staged"


def test_failures_name_the_image_and_leave_nothing(
    recorded: Recorded, registry: Registry, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = recorded(installed).host
    reachable(host, registry)
    missing = f"{registry.host}/no-such-image:1"
    image = new_image(host, app, missing)
    assert staged(host, image)["result"] == "bound-missing"
    with pytest.raises(HostimageError, match="no-such-image") as raised:
        fetch(host, image)
    assert isinstance(raised.value, ImageNotFound | NetworkError)
    # The one before it came, and need not come again.
    assert names(host) == {app}
    nothing_staged(host)
    assert staged(host, image)["result"] == "bound-missing"
    monkeypatch.setenv("PATH", str(host.root / "empty"))
    with pytest.raises(ProgramMissing, match=r"podman is needed .*it would fetch .*such-image"):
        fetch(host, image)


def test_without_podman_no_store_is_made(
    recorded: Recorded, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = recorded(installed).host
    image = new_image(host, app)
    monkeypatch.setenv("PATH", str(host.root / "empty"))
    with pytest.raises(ProgramMissing):
        fetch(host, image)
    assert not (host.repository / "bootc").exists()
    nothing_staged(host)


def test_by_digest(recorded: Recorded, registry: Registry, app: str) -> None:
    host = recorded(installed).host
    reachable(host, registry)
    fetch(host, new_image(host, app))
    (image,) = stored(host).values()
    repository = app.rpartition(":")[0]
    by_digest = f"{repository}@{image.digest}"
    # Under its tag it is there with that digest.
    again = host.image(Recipe(version="10", kernel=b"kernel ten ", bound=(by_digest,)))
    assert staged(host, again)["result"] == "staged"
    shutil.rmtree(host.repository / "bootc")
    assert fetch(host, again) == {"bound-fetched": [by_digest]}
    with session(host) as opened:
        collect(opened)
    assert len(stored(host)) == 1


def test_a_unit_that_names_no_image_is_told_and_nothing_is_staged(recorded: Recorded) -> None:
    host = recorded(installed).host
    image = new_image(host, "quay.io/%i")
    with pytest.raises(HostimageError, match=r"/usr/lib/bootc/bound-images\.d/app0\.container: specifiers"):
        staged(host, image)
    nothing_staged(host)


def test_killed_at_every_step_it_is_fetched_the_next_time(
    recorded: Recorded, registry: Registry, app: str
) -> None:
    host = recorded(installed).host
    reachable(host, registry)
    image = new_image(host, app)
    staged(host, image)
    counted = At(-1)
    fetch(host, image, counted)
    steps = [point for point in counted.points if point not in ("bound.podman", "store.waiting")]
    assert steps == ["store.directory", "store.initialized", "store.made", "store.link", "bound.fetched"]
    for step in steps:
        shutil.rmtree(host.repository / "bootc")
        with pytest.raises(Crash):
            fetch(host, image, _AtPoint(step))
        assert names(host) <= {app}
        fetch(host, image)
        assert names(host) == {app}
    record = json.loads((host.sysroot / "state/hostimaged/store.json").read_text())
    assert record["images"] == sorted(stored(host))


class _AtPoint(Silent):
    """A process that is gone at a step."""

    def __init__(self, point: str) -> None:
        self._point = point

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point == self._point:
            raise Crash


def deploy_main(host: RecordedHost, image: OsImage, *arguments: str) -> int:
    return commands.deploy_main(
        [image.source, "--root", str(host.root), "--verity", "opportunistic", *arguments]
    )


def test_the_first_deployment_brings_them_along(
    make: Callable[..., RecordedHost], registry: Registry, app: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host = make()
    image = new_image(host, app)
    (host.root / "etc").unlink(missing_ok=True)
    containers = host.root / "etc/containers"
    containers.mkdir(parents=True)
    (containers / "policy.json").write_text(ACCEPT_ANYTHING)
    # Without them nothing is deployed.
    assert deploy_main(host, image) != 0
    assert app in capsys.readouterr().err
    assert not list(host.entries.glob("*"))
    assert not host.state(image.id).exists()
    (containers / "registries.conf").write_text(registry.registries_conf)
    assert deploy_main(host, image) == 0
    assert names(host) == {app}
    assert host.state(image.id).is_dir()
    assert os.readlink(host.sysroot / "ostree/bootc") == "../composefs/bootc"


def test_the_first_deployment_may_leave_them_out(make: Callable[..., RecordedHost], app: str) -> None:
    host = make()
    image = new_image(host, app)
    (host.root / "etc").unlink(missing_ok=True)
    (host.root / "etc/containers").mkdir(parents=True)
    (host.root / "etc/containers/policy.json").write_text(ACCEPT_ANYTHING)
    assert deploy_main(host, image, "--bound-images", "skip") == 0
    assert not (host.repository / "bootc").exists()


def test_the_store_of_the_first_deployment_has_labels(
    make: Callable[..., RecordedHost], registry: Registry, app: str
) -> None:
    host = make()
    contexts = b"/var/lib/containers/storage(/.*)? system_u:object_r:container_var_lib_t:s0\n"
    policy = {
        "selinux/config": b"SELINUX=enforcing\nSELINUXTYPE=targeted\n",
        "selinux/targeted/contexts/files/file_contexts": contexts,
    }
    image = host.image(Recipe(version="9", bound=(app,), etc=policy))
    (host.root / "etc").unlink(missing_ok=True)
    containers = host.root / "etc/containers"
    containers.mkdir(parents=True)
    (containers / "policy.json").write_text(ACCEPT_ANYTHING)
    (containers / "registries.conf").write_text(registry.registries_conf)
    assert deploy_main(host, image) == 0
    store = HostPaths.scratch(host.root).store
    assert (store / ".bootc_labeled").exists()
    for path in (store, store / "overlay-images/images.json", *store.glob("overlay/*/diff")):
        assert os.getxattr(path, "security.selinux").startswith(b"system_u:object_r:container_var_lib_t:s0")


def test_units_that_nobody_understands_are_a_problem_of_the_deployment(recorded: Recorded) -> None:
    host = recorded(installed).host
    odd = host.deploy(host.image(Recipe(version="9", bound=("quay.io/%i",))))
    host.live(odd)
    host.booted(odd)
    (row,) = [row for row in scan(HostPaths.scratch(host.root))["deployments"] if row["booted"]]
    assert row["bound-images"] == []
    (problem,) = [problem for problem in row["problems"] if problem["id"] == "bound-images"]
    assert "app0.container: specifiers (%) are not supported" in problem["text"]
