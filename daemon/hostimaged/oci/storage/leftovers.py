"""Layers of the store that no image and no container has: what a pull that was interrupted leaves.

podman has no command to remove them. It removes layers with the last image that has them, so each chain of
them is made an image, for which skopeo has to copy nothing, and that image is removed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import from_os_error
from hostimaged.oci.models import CONFIG_TYPE, MANIFEST_TYPE
from hostimaged.oci.storage.podman import LOCATION

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from hostimaged.oci.storage.podman import Podman
    from hostimaged.oci.storage.store import Store

_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
_NAME: Final = "localhost/hostimaged/leftovers:1"
#: Accepts what is made here, and is used for nothing else.
_POLICY: Final = '{"default": [{"type": "insecureAcceptAnything"}]}'


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers on each other, lowest first, of which nobody has the last: digests of tars, and their sizes."""

    top: str
    layers: tuple[tuple[str, int], ...]


def leftovers(store: Store) -> list[Chain]:
    """The chains of layers that nobody has; one whose layers have no digest cannot be removed, and is left
    out. Raises as the methods of ``Store`` do.
    """
    facts = store.layer_facts()
    kept: set[str] = set()
    for top in store.tops():
        while top in facts and top not in kept:
            kept.add(top)
            top = facts[top].parent
    loose = facts.keys() - kept
    parents = {facts[layer].parent for layer in loose}
    chains = []
    for top in sorted(loose - parents):
        layers: list[tuple[str, int]] = []
        layer, seen = top, set()
        while layer in facts and layer not in seen:
            seen.add(layer)
            layers.append((facts[layer].digest, max(facts[layer].size, 0)))
            layer = facts[layer].parent
        if all(digest for digest, _ in layers):
            chains.append(Chain(top, tuple(reversed(layers))))
    return chains


def sweep(store: Store, podman: Podman, spare: Collection[str] = ()) -> int:
    """Remove what ``leftovers`` finds, however often it takes; gives the number of chains.

    ``spare``: chains with these layers at the top stay. For one who holds the repository alone: a pull under
    way has such layers, too. Raises as ``Podman.run``.
    """
    removed = 0
    # A chain may have been on another one; and what cannot be removed is not tried twice.
    tried = set(spare)
    while chains := [chain for chain in leftovers(store) if chain.top not in tried]:
        for chain in chains:
            tried.add(chain.top)
            _remove(podman, chain)
            removed += 1
    return removed


def _remove(podman: Podman, chain: Chain) -> None:
    directory = podman.work_dir / "leftovers"
    try:
        directory.mkdir(exist_ok=True)
        _write_image(directory, chain)
        policy = podman.work_dir / "leftovers.json"
        policy.write_text(_POLICY)
    except OSError as error:
        raise from_os_error(error, "cannot write a temporary image") from error
    podman.run(
        ["--policy", str(policy), "copy", "--quiet", f"dir:{directory}", f"{LOCATION}{_NAME}"],
        program="skopeo",
    )
    podman.remove([_NAME])


def _write_image(directory: Path, chain: Chain) -> None:
    """An image of these layers, without them: the store has them."""
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest for digest, _ in chain.layers]},
        }
    )
    digest = hashlib.sha256(config).hexdigest()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": f"sha256:{digest}", "size": len(config)},
        "layers": [
            {"mediaType": _LAYER_TYPE, "digest": digest, "size": size} for digest, size in chain.layers
        ],
    }
    (directory / digest).write_bytes(config)
    (directory / "version").write_text("Directory Transport Version: 1.1\n")
    (directory / "manifest.json").write_bytes(_json(manifest))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
