"""Every kind of source, served by the real skopeo and a real registry: the same bytes come out of each."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.host import scratch_host
from hostimage_testing.layout import INDEX_TYPE, Layout
from hostimage_testing.registry import Registry, free_port
from hostimage_testing.samples import copy
from hostimage_testing.tools import run
from hostimaged.errors import (
    Cancelled,
    DigestMismatch,
    ImageNotFound,
    NetworkError,
    RegistryAuth,
    SignatureRejected,
    UnsupportedImage,
)
from hostimaged.oci.layout import LayoutSource, wanted_platforms
from hostimaged.oci.models import Manifest, parse_config, parse_manifest
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.retry import RetryingSource
from hostimaged.oci.skopeo import SkopeoSource, open_image
from hostimaged.oci.source import ImageSource, Patience, open_source
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop
HERE = wanted_platforms(os.uname().machine)[0].architecture


@dataclass(frozen=True)
class Fetched:
    """Everything a source gave."""

    kind: type[ImageSource]
    raw: bytes
    source_digest: str
    version: str
    blobs: list[bytes]

    @property
    def manifest(self) -> Manifest:
        return parse_manifest(self.raw)

    @property
    def converted(self) -> bool:
        return self.source_digest != "sha256:" + hashlib.sha256(self.raw).hexdigest()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def host(tmp_path: Path, registry: Registry) -> HostPaths:
    return scratch_host(tmp_path / "host", registries=registry.registries_conf)


@pytest.fixture
def work_dir(tmp_path: Path) -> Iterator[Path]:
    """A private directory; a source leaves nothing in it but what ``skopeo copy`` fetched."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert [p.name for p in directory.iterdir() if p.name != "copy"] == []


def read(source: ImageSource) -> Fetched:
    with source:
        fetched = source.manifest()
        manifest = parse_manifest(fetched.raw)
        version = parse_config(source.config(manifest.config)).version
        blobs = []
        for layer in manifest.layers:
            with source.blob(layer) as chunks:
                blobs.append(b"".join(chunks))
    return Fetched(type(source), fetched.raw, str(fetched.source_digest), version, blobs)


def fetch(text: str, host: HostPaths, work_dir: Path) -> Fetched:
    return read(open_source(ImageReference.parse(text), host, work_dir, Silent(), Patience(pause=0.02)))


def sample(layout: Layout, tag: str | None = "v1", *, listed: bool = True, n: str = "1") -> dict[str, Any]:
    layers = [
        layout.layer(os.urandom(3_000_000), "gzip"),
        layout.layer(b"some text " * 10_000, "zstd"),
        layout.layer(os.urandom(10), "none"),
    ]
    labels = {"org.opencontainers.image.version": n}
    return layout.image(tag, layers, labels=labels, listed=listed)


def test_same_bytes_by_every_way(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path, tmp_path: Path
) -> None:
    sample(layout)
    origin = f"oci:{layout.path}:v1"
    direct = fetch(origin, host, work_dir)
    assert direct.kind is LayoutSource
    assert (direct.version, len(direct.blobs)) == ("1", 3)
    for target, kind in (
        (f"docker://{registry.host}/ways:v1", RetryingSource),
        (f"dir:{tmp_path}/dir", SkopeoSource),
        (f"oci-archive:{tmp_path}/a.tar:v1", SkopeoSource),
    ):
        # Archives are recompressed by a plain copy.
        copy(skopeo, origin, target, "--preserve-digests")
        assert fetch(target, host, work_dir) == Fetched(kind, *_contents(direct))
    assert read(
        open_image(ImageReference.parse(origin), host.containers, work_dir, Silent(), verify=False)
    ) == Fetched(SkopeoSource, *_contents(direct)), "the direct reader and skopeo agree"
    by_digest = f"docker://{registry.host}/ways@{direct.source_digest}"
    assert fetch(by_digest, host, work_dir).raw == direct.raw


def _contents(fetched: Fetched) -> tuple[bytes, str, str, list[bytes]]:
    return fetched.raw, fetched.source_digest, fetched.version, fetched.blobs


