"""Repositories of the old format: upgraded by us and by cfsctl, and opened by the other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.host import scratch_host
from hostimage_testing.judge import Judge
from hostimage_testing.layout import Layout
from hostimage_testing.tools import run
from hostimaged.composefs import fsck
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, OldRepository, Repository, Verity
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import CorruptRepository, NotSupported
from hostimaged.ids import ManifestDigest, ObjectId
from hostimaged.oci import __main__ as tool
from hostimaged.oci import images
from hostimaged.oci.commit import FAULT_POINTS
from hostimaged.oci.pull import pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.upgrade import upgrade_images
from hostimaged.progress import Silent

pytestmark = pytest.mark.interop

both_algorithms = pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)

BASE = tars.directory(b"usr") + tars.file(b"usr/tool", b"#!/bin/sh\n" * 2000, mode=0o755) + tars.END
MORE = tars.file(b"usr/more", b"more" * 5000) + tars.END
V1, V2 = Format.V1, Format.V2


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Two images, which have one layer in common, each in a layout of its own."""
    layout = Layout(tmp_path / "one")
    layout.image("v1", [layout.layer(BASE), layout.layer(MORE, "none")])
    other = Layout(tmp_path / "two")
    other.image("v1", [other.layer(BASE)])
    return layout


def filled(cfsctl: str, tmp_path: Path, layout: Layout, algorithm: Algorithm) -> Path:
    """A repository as bootc had them: its images, in V2, and no meta.json."""
    path = tmp_path / "host/sysroot/composefs"
    path.parent.mkdir(parents=True)
    identifier = algorithm.identifier
    run(cfsctl, "init", "--insecure", "--algorithm", identifier, "--erofs-version", "2", path)
    for name in ("one", "two"):
        run(cfsctl, "--repo", path, "oci", "pull", f"oci:{layout.path.with_name(name)}:v1", f"image-{name}")
    (path / "meta.json").unlink()
    return path


def cfsctl_upgrades(cfsctl: str, path: Path) -> None:
    run(cfsctl, "--repo", path, "images")


def images_of(path: Path, tag: str) -> dict[Format, ObjectId]:
    with Repository.open(path) as repository:
        return images.open_image(repository, images.tags(repository)[tag]).image_ids


@both_algorithms
def test_both_write_the_same(cfsctl: str, tmp_path: Path, layout: Layout, algorithm: Algorithm) -> None:
    path = filled(cfsctl, tmp_path, layout, algorithm)
    copy = Path(shutil.copytree(path, tmp_path / "copy", symlinks=True))
    with pytest.raises(OldRepository):
        Repository.open(path)
    repository, upgraded = Repository.upgrade(path)
    with repository:
        assert (upgraded, repository.algorithm, repository.formats) == (True, algorithm, FormatSet(V1))
        assert fsck.check(repository).ok
    cfsctl_upgrades(cfsctl, copy)
    assert (path / "meta.json").read_bytes() == (copy / "meta.json").read_bytes()
    assert (path / "meta.json").stat().st_mode == (copy / "meta.json").stat().st_mode
    # Each opens what the other upgraded, and neither upgrades it again.
    Judge(cfsctl, path).check(images=2)
    with Repository.open(copy) as opened:
        assert fsck.check(opened).ok
    again, upgraded = Repository.upgrade(copy)
    again.close()
    assert not upgraded
    run(cfsctl, "--repo", path, "--no-upgrade", "fsck")


@both_algorithms
def test_images_are_completed(cfsctl: str, tmp_path: Path, layout: Layout, algorithm: Algorithm) -> None:
    path = filled(cfsctl, tmp_path, layout, algorithm)
    Repository.upgrade(path)[0].close()
    judge = Judge(cfsctl, path)
    judge("gc")  # what cfsctl's own pulls left
    with Repository.open(path) as repository:
        before = {tag: images.open_image(repository, digest).image_ids for tag, digest in tags(repository)}
        assert all(set(ids) == {V2} for ids in before.values())
        result = upgrade_images(repository, Silent())
        assert (result.upgraded, result.current, result.artifacts, result.problems) == (2, 0, 0, {})
        again = upgrade_images(repository, Silent())
        assert (again.upgraded, again.current, again.problems) == (0, 2, {})
    judge.check(images=2)
    for tag in ("image-one", "image-two"):
        ids = images_of(path, tag)
        assert ids[V2] == before[tag][V2], "a deployment may have been started from it"
        assert ids[V1].hex() == judge.image_id(tag, 1)
        assert ids[V2].hex() == judge.image_id(tag, 2)
    # No tag of ours was made; the first versions of both streams are garbage; all else is kept.
    assert judge("gc").startswith("Objects: 4 removed")
    judge.check(images=2)
    assert set(images_of(path, "image-one")) == {V1, V2}


