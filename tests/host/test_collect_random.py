"""Random hosts and repositories: what stays is what the plainest reckoning says, and nothing else does.

Images that share a configuration, several tags on a manifest, tags and images of others, referrers,
references that lead nowhere, damaged streams, both formats, lost tags and origins. Forty by default, ten
times as many with HOSTIMAGE_SOAK=1.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostimage_testing.collecting import DAY, age, collected, everything, objects, told
from hostimage_testing.hosts import Deployment, Era, Kind, Loader, RecordedHost
from hostimage_testing.judge import Judge
from hostimage_testing.operating import session
from hostimage_testing.os_images import OsImage, Recipe
from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import Image
from hostimaged.composefs.repository import Repository
from hostimaged.host.collectplan import Rules
from hostimaged.host.explain import Question, explain
from hostimaged.ids import ObjectId
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(1800)]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
EXAMPLES = 400 if SOAK else 40
SYSTEMD = Kind(Loader.SYSTEMD)
#: The first two have one configuration and two manifests; kernels are shared or not.
RECIPES = [
    Recipe(version="1"),
    Recipe(version="1", annotated=False),
    Recipe(version="2", kernel=b"kernel two ", files={"usr/share/two": b"two\n" * 99}),
    Recipe(version="3", files={"usr/share/two": b"two\n" * 99}),
    Recipe(version="4", kernel=b"kernel four ", kargs=("quiet",)),
    Recipe(version="5", kernel=b"kernel two "),
]
PREFIXES = (
    "localhost/bootc-",
    "localhost/hostimaged-pull-",
    "localhost/hostimaged-pin-",
    "localhost/app-",
    "docker://registry.example/app-",
)
#: Of those that deployments may have.
DISTINCT = (0, 2, 3, 4, 5)
_images = st.integers(0, len(RECIPES) - 1)


@dataclass
class Drawn:
    """What a host is to be."""

    live: list[int] = field(default_factory=list)
    staged: int | None = None
    orphan: int | None = None
    tags: dict[tuple[str, int], int] = field(default_factory=dict)
    untagged: set[int] = field(default_factory=set)
    lost_origins: set[int] = field(default_factory=set)
    referrers: set[tuple[int, int]] = field(default_factory=set)
    image_refs: set[int] = field(default_factory=set)
    dangling: int = 0
    damaged: tuple[str, int] | None = None


@st.composite
def hosts(draw: Any) -> Drawn:
    """A host with one to three deployments, and much else."""
    order = draw(st.permutations(DISTINCT))
    count = draw(st.integers(1, 3))
    rest = order[count:]
    drawn = Drawn(live=list(order[:count]))
    if draw(st.booleans()):
        drawn.staged, rest = rest[0], rest[1:]
    if draw(st.booleans()):
        drawn.orphan = rest[0]
    ages = st.sampled_from([0, 2, 40])
    drawn.tags = draw(st.dictionaries(st.tuples(st.sampled_from(PREFIXES), _images), ages, max_size=6))
    drawn.untagged = draw(st.sets(st.sampled_from(drawn.live), max_size=2))
    # Not of the first: the second may be meant as well.
    losable = sorted({*drawn.live} - {0})
    drawn.lost_origins = draw(st.sets(st.sampled_from(losable), max_size=1)) if losable else set()
    drawn.referrers = draw(st.sets(st.tuples(_images, _images), max_size=2))
    drawn.image_refs = draw(st.sets(_images, max_size=1))
    drawn.dangling = draw(st.integers(0, 2))
    kinds = st.sampled_from(["manifest", "config", "image"])
    drawn.damaged = draw(st.none() | st.none() | st.tuples(kinds, _images))
    return drawn


class Made:
    """The host that was drawn."""

    def __init__(self, host: RecordedHost, images: list[OsImage], drawn: Drawn) -> None:
        self.host = host
        self.drawn = drawn
        self.images = images
        self.deployments: dict[int, Deployment] = {}
        self._deploy()
        for (prefix, number), days in drawn.tags.items():
            link = host.tag(self.images[number], prefix)
            link.unlink(missing_ok=True)
            age(host.write_tag(self.images[number], prefix), days * DAY)
        for number in drawn.untagged:
            host.tag(self.images[number]).unlink(missing_ok=True)
        self._refer()
        if drawn.damaged is not None:
            os.truncate(self._damaged(*drawn.damaged).resolve(), 60)

    def _deploy(self) -> None:
        host, drawn = self.host, self.drawn
        wanted = [*drawn.live, drawn.staged, drawn.orphan]
        for number in [number for number in wanted if number is not None]:
            self.deployments[number] = host.deploy(self.images[number])
        live = [self.deployments[number] for number in drawn.live]
        host.live(*live)
        host.booted(live[0])
        if drawn.staged is not None:
            host.staged(self.deployments[drawn.staged], live[0])
            host.mark(self.deployments[drawn.staged])
        if drawn.orphan is not None:
            age(host.tag(self.images[drawn.orphan]), 3 * DAY)
        for number in drawn.lost_origins:
            host.origin(self.deployments[number]).unlink()

    def _refer(self) -> None:
        repository = self.host.repository
        for subject, artifact in self.drawn.referrers:
            digest = self.images[artifact].manifest_digest
            place = repository / "streams/refs/oci-referrers" / self.images[subject].manifest_digest
            place.mkdir(parents=True, exist_ok=True)
            (place / digest).symlink_to(f"../../../oci-manifest-{digest}")
        (repository / "images/refs/some").mkdir(parents=True, exist_ok=True)
        for number in self.drawn.image_refs:
            name = self.images[number].plain_id
            (repository / f"images/refs/some/{number}").symlink_to(f"../../{name}")
        for number in range(self.drawn.dangling):
            (repository / f"images/refs/gone{number}").symlink_to("../" + f"{number}" * 128)
            link = repository / f"streams/refs/oci/gone{number}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../oci-manifest-sha256:{number:064}")

    def _damaged(self, kind: str, number: int) -> Path:
        image = self.images[number]
        if kind == "image":
            return self.host.repository / "images" / image.plain_id
        digest = image.manifest_digest if kind == "manifest" else image.config_digest
        return self.host.stream(kind, digest)

    @property
    def kept(self) -> list[int]:
        """The deployments that stay."""
        staged = [] if self.drawn.staged is None else [self.drawn.staged]
        pinned = {number for prefix, number in self.drawn.tags if "-pin-" in prefix}
        orphan = self.drawn.orphan
        # Where there are pins, a state directory of unknown image may be a pinned one's; this one is known.
        return [*self.drawn.live, *staged, *([orphan] if orphan in pinned and orphan is not None else [])]


class DamageFound(Exception):
    """Something that is reached cannot be read."""


class Reckoning:
    """Reachability as anybody would write it down: from every root again, a name at a time."""

    def __init__(self, made: Made) -> None:
        self._made = made
        self._path = made.host.repository

    def __enter__(self) -> Self:
        self._repository = Repository.open_unlocked(self._path)
        self._streams = {
            self._target(path): path.name for path in (self._path / "streams").iterdir() if path.is_symlink()
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._repository.close()

    def _target(self, link: Path) -> ObjectId:
        return ObjectId(bytes.fromhex("".join(os.readlink(link).split("/")[-2:])))

    def live(self) -> set[ObjectId]:
        """Every object that stays."""
        reached: set[ObjectId] = set()
        for link in self._roots("streams"):
            reached |= self.from_stream(self._target(link))
        for link in self._roots("images"):
            reached |= self._from_image(self._target(link))
        return reached

    def _roots(self, category: str) -> Iterator[Path]:
        names = {os.readlink(link).rpartition("/")[2] for link in self._refs(category)}
        for number in self._made.kept:
            image = self._made.images[number]
            names |= {image.id, f"oci-manifest-{image.manifest_digest}"}
        for name in names:
            link = self._path / category / name
            if link.is_symlink():
                yield link

    def _refs(self, category: str) -> Iterator[Path]:
        for link in (self._path / category / "refs").rglob("*"):
            if link.is_symlink() and not self._is_dead(link):
                yield link

    def _is_dead(self, link: Path) -> bool:
        """What operations.md 7.5 lets go of tags, none of which was made here."""
        days = (time.time() - link.lstat().st_mtime) / DAY
        digest = link.name.rpartition("-")[2]
        if link.name.startswith("localhost%2Fbootc-"):
            wanted = {self._made.images[number].manifest_digest for number in self._made.kept}
            return digest not in wanted and days > 1
        return link.name.startswith("localhost%2Fhostimaged-pull-") and days > 30

    def _read(self, id_: ObjectId) -> bytes:
        data = (self._path / "objects" / id_.pathname).read_bytes()
        if fsverity.digest(self._repository.algorithm, data) != id_:
            raise DamageFound
        return data

    def from_stream(self, id_: ObjectId) -> set[ObjectId]:
        """What the stream in an object keeps."""
        self._read(id_)
        with self._repository.open_stream("", id_) as stream:
            objects_, named = set(stream.object_refs), set(stream.named_refs.values())
        reached = {id_} | objects_ | named
        for other in named:
            if other in self._streams:
                reached |= self.from_stream(other)
        return reached

    def _from_image(self, id_: ObjectId) -> set[ObjectId]:
        return {id_, *Image(self._read(id_), self._repository.algorithm).objects()}


@dataclass(frozen=True)
class Template:
    """A host with all images and no deployment."""

    host: RecordedHost
    images: list[OsImage]


@pytest.fixture(scope="module", params=[Era.CURRENT, Era.SIDECAR], ids=["v1", "v2"])
def template(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cfsctl: str
) -> Template:
    """Its repository is of either format; what it deploys is as bootc deploys now."""
    host = RecordedHost(tmp_path_factory.mktemp("random") / "host", cfsctl, kind=SYSTEMD, era=request.param)
    made = [host.image(recipe) for recipe in RECIPES]
    host.era = Era.CURRENT
    return Template(host, made)


def whys(host: RecordedHost, names: list[str]) -> dict[str, bool]:
    """What ``explain`` says of objects."""
    found = {}
    with session(host) as opened:
        for name in names:
            question = Question(opened.paths, opened.repository, opened.state(), Rules(), name, opened.now())
            found[name] = explain(question, Silent())["kept"]
    return found


def mix(names: set[str], count: int) -> list[str]:
    """Some of the names, from all over."""
    ordered = sorted(names)
    return ordered[:: max(1, len(ordered) // count)]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    # Shrinking takes minutes; what was drawn is printed in any case.
    phases=(Phase.generate, Phase.shrink) if SOAK else (Phase.generate,),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=hosts())
def test_a4_what_is_live_stays_and_what_is_not_goes(
    template: RecordedHost, cfsctl: str, drawn: Drawn
) -> None:
    place = Path(tempfile.mkdtemp(dir=template.host.root.parent))
    try:
        _check(Made(template.host.copy(place / "host"), template.images, drawn), cfsctl)
    finally:
        shutil.rmtree(place)


def _check(made: Made, cfsctl: str) -> None:
    host = made.host
    before = everything(host.root)
    try:
        with Reckoning(made) as reckoning:
            live = {id_.hex() for id_ in reckoning.live()}
    except DamageFound:
        done = collected(host)
        assert done["result"] == "kept"
        assert done["reasons"]
        after = everything(host.root)
        assert {path: after.get(path) for path in before} == before
        return
    there = objects(host.repository)
    assert whys(host, mix(set(there), 6)) == {name: name in live for name in mix(set(there), 6)}
    done = collected(host)
    assert done["result"] in ("collected", "nothing")
    left = objects(host.repository)
    assert left.keys() == live & there.keys()
    assert (left.keys() == there.keys()) == (done["objects-removed"] == 0)
    after = everything(host.root)
    kept = {path for path in before if path.startswith("sysroot/composefs/objects/") and path in after}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert told(host)["result"] == "nothing"
    _judge(made, cfsctl)


def _judge(made: Made, cfsctl: str) -> None:
    """composefs-rs finds all well, and nothing to collect; every deployment that stays boots."""
    host = made.host
    judge = Judge(cfsctl, host.repository)
    assert judge("fsck").rstrip().endswith("status: ok")
    left = objects(host.repository)
    judge("gc")
    assert objects(host.repository) == left
    for number in made.kept:
        assert host.tag(made.images[number]).resolve().exists()
        assert host.state(made.deployments[number]).is_dir()
    wanted = {made.images[number].id for number in made.drawn.live}
    assert {host.startable(line).id for line in host.menu()} == wanted
    assert HostPaths.scratch(host.root).transaction.exists() is False
