"""Collecting the store that bootc owns: what deployments need stays, in whatever form they name it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bootc_model import Bootc

from hostimage_testing.collecting import DAY, age, collected, told
from hostimage_testing.disk import Crash
from hostimage_testing.hosts import Deployment, RecordedHost
from hostimage_testing.layout import Layout
from hostimage_testing.lives import Life, installed, staged, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import Recipe
from hostimage_testing.owned_stores import age_images, names, podman_on, put, put_os, stored
from hostimage_testing.registry import Registry
from hostimage_testing.samples import copy, three_layers
from hostimage_testing.tools import require
from hostimaged.errors import Cancelled
from hostimaged.host import reorder
from hostimaged.host.collect import collect
from hostimaged.host.collectplan import Rules
from hostimaged.host.explain import Question, explain
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts of its own need root"),
    pytest.mark.timeout(600),
]
Recorded = Callable[..., Life]
GONE = "localhost/gone:latest"


@pytest.fixture(autouse=True)
def podman_program() -> str:
    return require("podman")


def follow(host: RecordedHost, deployment: Deployment, reference: str) -> None:
    host.write_origin(deployment, reference=f"ostree-unverified-image:{reference}")


def bound_host(host: RecordedHost) -> Life:
    """The booted deployment is bound to two images, the one before to another."""
    old = host.deploy(host.image(Recipe(version="1", bound=("quay.io/org/before:1",))))
    new = host.deploy(
        host.image(
            Recipe(version="2", kernel=b"kernel two ", bound=("localhost/app", "docker.io/busybox:stable"))
        )
    )
    host.live(new, old)
    host.booted(new)
    return Life(host, new, rollback=old)


def test_r22_superseded_go_and_live_stay_in_any_form(recorded: Recorded) -> None:
    life = recorded(staged)
    host = life.host
    assert life.rollback is not None
    assert life.staged is not None
    follow(host, life.booted, "docker://localhost/os")
    follow(host, life.rollback, "registry:os.example/os:1@sha256:" + "7" * 64)
    follow(host, life.staged, "containers-storage:localhost/built")
    with podman_on(host) as podman:
        put(podman, "localhost/os:latest")
        put(podman, "localhost/built:latest")
        put(podman, GONE)
        put(podman, "localhost/os:other", "docker.io/library/gone:2", "quay.io/gone/too:3")
        untagged = put_os(podman, life.booted.image)
        # One of several names is enough.
        put(podman, "quay.io/some/thing:1", "localhost/os:older")
        nameless = put(podman, "localhost/nameless:1")
        podman.run(["untag", nameless])
    age_images(host)
    before = stored(host)
    done = collected(host)
    after = stored(host)
    assert names(host) == {"localhost/os:latest", "localhost/built:latest"}
    assert untagged in after
    assert nameless not in after
    assert len(done["store-images"]) == 4 == len(before) - len(after)
    assert collected(host)["result"] == "nothing"


def test_r22_bound_images_of_every_deployment_stay(recorded: Recorded) -> None:
    life = recorded(bound_host)
    host = life.host
    with podman_on(host) as podman:
        wanted = {"localhost/app:latest", "docker.io/library/busybox:stable", "quay.io/org/before:1"}
        for name in (*sorted(wanted), "quay.io/org/before:2", GONE):
            put(podman, name)
    age_images(host)
    done = collected(host)
    assert names(host) == wanted
    assert [text.split()[0] for text in done["store-images"]] == ["quay.io/org/before:2", GONE]
    # It goes with the deployment that needs it, as new as it is.
    for place in (HostPaths.scratch(host.root).store / "overlay-images").iterdir():
        os.utime(place)
    assert life.rollback is not None
    with session(host) as opened:
        reorder.delete(opened, DeploymentId(life.rollback.id))
    collected(host)
    # bootc may have made the tag for a deployment that is to come.
    assert names(host) == wanted
    age(host.tag(life.rollback.image), 2 * DAY)
    collected(host)
    assert names(host) == wanted - {"quay.io/org/before:1"}


def test_r22_the_image_before_loses_its_name_and_stays_as_long_as_its_deployment(recorded: Recorded) -> None:
    life = recorded(upgraded)
    host = life.host
    assert life.rollback is not None
    with podman_on(host) as podman:
        old = put_os(podman, life.rollback.image, "registry.example/os:stable")
        new = put_os(podman, life.booted.image, "registry.example/os:stable")
    assert stored(host)[old].names == ()
    age_images(host)
    assert "store-images" not in collected(host)
    with session(host) as opened:
        reorder.delete(opened, DeploymentId(life.rollback.id))
    age(host.tag(life.rollback.image), 2 * DAY)
    # It was needed, so that nobody is about to need it: it goes, as new as it is.
    os.utime(HostPaths.scratch(host.root).store / "overlay-images" / old)
    done = collected(host)
    assert done["store-images"] == [f"({old[:12]})"]
    assert done["result"] == "collected"
    assert set(stored(host)) == {new}


@pytest.mark.parametrize("form", ["{}@{}", "{}:1@{}"])
def test_r22_digested_references_keep_what_they_mean(
    recorded: Recorded, registry: Registry, skopeo: str, tmp_path: Path, form: str
) -> None:
    """Pulled by digest or by tag: the name of the repository and the digest of the manifest tell."""
    layout = Layout(tmp_path / "os")
    three_layers(layout)
    (digest,) = {entry["digest"] for entry in layout.manifests}
    repository = f"{registry.host}/digested"
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{repository}:1", "--preserve-digests")
    life = recorded(installed)
    host = life.host
    (host.root / "etc/containers/registries.conf").write_text(registry.registries_conf)
    follow(host, life.booted, f"docker://{form.format(repository, digest)}")
    for pulled in (f"{repository}:1", f"{repository}@{digest}"):
        with podman_on(host) as podman:
            podman.run(["pull", "--quiet", pulled])
            put(podman, GONE)
        age_images(host)
        collected(host)
        assert GONE not in names(host)
        (image,) = stored(host).values()
        assert digest in image.digests
        with podman_on(host) as podman:
            podman.run(["untag", image.id])
        age_images(host)
        # Nor does it need a name.
        assert "store-images" not in collected(host)
        shutil.rmtree(host.repository / "bootc")


def test_bootcs_collector_removes_the_same_where_it_is_right(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(upgraded)
    host = life.host
    with podman_on(host) as podman:
        put(podman, "registry.example/os:stable")
        gone = {put(podman, GONE), put(podman, "localhost/gone:2")}
    age_images(host)
    bootc = Bootc(host.root, cfsctl, host.images)
    assert set(bootc.gc().stored) == gone
    collected(host)
    assert names(host) == {"registry.example/os:stable"}
    assert bootc.gc().stored == ()


def test_bootcs_collector_removes_more_where_it_is_wrong(recorded: Recorded, cfsctl: str) -> None:
    """Bound images, and those whose names are written otherwise (operations.md 7.2 D)."""
    life = recorded(bound_host)
    host = life.host
    follow(host, life.booted, "docker://localhost/os")
    with podman_on(host) as podman:
        exact = put(podman, "registry.example/os:stable")
        wrong = {put(podman, "localhost/app:latest"), put(podman, "localhost/os:latest")}
    age_images(host)
    assert "store-images" not in collected(host)
    assert set(stored(host)) == wrong | {exact}
    assert set(Bootc(host.root, cfsctl, host.images).gc().stored) == wrong


def test_new_images_wait_for_a_day(recorded: Recorded) -> None:
    """bootc fetches before it deploys."""
    host = recorded(installed).host
    with podman_on(host) as podman:
        put(podman, GONE)
    assert "store-images" not in collected(host)
    assert names(host) == {GONE}
    age_images(host)
    collected(host)
    assert names(host) == set()


def test_bytes_are_those_that_are_freed(recorded: Recorded) -> None:
    host = recorded(installed).host
    with podman_on(host) as podman:
        first = put(podman, GONE, content=os.urandom(1 << 20))
        put(podman, "localhost/os:stable", content=os.urandom(1 << 20))
        podman.tag(first, "localhost/gone:2")
    age_images(host)
    store = HostPaths.scratch(host.root).store

    def blocks() -> int:
        return sum(
            path.lstat().st_blocks * 512
            for top in ("overlay", "overlay-images")
            for path in (store / top).rglob("*")
            if path.name not in ("images.json", "images.lock", "l") and path.parent.name != "l"
        )

    before = blocks()
    done = collected(host)
    assert done["store-bytes"] == before - blocks()
    assert 2 << 20 < done["store-bytes"] < 3 << 20


def test_a_file_that_an_object_shares_frees_nothing(recorded: Recorded) -> None:
    host = recorded(installed).host
    with podman_on(host) as podman:
        put(podman, GONE, content=os.urandom(1 << 20))
    age_images(host)
    store = HostPaths.scratch(host.root).store
    (file,) = store.glob("overlay/*/diff/app/data")
    os.link(file, host.root / "object")
    done = collected(host)
    assert done["store-bytes"] < 1 << 18
    assert (host.root / "object").stat().st_nlink == 1


def test_layers_of_interrupted_pulls_go_after_a_day(recorded: Recorded) -> None:
    """For that long whoever pulls again need not fetch them."""
    life = recorded(installed)
    host = life.host
    with podman_on(host) as podman:
        put(podman, "localhost/os:stable")
        put(podman, GONE, content=os.urandom(1 << 20))
    store = HostPaths.scratch(host.root).store
    # As it is when podman is killed: there are layers, and no image of them.
    (index,) = store.glob("overlay-images/images.json")
    images = json.loads(index.read_text())
    (dead,) = [image for image in images if image["names"] == [GONE]]
    index.write_text(json.dumps([image for image in images if image is not dead]))
    shutil.rmtree(store / "overlay-images" / dead["id"])
    follow(host, life.booted, "docker://localhost/os:stable")
    assert "store-layers" not in collected(host)
    assert (store / "overlay" / dead["layer"]).is_dir()
    then = time.time() - 2 * DAY
    os.utime(store / "overlay" / dead["layer"], (then, then))
    done = collected(host)
    assert done["store-layers"] == 1
    assert 1 << 20 < done["store-bytes"] < 2 << 20
    assert not (store / "overlay" / dead["layer"]).exists()
    assert names(host) == {"localhost/os:stable"}
    assert collected(host)["result"] == "nothing"


def test_in_doubt_all_of_it_stays(recorded: Recorded) -> None:
    """A bound image that cannot be told, as the image of a deployment is damaged."""
    life = recorded(bound_host)
    host = life.host
    assert life.rollback is not None
    with podman_on(host) as podman:
        put(podman, GONE)
    age_images(host)
    (host.repository / "images" / life.rollback.image.id).unlink()
    with session(host) as opened:
        done = collect(opened)
    assert GONE in names(host)
    assert any("bound to cannot be told" in reason for reason in done["store-kept"])


def test_a_tag_that_leads_nowhere_is_no_doubt(recorded: Recorded) -> None:
    life = recorded(installed)
    host = life.host
    with podman_on(host) as podman:
        put(podman, GONE)
    age_images(host)
    other = host.image(Recipe(version="9"))
    host.write_tag(other)
    host.stream("manifest", other.manifest_digest).unlink()
    with session(host) as opened:
        done = collect(opened)
    assert "store-kept" not in done
    assert names(host) == set()


def test_without_podman_the_rest_is_collected(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    life = recorded(installed)
    host = life.host
    with podman_on(host) as podman:
        put(podman, GONE)
    age_images(host)
    host.image(Recipe(version="9"))
    monkeypatch.setenv("PATH", str(host.root / "empty"))
    done = collected(host)
    assert done["result"] == "collected"
    assert done["objects-removed"] > 0
    assert done["store-kept"] == ["podman is needed and not installed: it is not found in PATH"]
    assert names(host) == {GONE}


def test_what_a_container_uses_stays(recorded: Recorded) -> None:
    host = recorded(installed).host
    with podman_on(host) as podman:
        used = put(podman, GONE)
        podman.run(["create", "--network", "none", used, "/app/data"])
    age_images(host)
    assert "store-images" not in collected(host)
    assert names(host) == {GONE}


def test_lists_stay_with_what_is_in_them(recorded: Recorded, tmp_path: Path) -> None:
    life = recorded(installed)
    host = life.host
    follow(host, life.booted, "docker://localhost/list")
    with podman_on(host) as podman:
        part = put(podman, "localhost/part:1")
        put(podman, GONE)
        podman.run(["manifest", "create", "localhost/list"])
        podman.run(["manifest", "add", "localhost/list", f"containers-storage:{part}"])
        podman.run(["untag", part])
    age_images(host)
    collected(host)
    assert names(host) == {"localhost/list:latest"}
    assert part in stored(host)


def test_nothing_is_made_where_there_is_no_store(recorded: Recorded) -> None:
    host = recorded(installed).host
    collected(host)
    assert not (host.repository / "bootc").exists()
    assert not (host.sysroot / "state/hostimaged/store.json").exists()


def asked(host: RecordedHost, what: str) -> dict[str, object]:
    with session(host) as opened:
        question = Question(opened.paths, opened.repository, opened.state(), Rules(), what, opened.now())
        return explain(question, Silent())


def test_why_tells_what_keeps_an_image_of_the_store(recorded: Recorded) -> None:
    life = recorded(bound_host)
    host = life.host
    with podman_on(host) as podman:
        app = put(podman, "localhost/app:latest")
        gone = put(podman, GONE)
        put_os(podman, life.booted.image, "registry.example/os:stable")
    age_images(host)
    for what in ("localhost/app", "docker://localhost/app:latest", app, app[:16], f"sha256:{app}"):
        answer = asked(host, what)
        assert answer["kept"] is True
        assert f"bound to deployment {life.booted.id[:12]} (it runs, it is in the boot menu)" in str(
            answer["text"]
        )
    answer = asked(host, gone)
    assert answer["kept"] is False
    assert "nothing keeps it" in str(answer["text"])
    both = str(asked(host, life.booted.image.config_digest)["text"])
    assert "kept by" in both
    assert "of bootc's containers-storage: kept, the image of deployment" in both
    assert life.rollback is not None
    assert told(host)["store-images"] == [f"{GONE} ({gone[:12]})"]


def test_deleting_a_deployment_frees_its_bound_images(recorded: Recorded) -> None:
    life = recorded(bound_host)
    host = life.host
    assert life.rollback is not None
    with podman_on(host) as podman:
        put(podman, "quay.io/org/before:1", content=os.urandom(1 << 20))
    age_images(host)
    age(host.tag(life.rollback.image), 2 * DAY)
    answer = asked(host, "rollback")
    assert isinstance(answer["store-bytes-freed"], int)
    assert answer["store-bytes-freed"] > 1 << 20
    assert "of bootc's containers-storage" in str(answer["text"])


# --- interrupted -------------------------------------------------------------------------------------------


class _AtPoint(Silent):
    """A process that is gone at a step, the ``number``-th time that it gets there."""

    def __init__(self, point: str, number: int, error: type[BaseException]) -> None:
        self._point = point
        self._left = number
        self._error = error

    def at(self, point: str) -> None:
        """See ``Reporter``."""
        if point == self._point:
            if not self._left:
                raise self._error
            self._left -= 1


@pytest.mark.parametrize("error", [Crash, Cancelled])
@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("collect.journal", 0),
        ("collect.swept", 0),
        ("collect.store", 0),
        ("collect.podman", 0),
        ("collect.podman", 1),
        ("collect.podman", 2),
        ("collect.store", 1),
        ("collect.stored", 0),
        ("collect.done", 0),
    ],
)
def test_interrupted_anywhere_nothing_live_is_lost_and_repeating_ends_it(
    recorded: Recorded, point: str, number: int, error: type[BaseException]
) -> None:
    life = recorded(bound_host)
    host = life.host
    with podman_on(host) as podman:
        put(podman, "localhost/app:latest")
        put(podman, GONE, "localhost/gone:2")
        put(podman, "localhost/gone:3")
    age_images(host)
    left = {GONE, "localhost/gone:2", "localhost/gone:3"}
    try:
        with session(host, _AtPoint(point, number, error)) as opened:
            collect(opened)
    except (Crash, Cancelled):
        assert point != "collect.done" or error is Crash
    assert "localhost/app:latest" in names(host) <= {"localhost/app:latest", *left}
    with session(host) as opened:
        collect(opened)
    assert names(host) == {"localhost/app:latest"}
    assert len(stored(host)) == 1
    with session(host) as opened:
        assert collect(opened)["result"] == "nothing"
    with podman_on(host) as podman:
        # podman finds its store in order.
        assert podman.run(["image", "exists", "localhost/app:latest"]) == b""
        assert len(podman.run(["images", "--all", "--quiet"]).split()) == 1