def tags(repository: Repository) -> list[tuple[str, ManifestDigest]]:
    return list(images.tags(repository).items())


def test_pulling_into_an_upgraded_repository(cfsctl: str, tmp_path: Path, layout: Layout) -> None:
    """By each; everything is there but the image in the new format."""
    path = filled(cfsctl, tmp_path, layout, Algorithm.SHA512)
    copy = Path(shutil.copytree(path, tmp_path / "copy", symlinks=True))
    Repository.upgrade(path)[0].close()
    host = scratch_host(tmp_path / "host")
    reference = ImageReference.parse(f"oci:{layout.path}:v1")
    options = {"expect_digest": None, "lock_timeout": 5, "reporter": Silent()}
    result = pull_image(host, reference, verity=Verity.OPPORTUNISTIC, **options)  # type: ignore[arg-type]
    assert (result.layers_total, result.layers_present, result.bytes_fetched) == (2, 2, 0)
    out = run(cfsctl, "--repo", copy, "oci", "pull", f"oci:{layout.path}:v1", "image-one").out
    assert "0 new" in out or "objects" not in out
    assert images_of(path, "image-one")[V1] == images_of(copy, "image-one")[V1]
    Judge(cfsctl, path).check(images=3)


class Stopped(BaseException):
    """The process was killed."""


class StopAt(Silent):
    """Stops at the given call of ``at``."""

    def __init__(self, count: int) -> None:
        self.left = count

    def at(self, point: str) -> None:
        assert point in FAULT_POINTS
        if not self.left:
            raise Stopped
        self.left -= 1


def test_killed_at_any_point(cfsctl: str, tmp_path: Path, layout: Layout) -> None:
    path = filled(cfsctl, tmp_path, layout, Algorithm.SHA256)
    Repository.upgrade(path)[0].close()
    stopped = 0
    for count in range(100):
        copy = Path(shutil.copytree(path, tmp_path / f"copy-{count}", symlinks=True))
        with Repository.open(copy) as repository:
            try:
                upgrade_images(repository, StopAt(count))
            except Stopped:
                stopped += 1
            else:
                break
        judge = Judge(cfsctl, copy)
        judge.check(images=2)
        judge("gc")
        judge.check(images=2)
        for tag in ("image-one", "image-two"):
            with Repository.open(copy) as repository:
                os.close(repository.open_image(images_of(copy, tag)[V2].hex()))
        with Repository.open(copy) as repository:
            upgrade_images(repository, Silent())
        judge("gc")
        judge.check(images=2)
        assert all(set(images_of(copy, tag)) == {V1, V2} for tag in ("image-one", "image-two"))
        with Repository.open(copy) as repository:
            assert repository.stream_refs("hostimaged") == {}
    assert stopped == 8


def test_old_headers(cfsctl: str, tmp_path: Path, layout: Layout) -> None:
    """Layers whose streams have the header of bootc up to 1.15, and no images at all."""
    path = filled(cfsctl, tmp_path, layout, Algorithm.SHA256)
    with Repository.upgrade(path)[0] as repository:
        ids: dict[ObjectId, ObjectId] = {}
        for name in repository.streams():
            if name.startswith("oci-layer-"):
                old = stream_id(repository, name)
                ids[old] = with_old_header(repository, name)
        for name in [n for n in repository.streams() if n.startswith("oci-config-")]:
            old = stream_id(repository, name)
            ids[old] = rewrite(repository, name, ids, drop="composefs.image")
        for name in [n for n in repository.streams() if n.startswith("oci-manifest-")]:
            rewrite(repository, name, ids)
    judge = Judge(cfsctl, path)
    judge("gc")
    judge.check(images=2)
    assert images_of(path, "image-one") == {}
    assert [name for name in os.listdir(path / "images") if name != "refs"] == []
    with Repository.open(path) as repository:
        result = upgrade_images(repository, Silent())
        assert (result.upgraded, result.problems) == (2, {})
    judge.check(images=2)
    for tag in ("image-one", "image-two"):
        assert images_of(path, tag)[V1].hex() == judge.image_id(tag, 1)