def test_docker_schema_2_is_converted(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path, tmp_path: Path
) -> None:
    layers = [layout.layer(os.urandom(50_000), "gzip"), layout.layer(os.urandom(1000), "gzip")]
    layout.image("v1", layers, labels={"org.opencontainers.image.version": "2"})
    target = f"docker://{registry.host}/schema2:v1"
    copy(skopeo, f"oci:{layout.path}:v1", target, "--format", "v2s2")
    fetched = fetch(target, host, work_dir)
    raw = run(skopeo, "inspect", "--raw", "--tls-verify=false", target).out.encode()
    assert json.loads(raw)["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert fetched.source_digest == "sha256:" + hashlib.sha256(raw).hexdigest()
    assert fetched.converted
    assert fetched.manifest.is_container
    assert fetched.version == "2"
    assert len(fetched.blobs) == 2
    archive = f"docker-archive:{tmp_path}/docker.tar:example/os:v1"
    copy(skopeo, f"oci:{layout.path}:v1", archive)
    fetched = fetch(archive, host, work_dir)
    assert fetched.converted
    assert [hashlib.sha256(blob).hexdigest() for blob in fetched.blobs] == [d.diff_id[7:] for d in layers]
    assert fetch(f"docker-archive:{tmp_path}/docker.tar", host, work_dir) == fetched
    assert fetch(f"docker-archive:{tmp_path}/docker.tar:@0", host, work_dir) == fetched


def test_layout_in_docker_format_goes_through_skopeo(
    skopeo: str, layout: Layout, host: HostPaths, work_dir: Path, tmp_path: Path
) -> None:
    layout.image("v1", [layout.layer(b"x" * 600, "gzip")], labels={"org.opencontainers.image.version": "3"})
    copy(skopeo, f"oci:{layout.path}:v1", f"dir:{tmp_path}/dir", "--format", "v2s2")
    docker = Layout(tmp_path / "docker")
    for blob in (tmp_path / "dir").iterdir():
        docker.blob(blob.read_bytes(), "")
    raw = (tmp_path / "dir/manifest.json").read_bytes()
    docker.add(docker.blob(raw, json.loads(raw)["mediaType"]), None)
    fetched = fetch(f"oci:{docker.path}", host, work_dir)
    assert fetched.kind is SkopeoSource
    assert fetched.converted
    assert fetched.version == "3"


def lists(layout: Layout) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A list and a list of lists; the digest of this machine's manifest in both."""
    here = sample(layout, listed=False)
    other = sample(layout, listed=False, n="other")
    platforms = [{"architecture": "s390x", "os": "linux"}, {"architecture": HERE, "os": "linux"}]
    entries = [other | {"platform": platforms[0]}, here | {"platform": platforms[1]}]
    outer = {"schemaVersion": 2, "mediaType": INDEX_TYPE}
    flat = layout.blob(json.dumps(outer | {"manifests": entries}).encode(), INDEX_TYPE)
    nested = [{**flat, "platform": platforms[1]}]
    nested_index = layout.blob(json.dumps(outer | {"manifests": nested}).encode(), INDEX_TYPE)
    return here["digest"], layout.add(flat, "flat"), layout.add(nested_index, "nested")


def test_lists_of_platforms(skopeo: str, layout: Layout, host: HostPaths, work_dir: Path) -> None:
    digest, *_ = lists(layout)
    for name in ("flat", "nested"):
        reference = f"oci:{layout.path}:{name}"
        direct = fetch(reference, host, work_dir)
        assert direct.source_digest == digest
        proxy = open_image(ImageReference.parse(reference), host.containers, work_dir, Silent(), verify=False)
        try:
            by_skopeo = read(proxy)
        except UnsupportedImage:
            # skopeo 1.9 looks into one list only.
            assert name == "nested"
        else:
            assert _contents(by_skopeo) == _contents(direct), "the direct reader and skopeo choose alike"


def test_list_in_a_registry(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path
) -> None:
    digest, *_ = lists(layout)
    target = f"docker://{registry.host}/lists:flat"
    copy(skopeo, f"oci:{layout.path}:flat", target, "--all", "--preserve-digests")
    assert fetch(target, host, work_dir).source_digest == digest


def test_artifact(skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path) -> None:
    blob = layout.blob(b"signature", "application/octet-stream")
    empty = layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    extra = {"config": empty, "layers": [blob], "artifactType": "application/x-test"}
    layout.image("artifact", [], manifest_extra=extra)
    with open_source(ImageReference.parse(f"oci:{layout.path}:artifact"), host, work_dir, Silent()) as source:
        manifest = parse_manifest(source.manifest().raw)
        assert not manifest.is_container
        assert source.config(manifest.config) == b"{}"
        with source.blob(manifest.layers[0]) as chunks:
            assert b"".join(chunks) == b"signature"


def test_blobs_side_by_side(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path
) -> None:
    tars = [os.urandom(2_000_000) for _ in range(6)]
    layout.image("v1", [layout.layer(tar, "none") for tar in tars])
    target = f"docker://{registry.host}/parallel:v1"
    copy(skopeo, f"oci:{layout.path}:v1", target, "--preserve-digests")
    found: dict[int, bytes] = {}
    with open_source(ImageReference.parse(target), host, work_dir, Silent()) as source:
        layers = parse_manifest(source.manifest().raw).layers

        def load(number: int) -> None:
            with source.blob(layers[number]) as chunks:
                found[number] = b"".join(chunks)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[n] for n in range(6)] == tars


