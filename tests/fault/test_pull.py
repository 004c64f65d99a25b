"""A pull killed at each named point: what it leaves is sound, and the next pull completes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.processes import python_environment
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, HostimageError
from hostimaged.ids import ObjectId
from hostimaged.oci import images
from hostimaged.oci.pull import FAULT_POINTS, PullResult, pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

#: Pulls an image and kills itself when it has come to a point for the nth time; exits 7 if it never does.
VICTIM = """
import os, signal, sys
from pathlib import Path
from hostimaged.composefs.repository import Verity
from hostimaged.oci.pull import pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

root, reference, point, left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

class Killer(Silent):
    def at(self, at):
        global left
        if at == point:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

pull_image(HostPaths.scratch(Path(root)), ImageReference.parse(reference), expect_digest=None,
           verity=Verity.OPPORTUNISTIC, lock_timeout=5, reporter=Killer())
sys.exit(7)
"""
#: Points that a pull of the test image passes several times.
TWICE = ("layer.verified", "layer.stored", "image.built", "image.stored")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    base = tars.directory(b"usr") + tars.file(b"usr/tool", b"tool" * 5000) + tars.END
    layers = [
        layout.layer(base, "gzip"),
        layout.layer(tars.file(b"usr/big", b"0123456789abcdef" * 100_000) + tars.END, "zstd"),
        layout.layer(tars.file(b"usr/small", b"x" * 100) + tars.END, "none"),
    ]
    layout.image("v1", layers)
    # The same configuration, another manifest.
    layout.image("again", [layout.layer(base, "zstd"), *layers[1:]])
    layout.image("other", layers[:1])
    return layout


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    host = scratch_host(tmp_path / "host")
    formats = FormatSet(Format.V1, (Format.V2,))
    Repository.init(
        host.repository, algorithm=Algorithm.SHA512, formats=formats, verity=Verity.OPPORTUNISTIC
    )[0].close()
    return host


def killed(host: HostPaths, reference: str, point: str, count: int = 1) -> bool:
    """Run a pull that dies at ``point``; False if it went through without coming there so often."""
    assert host.scratch_root is not None
    argv = [sys.executable, "-c", VICTIM, str(host.scratch_root), reference, point, str(count)]
    done = subprocess.run(
        argv, env=python_environment(), check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode in (-signal.SIGKILL, 7), done.stderr
    return done.returncode == -signal.SIGKILL


def pull(host: HostPaths, reference: str) -> PullResult:
    return pull_image(
        host,
        ImageReference.parse(reference),
        expect_digest=None,
        verity=Verity.OPPORTUNISTIC,
        lock_timeout=5,
        reporter=Silent(),
    )


def check_sound(host: HostPaths, judge: Judge) -> None:
    """Every name leads to something whole, and everything tagged is complete."""
    judge.check()
    with Repository.open(host.repository, lock_timeout=0) as repository:
        for name in repository.streams():
            with repository.open_stream(name) as stream:
                assert all(map(repository.has_object, stream.object_refs))
        for digest in images.tags(repository).values():
            image = images.open_image(repository, digest)
            assert set(image.image_ids) == {Format.V1, Format.V2}
            for image_id in image.image_ids.values():
                os.close(repository.open_image(image_id.hex()))


CASES = [(point, 1) for point in FAULT_POINTS if point != "shared.stored"] + [(point, 2) for point in TWICE]


@pytest.mark.parametrize(("point", "count"), CASES)
def test_killed_and_pulled_again(
    host: HostPaths, cfsctl: str, layout: Layout, point: str, count: int
) -> None:
    judge = Judge(cfsctl, host.repository)
    reference = f"oci:{layout.path}:v1"
    assert killed(host, reference, point, count), f"the pull does not come to {point} {count} times"
    check_sound(host, judge)
    with Repository.open(host.repository, lock_timeout=0) as repository:
        tagged = images.tags(repository)
    assert bool(tagged) == (point in ("pull.tagged", "pull.recorded"))
    result = pull(host, reference)
    check_sound(host, judge)
    judge.check(images=1)
    assert judge.image_id(result.tag, Format.V1) == result.image_ids[Format.V1].hex()
    assert list(host.temporary.iterdir()) == [], "what the killed pull left was removed"
    assert not pull(host, reference).changed


@pytest.mark.parametrize("point", ["image.stored", "config.stored", "manifest.stored", "shared.stored"])
def test_killed_while_a_configuration_is_shared(
    host: HostPaths, cfsctl: str, layout: Layout, point: str
) -> None:
    """Another image's manifest is to be written anew, too: any later pull completes what was begun."""
    judge = Judge(cfsctl, host.repository)
    first = pull(host, f"oci:{layout.path}:v1")
    with Repository.open(host.repository, lock_timeout=0) as repository:
        v2 = repository.has_stream(images.config_stream(first.config_digest))
        # As if the repository had had one format only: the next pull makes the other and changes the config.
        stored = images.read_config(repository, first.config_digest)
        refs = {k: v for k, v in stored.refs.items() if k != images.IMAGE_REFS[Format.V2]}
        _rewrite(repository, first, refs)
        assert repository.has_stream(images.config_stream(first.config_digest)) != v2
    assert killed(host, f"oci:{layout.path}:again", point)
    judge("gc")
    judge.check()
    with Repository.open(host.repository, lock_timeout=0) as repository:
        os.close(repository.open_image(first.image_ids[Format.V1].hex()))
    pull(host, f"oci:{layout.path}:other")
    with Repository.open(host.repository, lock_timeout=0) as repository:
        assert repository.stream_refs("hostimaged") == {}
        current = repository.has_stream(images.config_stream(first.config_digest))
        refs = images.open_image(repository, first.manifest_digest).manifest_refs
        assert refs[images.config_ref(first.config_digest)] == current
    pull(host, f"oci:{layout.path}:again")
    check_sound(host, judge)
    judge.check(images=3)
    judge("gc")
    check_sound(host, judge)