def stream_id(repository: Repository, name: str) -> ObjectId:
    found = repository.has_stream(name)
    assert found is not None
    return found


def with_old_header(repository: Repository, name: str) -> ObjectId:
    raw = repository.read_object(stream_id(repository, name), 1 << 20)
    info, flags, magic, rest = raw[16:32], raw[12:14], raw[:11], raw[32:]
    stored = repository.store_object(info + flags + magic + raw[11:12] + raw[14:16] + rest)
    link = repository.path / "streams" / name
    link.unlink()
    link.symlink_to(f"../objects/{stored.id.pathname}")
    return stored.id


def rewrite(repository: Repository, name: str, ids: dict[ObjectId, ObjectId], drop: str = "") -> ObjectId:
    with repository.open_stream(name) as stream:
        [content] = stream.object_refs
        refs = {key: ids.get(id_, id_) for key, id_ in stream.named_refs.items() if key != drop}
        kind = stream.content_type
    with repository.new_stream(kind) as writer:
        writer.external(content, repository.object_size(content))
        for key, id_ in refs.items():
            writer.named_ref(key, id_)
        return repository.write_stream(name, writer)


def test_damage_costs_one_image(cfsctl: str, tmp_path: Path, layout: Layout) -> None:
    path = filled(cfsctl, tmp_path, layout, Algorithm.SHA512)
    with Repository.upgrade(path)[0] as repository:
        digest = images.tags(repository)["image-one"]
        other = images.tags(repository)["image-two"]
        [layer] = layers_of(repository, digest) - layers_of(repository, other)
        (path / "objects" / layer.pathname).unlink()
        name = "oci-manifest-sha256:" + "0" * 64
        with repository.new_stream(ContentType.MANIFEST) as writer:
            repository.write_stream(name, writer, "oci/broken")
        result = upgrade_images(repository, Silent())
    assert (result.upgraded, len(result.problems)) == (1, 2)
    assert set(images_of(path, "image-two")) == {V1, V2}
    assert set(images_of(path, "image-one")) == {V2}


def layers_of(repository: Repository, digest: ManifestDigest) -> set[ObjectId]:
    return set(images.open_image(repository, digest).layers.values())


def test_no_place_for_images(tmp_path: Path) -> None:
    formats = FormatSet(Format.V0)
    repository, _ = Repository.init(tmp_path / "v0", formats=formats, verity=Verity.OPPORTUNISTIC)
    with repository, pytest.raises(NotSupported, match="format v0"):
        upgrade_images(repository, Silent())


def test_tool(cfsctl: str, tmp_path: Path, layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(cfsctl, tmp_path, layout, Algorithm.SHA512)
    assert tool.main(["fsck", str(path)]) != 0
    shown = capsys.readouterr()
    assert not shown.out
    assert "made by a composefs-rs before 0.7" in shown.err
    assert "python3 -m hostimaged.oci upgrade" in shown.err
    assert tool.main(["upgrade", str(path), "--verity", "require"]) != 0
    assert "none of its objects has" in capsys.readouterr().err
    assert tool.main(["upgrade", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "repository: upgraded (fsverity-sha512-12, v1)",
        "images: 2 upgraded, 0 current, 0 artifacts",
    ]
    assert tool.main(["upgrade", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "repository: current (fsverity-sha512-12, v1)",
        "images: 0 upgraded, 2 current, 0 artifacts",
    ]
    Judge(cfsctl, path).check(images=2)
    damaged = path / "streams" / os.readlink(path / "streams/refs/oci/image-one").rpartition("/")[2]
    damaged.resolve().write_bytes(b"")
    assert tool.main(["upgrade", str(path)]) == CorruptRepository("").exit_code
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1] == "images: 0 upgraded, 1 current, 0 artifacts"
    assert damaged.name.removeprefix("oci-manifest-") in shown.out.splitlines()[2]
    assert json.loads((path / "meta.json").read_bytes())["erofs_formats"] == {"default": 1}