def test_abandoned_blob_does_not_hinder(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path
) -> None:
    layout.image("v1", [layout.layer(os.urandom(30_000_000), "none"), layout.layer(b"y" * 10, "none")])
    target = f"docker://{registry.host}/abandoned:v1"
    copy(skopeo, f"oci:{layout.path}:v1", target, "--preserve-digests")
    with open_source(ImageReference.parse(target), host, work_dir, Silent()) as source:
        layers = parse_manifest(source.manifest().raw).layers
        with source.blob(layers[0]) as chunks:
            assert next(chunks)
        with source.blob(layers[1]) as chunks:
            assert b"".join(chunks) == b"y" * 10
        begin = time.monotonic()
    assert time.monotonic() - begin < 4, "the proxy ended by itself"


def test_damage_in_the_registry(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path
) -> None:
    layer = layout.layer(os.urandom(300_000), "none")
    layout.image("v1", [layer])
    target = f"docker://{registry.host}/damaged:v1"
    copy(skopeo, f"oci:{layout.path}:v1", target, "--preserve-digests")
    hexdigest = layer.descriptor["digest"][7:]
    stored = registry.storage / f"docker/registry/v2/blobs/sha256/{hexdigest[:2]}/{hexdigest}/data"
    good = stored.read_bytes()
    for bad in (good[:100] + bytes([good[100] ^ 4]) + good[101:], good[:-5]):
        stored.write_bytes(bad)
        with pytest.raises(DigestMismatch):
            fetch(target, host, work_dir)
    stored.write_bytes(good)
    assert fetch(target, host, work_dir).blobs == [good]


def test_what_is_not_there(
    skopeo: str, registry: Registry, layout: Layout, host: HostPaths, work_dir: Path, tmp_path: Path
) -> None:
    sample(layout)
    copy(skopeo, f"oci:{layout.path}:v1", f"docker://{registry.host}/there:v1", "--preserve-digests")
    copy(skopeo, f"oci:{layout.path}:v1", f"oci-archive:{tmp_path}/a.tar:v1")
    absent = [
        f"docker://{registry.host}/nothing:v1",
        f"docker://{registry.host}/there:v2",
        f"docker://{registry.host}/there@sha256:{'0' * 64}",
        f"oci:{layout.path}:v2",
        f"oci:{tmp_path}/nothing",
        f"oci-archive:{tmp_path}/nothing",
        f"oci-archive:{tmp_path}/a.tar:v2",
        f"dir:{tmp_path}/nothing",
        f"docker-archive:{tmp_path}/nothing",
    ]
    for text in absent:
        with pytest.raises(ImageNotFound) as caught:
            fetch(text, host, work_dir)
        assert str(ImageReference.parse(text)) in caught.value.message
        assert str(work_dir) not in caught.value.message


def test_registry_that_cannot_be_reached(skopeo: str, host: HostPaths, work_dir: Path) -> None:
    with pytest.raises(NetworkError, match="connection refused"):
        fetch(f"docker://127.0.0.1:{free_port()}/x:v1", host, work_dir)


def test_http_needs_permission(registry: Registry, skopeo: str, tmp_path: Path, work_dir: Path) -> None:
    """A registry without TLS is refused unless registries.conf allows it: our file is the one that counts."""
    host = scratch_host(tmp_path / "strict")
    with pytest.raises(NetworkError, match="HTTP response to HTTPS client"):
        fetch(f"docker://{registry.host}/x:v1", host, work_dir)


