"""The first inputs of the targets in ``host_targets.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

A, B = "1a" * 64, "2b" * 64
DIGEST = "sha256:" + "c" * 64


def origin_seeds() -> Iterator[bytes]:
    reference = "container-image-reference = ostree-unverified-image:docker://r.example/os:1"
    boot = f"[boot]\nboot_type = bls\ndigest = {'d' * 64}"
    yield f"[origin]\n{reference}\n\n{boot}\n\n[image]\nmanifest_digest = {DIGEST}".encode()
    yield b"; x\n[a]\nb=c=d # e\n\n[boot]\r\nboot_type = uki\r\n[a]\nb = f\n"
    for scheme in ("image-signed:oci:/x:y", "remote-image:r:registry:a/b", "unverified-registry:a/b@c"):
        yield f"[origin]\ncontainer-image-reference = ostree-{scheme}\n".encode()


def marker_seeds() -> Iterator[bytes]:
    yield A.encode() + b"\n"
    yield json.dumps({"depl_id": A, "finalization_locked": True}).encode()
    yield b'{"depl_id": "x", "finalization_locked": 1, "y": [null, {}]}'


def imginfo_seeds() -> Iterator[bytes]:
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": DIGEST,
            "size": 7,
        },
        "layers": [],
        "annotations": {"org.opencontainers.image.version": "4"},
    }
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-11-01T08:00:00.5+02:00",
        "config": {"Labels": {"version": "4"}},
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    }
    yield json.dumps({"config": config, "manifest": manifest}).encode()
    yield b'{"config": null, "manifest": {"schemaVersion": 2}}'


def facts_seeds() -> Iterator[bytes]:
    line = "36 1 0:31 / / ro,relatime shared:1 master:2 - overlay {} ro,metacopy=on\n"
    yield f"root=UUID=1 composefs=?{A} rw\n\0{line.format(f'composefs:{A}')}".encode()
    yield f"composefs.digest=v1-sha512-12:{A}\0{line.format(f'transient:composefs={B}')}".encode()
    other = line.format("/dev/a\\040b")
    yield f'"a b" composefs={A}\0{other}1 2 3:4 / /\\134 rw - x y z\n'.encode()


def setup_root_seeds() -> Iterator[bytes]:
    for mode in ("none", "root", "bind", "overlay", "transient", "volatile"):
        yield f"# modes\n[etc]\nmount = '{mode}'\ntransient = false\n".encode()
    yield b'etc = {transient = true}\nvar.mount = "bind"\n[root]\ntransient = true\n'
    yield b"[[x]]\na = [1, 2.5, 1979-05-27]\n"


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "origin": origin_seeds,
    "marker": marker_seeds,
    "imginfo": imginfo_seeds,
    "facts": facts_seeds,
    "setup_root": setup_root_seeds,
}