def _rewrite(repository: Repository, result: PullResult, refs: dict[str, ObjectId]) -> None:
    config = images.read_config(repository, result.config_digest)
    manifest = images.read_manifest(repository, result.manifest_digest)
    with repository.new_stream(ContentType.CONFIG) as writer:
        writer.external(repository.store_object(config.raw).id, len(config.raw))
        for name, id_ in refs.items():
            writer.named_ref(name, id_)
        config_id = repository.write_stream(images.config_stream(result.config_digest), writer)
    with repository.new_stream(ContentType.MANIFEST) as writer:
        writer.external(repository.store_object(manifest.raw).id, len(manifest.raw))
        for name, id_ in (manifest.refs | {images.config_ref(result.config_digest): config_id}).items():
            writer.named_ref(name, id_)
        repository.write_stream(images.manifest_stream(result.manifest_digest), writer)


def test_first_pull_killed_while_the_repository_is_made(tmp_path: Path, cfsctl: str, layout: Layout) -> None:
    host = scratch_host(tmp_path / "fresh")
    for point in ("pull.started", "pull.opened", "pull.resolved"):
        assert killed(host, f"oci:{layout.path}:v1", point)
    assert pull(host, f"oci:{layout.path}:v1").changed
    Judge(cfsctl, host.repository).check(images=1)


def test_error_at_each_point(host: HostPaths, cfsctl: str, layout: Layout) -> None:
    """An error instead of a kill: the same promise, and the error is the caller's."""
    judge = Judge(cfsctl, host.repository)

    class Failing(Silent):
        def __init__(self, point: str) -> None:
            self.point = point

        def at(self, point: str) -> None:
            if point == self.point:
                raise HostimageError(f"failed at {point}")

    for point in [p for p in FAULT_POINTS if p != "shared.stored"]:
        with pytest.raises(HostimageError, match=point):
            pull_image(
                host,
                ImageReference.parse(f"oci:{layout.path}:v1"),
                expect_digest=None,
                verity=Verity.OPPORTUNISTIC,
                lock_timeout=5,
                reporter=Failing(point),
            )
        judge.check()
        # Begin anew for the next point.
        for tag in list(_tags(host)):
            judge("oci", "untag", tag)
        judge("gc")


def _tags(host: HostPaths) -> dict[str, object]:
    with Repository.open(host.repository, lock_timeout=0) as repository:
        return dict(images.tags(repository))


def test_cancelled_while_waiting_for_the_repository(host: HostPaths, layout: Layout) -> None:
    class Impatient(Silent):
        waited = 0

        def at(self, point: str) -> None:
            if point == "pull.locking":
                self.waited += 1
                if self.waited == 3:
                    raise Cancelled

    reporter = Impatient()
    with Repository.open(host.repository, exclusive=True), pytest.raises(Cancelled):
        pull_image(
            host,
            ImageReference.parse(f"oci:{layout.path}:v1"),
            expect_digest=None,
            verity=Verity.OPPORTUNISTIC,
            lock_timeout=60,
            reporter=reporter,
        )
    assert reporter.waited == 3
    assert pull(host, f"oci:{layout.path}:v1").changed, "nothing holds the lock any more"