class _Handler(http.server.BaseHTTPRequestHandler):
    """A registry that wants a password, or one that stops in the middle of a blob."""

    answers: Callable[[str], tuple[int, dict[str, str], bytes, int]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, headers, body, length = type(self).answers(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = len(body) != length

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were stopped hang up in the middle."""


@contextlib.contextmanager
def odd_registry(answers: Callable[[str], tuple[int, dict[str, str], bytes, int]]) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"answers": staticmethod(answers)})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def insecure_host(root: Path, registry_host: str) -> HostPaths:
    return scratch_host(root, registries=f'[[registry]]\nlocation = "{registry_host}"\ninsecure = true\n')


def test_registry_that_wants_a_password(skopeo: str, tmp_path: Path, work_dir: Path) -> None:
    body = json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}).encode()

    def answers(_path: str) -> tuple[int, dict[str, str], bytes, int]:
        return 401, {"WWW-Authenticate": 'Basic realm="test"'}, body, len(body)

    with odd_registry(answers) as host, pytest.raises(RegistryAuth):
        fetch(f"docker://{host}/x:v1", insecure_host(tmp_path / "host", host), work_dir)


def test_connection_lost_in_the_middle(layout: Layout, skopeo: str, tmp_path: Path, work_dir: Path) -> None:
    layer = layout.layer(os.urandom(500_000), "none")
    manifest = layout.blob_path(layout.image("v1", [layer])["digest"]).read_bytes()

    def answers(path: str) -> tuple[int, dict[str, str], bytes, int]:
        if "/manifests/" in path:
            media_type = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
            return 200, media_type, manifest, len(manifest)
        if "/blobs/" in path:
            blob = layout.blob_path(path.rpartition("/")[2]).read_bytes()
            return 200, {}, blob[:250_000], len(blob)
        return 200, {}, b"", 0

    with odd_registry(answers) as host, pytest.raises(NetworkError):
        fetch(f"docker://{host}/x:v1", insecure_host(tmp_path / "host", host), work_dir)


def test_silent_registry(skopeo: str, tmp_path: Path, work_dir: Path) -> None:
    """A registry that accepts the connection and says nothing is given up; waiting can be cancelled."""

    class Impatient(Silent):
        def at(self, point: str) -> None:
            raise Cancelled(point)

    quiet = threading.Event()

    def answers(_path: str) -> tuple[int, dict[str, str], bytes, int]:
        quiet.wait(30)
        return 404, {}, b"", 0

    with odd_registry(answers) as address:
        host = insecure_host(tmp_path / "host", address)
        reference = ImageReference.parse(f"docker://{address}/x:v1")
        try:
            with pytest.raises(NetworkError, match="did not answer"):
                open_image(reference, host.containers, work_dir, Silent(), verify=False, silence=1)
            with pytest.raises(Cancelled):
                open_source(reference, host, work_dir, Impatient())
        finally:
            quiet.set()


SIGNED = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/nonexistent/key.gpg"}


def signing_host(root: Path, registry: Registry, **scopes: Any) -> HostPaths:
    policy = {"default": [{"type": "reject"}], "transports": scopes}
    return scratch_host(root, policy=json.dumps(policy), registries=registry.registries_conf)


def test_unsigned_image_is_rejected(
    skopeo: str, registry: Registry, layout: Layout, tmp_path: Path, work_dir: Path
) -> None:
    sample(layout)
    target = f"docker://{registry.host}/unsigned:v1"
    copy(skopeo, f"oci:{layout.path}:v1", target, "--preserve-digests")
    host = signing_host(tmp_path / "host", registry, docker={"": [SIGNED]}, oci={"": [SIGNED]})
    for text in (target, f"oci:{layout.path}:v1"):
        with pytest.raises(SignatureRejected, match="signature"):
            fetch(text, host, work_dir)
    assert list(work_dir.iterdir()) == []


def test_signed_image_is_accepted(
    skopeo: str,
    layout: Layout,
    registry: Registry,
    signing_key: tuple[str, Path],
    tmp_path: Path,
    work_dir: Path,
) -> None:
    """An image whose signature skopeo verified while copying: the same bytes as without the detour."""
    sample(layout)
    fingerprint, public = signing_key
    identity = "registry.example/os:v1"
    copy(skopeo, f"oci:{layout.path}:v1", f"dir:{tmp_path}/signed", "--sign-by", fingerprint,
         "--sign-identity", identity)  # fmt: skip
    required = {
        "type": "signedBy",
        "keyType": "GPGKeys",
        "keyPath": str(public),
        "signedIdentity": {"type": "exactReference", "dockerReference": identity},
    }
    host = signing_host(tmp_path / "host", registry, dir={str(tmp_path / "signed"): [required]})
    plain = scratch_host(tmp_path / "plain")
    fetched = fetch(f"dir:{tmp_path}/signed", host, work_dir)
    assert (work_dir / "copy").is_dir(), "this skopeo's proxy does not enforce signatures"
    assert fetched == fetch(f"dir:{tmp_path}/signed", plain, work_dir)
    manifest = tmp_path / "signed/manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    (tmp_path / "second").mkdir()
    with pytest.raises(SignatureRejected):
        fetch(f"dir:{tmp_path}/signed", host, tmp_path / "second")


def test_unsupported_schema_1(
    skopeo: str, layout: Layout, host: HostPaths, work_dir: Path, tmp_path: Path
) -> None:
    layout.image("v1", [layout.layer(b"x" * 600, "gzip")])
    copy(skopeo, f"oci:{layout.path}:v1", f"dir:{tmp_path}/dir", "--format", "v2s2")
    manifest = tmp_path / "dir/manifest.json"
    content = {
        "schemaVersion": 1,
        "name": "x",
        "tag": "v1",
        "architecture": HERE,
        "fsLayers": [{"blobSum": "sha256:" + "0" * 64}],
        "history": [{"v1Compatibility": json.dumps({"id": "0" * 64})}],
    }
    manifest.write_text(json.dumps(content))
    with pytest.raises(UnsupportedImage):
        fetch(f"dir:{tmp_path}/dir", host, work_dir)
