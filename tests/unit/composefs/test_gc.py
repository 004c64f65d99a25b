"""Garbage collection where cfsctl is no judge: damage, crashes, ways; and its worked examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from hostimage_testing import random_repositories
from hostimage_testing.random_repositories import RandomRepository, content
from hostimaged.composefs import fsck
from hostimaged.composefs.erofs import Format, build
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.repository.gc import GcResult, Marked, mark, sweep
from hostimaged.composefs.repository.live import ObjectSet
from hostimaged.composefs.repository.why import why
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.errors import Cancelled, CorruptRepository, StorageError
from hostimaged.ids import ObjectId
from hostimaged.progress import Reporter, Silent
from hostimaged.system import syscalls

SEEDS = range(12)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    path = tmp_path / "repository"
    Repository.init(path, verity=Verity.OPPORTUNISTIC)[0].close()
    with Repository.open(path, exclusive=True) as repository:
        yield repository


def stored(repository: Repository, *texts: bytes) -> list[ObjectId]:
    return [repository.store_object(text * 100).id for text in texts]


def stream(
    repository: Repository,
    name: str,
    objects: Collection[ObjectId] = (),
    named: Collection[ObjectId] = (),
    ref: str | None = None,
) -> ObjectId:
    writer = repository.new_stream(0)
    writer.inline(name.encode())
    for id_ in objects:
        writer.external(id_, repository.object_size(id_))
    for number, id_ in enumerate(named):
        writer.named_ref(f"name {number}", id_)
    return repository.write_stream(name, writer, ref)


def image(repository: Repository, objects: Collection[ObjectId], ref: str | None = None) -> ObjectId:
    stat = Stat(0o644, 0, 0, 0, 0, {})
    leaves = {id_.hex().encode(): Leaf(stat, External(id_, repository.object_size(id_))) for id_ in objects}
    root = Directory(Stat(0o755, 0, 0, 0, 0, {}), dict(leaves))
    return repository.write_image(build(root, Format.V1, repository.algorithm), ref)


def collected(
    repository: Repository,
    *,
    roots: Collection[str] = (),
    without: Collection[str] = (),
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> GcResult:
    reporter = reporter or Silent()
    marked = mark(repository, roots=roots, without_refs=without, reporter=reporter)
    return sweep(repository, marked, dry_run=dry_run, reporter=reporter)


def counts(result: GcResult) -> tuple[int, int, int]:
    return result.objects_removed, result.images_pruned, result.streams_pruned


def marked(repository: Repository) -> Marked:
    return mark(repository, reporter=Silent())


# --- the examples of composefs-rs --------------------------------------------------------------------------


def test_a_stream_without_reference_goes(repository: Repository) -> None:
    _, two = stored(repository, b"1", b"2")
    id_ = stream(repository, "a", [two])
    sizes = sum(path.stat().st_size for path in repository.path.glob("objects/??/*"))
    result = collected(repository)
    assert counts(result) == (3, 0, 1)
    assert result.objects_bytes == sizes
    assert not repository.has_object(id_)


@pytest.mark.parametrize(("ref", "roots"), [("some/ref", []), (None, ["a"])])
def test_a_stream_with_reference_or_as_root_stays(
    repository: Repository, ref: str | None, roots: list[str]
) -> None:
    _, two = stored(repository, b"1", b"2")
    stream(repository, "a", [two], ref=ref)
    assert counts(collected(repository, roots=roots)) == (1, 0, 0)
    assert repository.has_object(two)


def test_what_two_streams_share_stays(repository: Repository) -> None:
    one, two, three, four = stored(repository, b"1", b"2", b"3", b"4")
    stream(repository, "a", [two, three], ref="ref")
    stream(repository, "b", [two, four])
    assert counts(collected(repository)) == (3, 0, 1)
    assert repository.has_object(two)
    assert not repository.has_object(one)


def test_named_streams_stay(repository: Repository) -> None:
    one, two, three, four = stored(repository, b"1", b"2", b"3", b"4")
    a = stream(repository, "a", [one])
    b = stream(repository, "b", [two])
    stream(repository, "c", [three], named=[a], ref="ref")
    stream(repository, "d", [four], named=[b])
    # Two streams, and what each has for itself.
    assert counts(collected(repository)) == (4, 0, 2)
    assert repository.streams() == ["a", "c"]


def test_an_image_without_reference_goes(repository: Repository) -> None:
    image(repository, stored(repository, b"1", b"2"))
    assert counts(collected(repository)) == (3, 1, 0)


def test_an_image_named_by_a_stream_keeps_only_itself(repository: Repository) -> None:
    one, two = stored(repository, b"1", b"2")
    id_ = image(repository, [one, two])
    stream(repository, "config", [one], named=[id_], ref="ref")
    assert counts(collected(repository)) == (1, 0, 0)
    assert repository.images() == [id_.hex()]
    assert repository.has_object(one)
    assert not repository.has_object(two)


# --- what composefs-rs does not bear -----------------------------------------------------------------------


def test_references_with_any_name_and_depth_keep(repository: Repository) -> None:
    for name in ("a", "b"):
        stream(repository, name, stored(repository, name.encode()))
    refs = os.fsencode(repository.path / "streams/refs")
    deep = b"/".join([refs] + [b"d"] * 100)
    os.makedirs(deep)
    os.symlink("../" * 101 + "a", deep + b"/deep")
    os.symlink("../b", refs + b"/\xff\xfe")
    assert counts(collected(repository)) == (0, 0, 0)


def test_a_dangling_reference_is_pruned_and_told(repository: Repository) -> None:
    stream(repository, "a", stored(repository, b"1"), ref="oci/kept")
    os.symlink("../../gone", repository.path / "streams/refs/oci/dangling")
    found = marked(repository)
    assert found.dangling == ("streams/refs/oci/dangling",)
    assert not found.damage
    predicted = collected(repository, dry_run=True)
    assert collected(repository) == predicted == GcResult(streams_pruned=1)
    assert repository.stream_refs() == {"oci/kept": "a"}


def test_strange_files_are_left_alone(repository: Repository) -> None:
    stream(repository, "a", stored(repository, b"1"), ref="ref")
    path = repository.path
    for strange in ("streams/file", "streams/refs/file", "images/file", "objects/00/file", "objects/file"):
        (path / strange).parent.mkdir(parents=True, exist_ok=True)
        (path / strange).write_bytes(b"kept")
    (path / "streams/directory").mkdir()
    (path / "objects/00" / ("0" * 126)).mkdir()
    before = content(path)
    assert counts(collected(repository)) == (0, 0, 0)
    assert content(path) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flipped": flip, "cut": truncate, "gone": Path.unlink, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("what", ["manifest", "config", "layer", "image"])
def test_nothing_is_swept_where_damage_is_reached(repository: Repository, how: str, what: str) -> None:
    one, two, _ = stored(repository, b"1", b"2", b"3")
    ids = {"layer": stream(repository, "layer", [one])}
    ids["config"] = stream(repository, "config", named=[ids["layer"]])
    ids["manifest"] = stream(repository, "manifest", named=[ids["config"]], ref="tag")
    ids["image"] = image(repository, [two], ref="boot")
    DAMAGE[how](repository.path / "objects" / ids[what].pathname)
    found = marked(repository)
    [damage] = found.damage
    name = f"images/{ids['image'].hex()}" if what == "image" else f"streams/{what}"
    assert (damage.kind, damage.name) == ("image" if what == "image" else "stream", name)
    assert not found.dangling
    before = content(repository.path)
    for dry_run in (True, False):
        with pytest.raises(CorruptRepository, match="nothing can be collected"):
            sweep(repository, found, dry_run=dry_run, reporter=Silent())
    assert content(repository.path) == before


def test_damage_that_nothing_reaches_does_not_matter(repository: Repository) -> None:
    id_ = stream(repository, "a", stored(repository, b"1"))
    flip(repository.path / "objects" / id_.pathname)
    assert counts(collected(repository)) == (2, 0, 1)


def test_a_root_that_leads_to_no_object_is_damage(repository: Repository) -> None:
    stream(repository, "a", ref="oci/a")
    for name, text in (("b", "../objects/00/nonsense"), ("c", "somewhere")):
        os.symlink(text, repository.path / "streams" / name)
        os.symlink(f"../../{name}", repository.path / "streams/refs/oci" / name)
    assert [(each.kind, each.name) for each in marked(repository).damage] == [
        ("name", "streams/b"),
        ("name", "streams/c"),
    ]


def test_a_directory_that_cannot_be_read_is_damage(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(repository, "a", ref="oci/a")
    really = syscalls.open_beneath

    def unreadable(root: int, path: str, flags: int, mode: int = 0) -> int:
        if path.endswith("refs/oci"):
            raise OSError(5, "Input/output error")
        return really(root, path, flags, mode)

    monkeypatch.setattr(syscalls, "open_beneath", unreadable)
    [damage] = marked(repository).damage
    assert (damage.kind, damage.name) == ("directory", "streams/refs/oci")
    with pytest.raises(CorruptRepository):
        collected(repository)


def test_what_others_remove_in_a_break_is_no_damage(repository: Repository) -> None:
    stream(repository, "a", stored(repository, b"1"), ref="oci/a")

    class Breaks(Silent):
        def at(self, point: str) -> None:
            for path in repository.path.glob("objects/??/*"):
                path.unlink()
            (repository.path / "streams/a").unlink(missing_ok=True)

    links_read = Silent()
    found = mark(repository, reporter=links_read)
    assert "a" in found.streams
    found = mark(repository, reporter=Breaks())
    assert not found.damage
    assert sweep(repository, found, dry_run=True, reporter=Silent()).objects_removed == 0


# --- random repositories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dry_run_without_references_is_exact(tmp_path: Path, seed: int) -> None:
    made = random_repositories.make(tmp_path / "repository", seed)
    without = sorted(made.references)[::2]
    with Repository.open(made.path, exclusive=True) as repository:
        predicted = collected(repository, without=without, dry_run=True)
        found = mark(repository, without_refs=without, reporter=Silent())
        if without:
            with pytest.raises(ValueError, match="references"):
                sweep(repository, found, dry_run=False, reporter=Silent())
        for path in without:
            (made.path / path).unlink()
        assert collected(repository) == predicted
        assert stored_ids(made) == made.live(without=without)
        assert_sound(repository)


def stored_ids(made: RandomRepository) -> set[ObjectId]:
    paths = made.path.glob("objects/??/*")
    return {ObjectId(bytes.fromhex(path.parent.name + path.name)) for path in paths}


def assert_sound(repository: Repository) -> None:
    """The check may only miss what images need that nothing but a stream keeps."""
    findings = {str(finding.kind) for finding in fsck.check(repository).errors}
    assert findings <= {"image-missing-object"}


class Stops(Silent):
    """Stops the work at its ``last`` point."""

    def __init__(self, last: int) -> None:
        self.left = last
        self.points: list[str] = []

    def at(self, point: str) -> None:
        self.points.append(point)
        if not self.left:
            raise Cancelled
        self.left -= 1


def test_stopped_at_any_point_nothing_live_is_lost(tmp_path: Path) -> None:
    passed: set[str] = set()
    for stop in [*range(40), *range(40, 320, 23)]:
        made = random_repositories.make(tmp_path / str(stop), 5)
        (made.path / "streams/refs/oci").mkdir(parents=True, exist_ok=True)
        os.symlink("../../gone", made.path / "streams/refs/oci/dangling")
        with Repository.open(made.path, exclusive=True) as repository:
            reporter = Stops(stop)
            try:
                collected(repository, reporter=reporter)
            except Cancelled:
                passed |= set(reporter.points)
            assert made.live() <= stored_ids(made)
            if "gc.refs" in reporter.points:
                assert_sound(repository)
            collected(repository)
            assert_sound(repository)
            assert stored_ids(made) == made.live()
    assert passed == {"gc.mark", "gc.refs", "gc.links", "gc.synced", "gc.objects"}


@pytest.mark.parametrize("fail", ["unlink", "fsync"])
def test_a_failing_call_leaves_the_rest_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    made = random_repositories.make(tmp_path / "repository", 5)
    really: Callable[..., None] = getattr(os, fail)
    for after in range(4 if fail == "unlink" else 1):
        left = after

        def failing(*args: object, **kwargs: object) -> None:
            nonlocal left
            if not left:
                raise OSError(5, "Input/output error")
            left -= 1
            really(*args, **kwargs)

        with Repository.open(made.path, exclusive=True) as repository:
            # Only where something was pruned there is something to sync.
            for category in ("a", "b"):
                stream(repository, f"more-{after}-{category}")
            with monkeypatch.context() as patched:
                patched.setattr(os, fail, failing)
                with pytest.raises(StorageError, match="cannot collect"):
                    collected(repository)
            assert made.live() <= stored_ids(made)
            assert_sound(repository)


@pytest.mark.parametrize("seed", SEEDS)
def test_why_agrees_with_what_is_kept(tmp_path: Path, seed: int) -> None:
    made = random_repositories.make(tmp_path / "repository", seed)
    roots = list(made.streams)[::4] + list(made.images)[::2]
    with Repository.open(made.path) as repository:
        live = made.live(roots)
        for id_ in stored_ids(made):
            told = why(repository, id_.hex(), roots=roots, reporter=Silent())
            assert told.found
            assert not told.unreadable
            assert bool(told.chains) is (id_ in live)
            from_refs = {chain[0] for chain in told.chains} & made.references.keys()
            assert from_refs == {
                path
                for path, root in made.references.items()
                if id_ in made.kept_by(root, as_image=path.startswith("images/"))
            }
            for chain in told.chains:
                assert chain[-1] == f"objects/{id_.pathname}"
                assert all(os.path.lexists(made.path / step) for step in chain)
        for name, (id_, _, _) in made.streams.items():
            told = why(repository, name, roots=roots, reporter=Silent())
            assert bool(told.chains) is (id_ in live)
            assert all(f"streams/{name}" in chain for chain in told.chains)
        assert not why(repository, "oci-manifest-sha256:0", reporter=Silent()).found


def test_a_set_of_objects() -> None:
    ids = [ObjectId(bytes([number]) * 64) for number in range(200)]
    kept = ObjectSet()
    kept.update([])
    kept.update(ids[:100])
    kept.add(ids[150])
    assert len(kept) == 101
    assert all(id_ in kept for id_ in ids[:100])
    assert ids[150] in kept
    assert not any(id_ in kept for id_ in ids[100:150])
    small = ObjectSet()
    small.update([ObjectId(bytes([number]) * 32) for number in range(3)])
    assert ObjectId(b"\2" * 32) in small
    assert Algorithm.SHA256.digest_size % 8 == 0
