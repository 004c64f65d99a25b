"""Damaged images: our check of them against ``cfsctl oci fsck``, finding by finding."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import tars
from hostimage_testing.layout import CONFIG_TYPE, MANIFEST_TYPE, Layout
from hostimage_testing.tools import run
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository
from hostimaged.composefs.splitstream import ContentType
from hostimaged.ids import ObjectId
from hostimaged.oci import __main__ as tool

pytestmark = pytest.mark.interop

#: After the tag of these comes what is the same for everyone; of others, some of it a program's own words.
EXACT = {
    "manifest-digest-mismatch",
    "config-ref-missing",
    "config-digest-mismatch",
    "layer-ref-missing",
    "layer-stream-missing",
    "artifact-layer-ref-missing",
    "invalid-ref-name",
}
NAMED = {"layer-check-failed", "layer-object-missing", "seal-image-missing", "artifact-layer-object-missing"}
IMAGE, ARTIFACT = "registry.example/an/image:v1", "artifact"


@dataclass(frozen=True)
class Stored:
    """A repository with an image and an artifact."""

    path: Path
    manifest: str
    config: str
    layers: tuple[str, str]
    artifact: str

    def stream(self, name: str) -> Path:
        return self.path / "streams" / name

    def object(self, name: str) -> Path:
        """The object a stream is in."""
        return self.stream(name).resolve()

    def content(self, name: str) -> Path:
        """The only object that a stream refers to."""
        with Repository.open(self.path) as repository, repository.open_stream(name) as stream:
            [id_] = stream.object_refs
        return self.path / "objects" / id_.pathname

    def refs(self, name: str) -> dict[str, ObjectId]:
        with Repository.open(self.path) as repository, repository.open_stream(name) as stream:
            return dict(stream.named_refs)

    def rewrite(
        self,
        name: str,
        raw: bytes | None = None,
        refs: dict[str, ObjectId] | None = None,
        kind: int | None = None,
    ) -> ObjectId:
        """Store the stream ``name`` anew with another content, other names, or of another type."""
        with Repository.open(self.path) as repository:
            with repository.open_stream(name) as stream:
                kind = stream.content_type if kind is None else kind
                refs = dict(stream.named_refs) if refs is None else refs
            raw = self.content(name).read_bytes() if raw is None else raw
            with repository.new_stream(kind) as writer:
                writer.external(repository.store_object(raw).id, len(raw))
                for key, id_ in refs.items():
                    writer.named_ref(key, id_)
                return repository.write_stream(name, writer)

    def store_image(self, config: bytes, manifest: dict[str, Any] | None = None, **refs: ObjectId) -> None:
        """An image of any configuration, with the layers of the one there is, as tag ``made``."""
        digest = sha256(config)
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest, "size": len(config)},
            "layers": [],
        } | (manifest or {})
        raw = json.dumps(document).encode()
        with Repository.open(self.path) as repository:
            config_id = write(repository, f"oci-config-{digest}", ContentType.CONFIG, config, refs)
            names = {f"config:{digest}": config_id}
            write(repository, f"oci-manifest-{sha256(raw)}", ContentType.MANIFEST, raw, names)
            repository.name_stream(f"oci-manifest-{sha256(raw)}", "oci/made")


def write(repository: Repository, name: str, kind: int, raw: bytes, refs: dict[str, ObjectId]) -> ObjectId:
    with repository.new_stream(kind) as writer:
        writer.external(repository.store_object(raw).id, len(raw))
        for key, id_ in refs.items():
            writer.named_ref(key, id_)
        return repository.write_stream(name, writer)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture(scope="session", params=list(Algorithm), ids=lambda a: a.label)
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cfsctl: str) -> Stored:
    path = tmp_path_factory.mktemp("oci-fsck") / "repository"
    layout = Layout(path.parent / "layout")
    layers = [
        layout.layer(tars.directory(b"usr") + tars.file(b"usr/a", b"a" * 5000) + tars.END),
        layout.layer(tars.file(b"usr/b", b"b" * 5000) + tars.END, "none"),
    ]
    image = layout.image("v1", layers)
    manifest = json.loads(layout.blob_path(image["digest"]).read_bytes())
    run(cfsctl, "init", "--insecure", "--algorithm", request.param.identifier, path)
    run(cfsctl, "--repo", path, "oci", "pull", f"oci:{layout.path}:v1", IMAGE)
    blob = layout.blob(b"any bytes" * 1000, "application/x-anything")
    empty = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": "application/x-a"}
    artifact = layout.blob(json.dumps(document | {"config": empty, "layers": [blob]}).encode(), MANIFEST_TYPE)
    # Without a platform cfsctl finds none of these.
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    layout.add(artifact | {"platform": {"architecture": machine, "os": "linux"}}, "artifact")
    run(cfsctl, "--repo", path, "oci", "pull", f"oci:{layout.path}:artifact", ARTIFACT)
    first, second = (layer.diff_id for layer in layers)
    return Stored(
        path,
        f"oci-manifest-{image['digest']}",
        f"oci-config-{manifest['config']['digest']}",
        (f"oci-layer-{first}", f"oci-layer-{second}"),
        f"oci-manifest-{artifact['digest']}",
    )


@pytest.fixture
def stored(pristine: Stored, tmp_path: Path) -> Stored:
    path = Path(shutil.copytree(pristine.path, tmp_path / "repository", symlinks=True))
    return Stored(path, pristine.manifest, pristine.config, pristine.layers, pristine.artifact)


def ours(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    code = tool.main(["fsck", str(path), *arguments, "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (code == 0) is report["ok"]
    return report


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    found: Counter[tuple[str, ...]] = Counter()
    for text in report["errors"]:
        prefix, kind, tag, *rest = text.split(": ")
        assert prefix == "fsck"
        if kind not in EXACT:
            rest = rest[:1] if kind in NAMED else []
        found[kind, tag, *rest] += 1
    # The repository's own findings are compared elsewhere: here only that they are the same.
    repository = Counter(text.split(": ")[1] for text in report["repo"]["errors"])
    return report | {"errors": found, "repo": report["repo"] | {"errors": repository}}


def compare(cfsctl: str, capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> Counter[str]:
    mine = ours(capsys, path, *arguments)
    theirs = json.loads(run(cfsctl, "--repo", path, "oci", "fsck", "--json", *arguments).out)
    assert comparable(mine) == comparable(theirs)
    assert list(mine) == list(theirs), "the keys, in order"
    text = run(cfsctl, "--repo", path, "oci", "fsck", *arguments, check=False).out
    tool.main(["fsck", str(path), *arguments])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(text.splitlines())
    summaries = [[line for line in lines.splitlines() if line.startswith("oci")] for lines in (out, text)]
    assert summaries[0] == summaries[1]
    return Counter(finding.split(": ")[1] for finding in mine["errors"])


def test_nothing_wrong(cfsctl: str, capsys: pytest.CaptureFixture[str], stored: Stored) -> None:
    assert not compare(cfsctl, capsys, stored.path)
    assert tool.main(["fsck", str(stored.path)]) == 0
    out = capsys.readouterr().out
    assert out == run(cfsctl, "--repo", stored.path, "oci", "fsck").out
    assert out.endswith("status: ok\noci images: 2/2 ok\n")


def config_of(stored: Stored) -> bytes:
    return stored.content(stored.config).read_bytes()


def without(stored: Stored, name: str, ref: str) -> ObjectId:
    refs = stored.refs(name)
    del refs[ref]
    return stored.rewrite(name, refs=refs)


def repoint(stored: Stored, config_id: ObjectId) -> None:
    """Let the manifest refer to a config stream."""
    refs = stored.refs(stored.manifest)
    stored.rewrite(stored.manifest, refs={k: config_id if k[:7] == "config:" else v for k, v in refs.items()})


def a_config(*diff_ids: object, labels: dict[str, str] | None = None) -> bytes:
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": labels or {}},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }
    return json.dumps(document).encode()


def damaged_config(stored: Stored) -> None:
    """Other bytes in the place of the configuration, of which the repository itself is content."""
    raw = config_of(stored) + b" "
    repoint(stored, stored.rewrite(stored.config, raw))


def layer_id(stored: Stored) -> ObjectId:
    return stored.refs(stored.config)[stored.layers[0].removeprefix("oci-layer-")]


def sealed(stored: Stored, seal: str) -> None:
    stored.store_image(a_config(labels={"containers.composefs.fsverity": seal}))


def image_name(stored: Stored) -> str:
    return next(name for name in os.listdir(stored.path / "images") if name != "refs")


def tag(stored: Stored, name: str, target: str) -> None:
    (stored.path / "streams/refs/oci" / name).symlink_to(target)


DIFF_ID = "sha256:" + "7" * 64
Damage = Callable[[Stored], object]
#: Damages by name, each with the findings it must give (none: the images are as they should be).
WAYS: dict[str, tuple[Damage, dict[str, int]]] = {
    "manifest object missing": (
        lambda s: s.content(s.manifest).unlink(),
        {"manifest-read-failed": 1},
    ),
    "manifest object damaged": (
        lambda s: s.content(s.manifest).write_bytes(b"{}"),
        {"manifest-digest-mismatch": 1},
    ),
    "manifest object is a directory": (
        lambda s: (found := s.content(s.manifest), found.unlink(), found.mkdir()),
        {"manifest-read-failed": 1},
    ),
    "manifest stream missing": (lambda s: s.stream(s.manifest).unlink(), {"manifest-read-failed": 1}),
    "manifest stream emptied": (lambda s: os.truncate(s.object(s.manifest), 0), {"manifest-read-failed": 1}),
    "manifest of another type": (
        lambda s: s.rewrite(s.manifest, kind=ContentType.BLOB),
        {"manifest-read-failed": 1},
    ),
    "manifest rewritten": (
        lambda s: s.rewrite(s.manifest, s.content(s.manifest).read_bytes() + b" "),
        {"manifest-digest-mismatch": 1},
    ),
    "manifest that is none": (
        lambda s: s.store_image(b"{}", {"schemaVersion": "2"}),
        {"manifest-parse-failed": 1},
    ),
    "manifest without configuration": (
        lambda s: s.store_image(b"{}", {"config": None}),
        {"manifest-parse-failed": 1},
    ),
    "config not referred to": (
        lambda s: without(s, s.manifest, f"config:{s.config.removeprefix('oci-config-')}"),
        {"config-ref-missing": 1},
    ),
    "config stream missing": (lambda s: s.object(s.config).unlink(), {"config-read-failed": 1}),
    "config name missing": (lambda s: s.stream(s.config).unlink(), {}),
    "config object missing": (lambda s: s.content(s.config).unlink(), {"config-read-failed": 1}),
    "config object damaged": (
        lambda s: s.content(s.config).write_bytes(b"{}"),
        {"config-digest-mismatch": 1},
    ),
    "config of another type": (
        lambda s: repoint(s, s.rewrite(s.config, kind=ContentType.MANIFEST)),
        {"config-read-failed": 1},
    ),
    "config rewritten": (damaged_config, {"config-digest-mismatch": 1}),
    "config that is none": (lambda s: s.store_image(b"[]"), {"config-parse-failed": 1}),
    "config without layers": (
        lambda s: s.store_image(b'{"architecture": "amd64", "os": "linux"}'),
        {"config-parse-failed": 1},
    ),
    "layer not referred to": (
        lambda s: repoint(s, without(s, s.config, s.layers[1].removeprefix("oci-layer-"))),
        {"layer-ref-missing": 1},
    ),
    "layers not referred to": (
        lambda s: s.store_image(a_config(DIFF_ID, "sha256:" + "8" * 64, DIFF_ID)),
        {"layer-ref-missing": 3},
    ),
    "layer stream missing": (
        lambda s: [s.stream(name).unlink() for name in s.layers],
        {"layer-stream-missing": 2},
    ),
    "layer name is no link": (
        lambda s: (s.stream(s.layers[0]).unlink(), s.stream(s.layers[0]).touch()),
        {"layer-check-failed": 1},
    ),
    "layer name of another form": (
        lambda s: (s.stream(s.layers[0]).unlink(), s.stream(s.layers[0]).symlink_to("../objects/xy")),
        {"layer-check-failed": 1},
    ),
    "layer name leads elsewhere": (
        lambda s: (s.stream(s.layers[0]).unlink(), s.stream(s.layers[0]).symlink_to(s.layers[1])),
        {"layer-check-failed": 1},
    ),
    "layer object missing": (lambda s: s.object(s.layers[0]).unlink(), {"layer-object-missing": 1}),
    "layer of a stream that is there": (
        lambda s: s.store_image(a_config(DIFF_ID), **{DIFF_ID: layer_id(s)}),
        {"layer-stream-missing": 1},
    ),
    "diff_id that is no digest": (
        lambda s: s.store_image(a_config("junk"), junk=layer_id(s)),
        {"layer-check-failed": 1},
    ),
    "no layers at all": (lambda s: s.store_image(a_config()), {}),
    "image without EROFS image": (
        lambda s: shutil.rmtree(s.path / "images"),
        {},
    ),
    "content of a layer missing": (
        lambda s: [file.unlink() for file in s.path.glob("objects/??/*") if file.read_bytes() == b"a" * 5000],
        {},
    ),
    "seal": (lambda s: sealed(s, image_name(s)), {}),
    "seal by reference": (
        lambda s: (
            (s.path / "images/refs").mkdir(exist_ok=True),
            (s.path / "images/refs/seal").symlink_to(f"../{image_name(s)}"),
            sealed(s, "seal"),
        ),
        {},
    ),
    "seal that is missing": (lambda s: sealed(s, "00" * 32), {"seal-image-missing": 1}),
    "seal that is no name": (lambda s: sealed(s, "a/b"), {"seal-image-missing": 1}),
    "artifact's blob not referred to": (
        lambda s: without(s, s.artifact, next(k for k in s.refs(s.artifact) if k[:7] != "config:")),
        {"artifact-layer-ref-missing": 1},
    ),
    "artifact's blob missing": (
        lambda s: next(
            s.path / "objects" / v.pathname for k, v in s.refs(s.artifact).items() if k[:7] != "config:"
        ).unlink(),
        {"artifact-layer-object-missing": 1},
    ),
    "artifact's manifest missing": (lambda s: s.stream(s.artifact).unlink(), {"manifest-read-failed": 1}),
    "artifact's config object damaged": (
        lambda s: next(f for f in s.path.glob("objects/??/*") if f.read_bytes() == b"{}").write_bytes(b"[]"),
        {"config-digest-mismatch": 1},
    ),
    "tag beginning with @": (lambda s: tag(s, "@x", f"../../{s.manifest}"), {"invalid-ref-name": 1}),
    "tag of a layer": (lambda s: tag(s, "x", f"../../{s.layers[0]}"), {}),
    "tag of what is no digest": (lambda s: tag(s, "x", "../../oci-manifest-sha256:12"), {}),
    "tag of another digest": (
        lambda s: tag(s, "x", f"../../oci-manifest-sha512:{'1' * 128}"),
        {"manifest-read-failed": 1},
    ),
    "tag of an unknown digest": (
        lambda s: tag(s, "x", "../../oci-manifest-md5+b.c:AB_1="),
        {"manifest-read-failed": 1},
    ),
    "tag of a digest in capitals": (lambda s: tag(s, "x", f"../../oci-manifest-sha256:{'A' * 64}"), {}),
    "tag that dangles": (
        lambda s: tag(s, "x", f"../../oci-manifest-{DIFF_ID}"),
        {"manifest-read-failed": 1},
    ),
    "many tags of a damaged image": (
        lambda s: (
            [tag(s, f"a%2F{number}", f"../../{s.manifest}") for number in range(5)],
            s.content(s.manifest).unlink(),
        ),
        {"manifest-read-failed": 6},
    ),
    "no tags": (lambda s: shutil.rmtree(s.path / "streams/refs"), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_damage(cfsctl: str, capsys: pytest.CaptureFixture[str], stored: Stored, way: str) -> None:
    damage, expected = WAYS[way]
    damage(stored)
    assert compare(cfsctl, capsys, stored.path) == expected


@pytest.mark.parametrize(
    "way", ["no tags", "tag beginning with @", "config rewritten", "manifest stream missing"]
)
@pytest.mark.parametrize("name", [IMAGE, ARTIFACT, "missing"])
def test_one_image(
    cfsctl: str, capsys: pytest.CaptureFixture[str], stored: Stored, way: str, name: str
) -> None:
    WAYS[way][0](stored)
    compare(cfsctl, capsys, stored.path, name)


@pytest.mark.parametrize("target", ["../../oci-layer-x", "../../oci-manifest-x", "nothing"])
def test_one_tag_that_leads_elsewhere(
    cfsctl: str, capsys: pytest.CaptureFixture[str], stored: Stored, target: str
) -> None:
    tag(stored, "x", target)
    assert compare(cfsctl, capsys, stored.path, "x") == {"ref-resolve-failed": 1}


@pytest.mark.parametrize("size", [(4 << 20) + 1])
def test_what_is_too_large(capsys: pytest.CaptureFixture[str], stored: Stored, size: int) -> None:
    """We read no manifest and no configuration that no registry would have given us."""
    stored.store_image(a_config() + b" " * size)
    [found] = ours(capsys, stored.path)["errors"]
    assert found.startswith("fsck: config-read-failed: made: ")
    stored.rewrite(stored.manifest, b" " * size)
    found, _ = ours(capsys, stored.path)["errors"]
    assert found.startswith(("fsck: config-read-failed: ", "fsck: manifest-read-failed: "))
