"""Images out of containers-storage (``containers-storage:``): an ``ImageSource`` with unpacked layers.

A manifest in docker's format is converted to OCI's: media types only, so that the configuration keeps its
digest, which is the image's id in the store. (skopeo makes another configuration.) Signatures are not checked
here, and cannot be: see ``source.open_source``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

from hostimaged.errors import DigestMismatch, ImageNotFound, UnsupportedImage, printable
from hostimaged.ids import SourceDigest
from hostimaged.oci.models import CONFIG_TYPE, DOCKER_MANIFEST_TYPE, INDEX_TYPES, MANIFEST_TYPE, MAX_MANIFEST
from hostimaged.oci.source import FetchedManifest, UnpackedLayer, verified
from hostimaged.oci.storage.layer import Layer
from hostimaged.oci.storage.places import StorageName, default_roots
from hostimaged.oci.storage.store import Store, StoreMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from hostimaged.ids import DiffId
    from hostimaged.oci.models import Descriptor
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.store import StoredImage, StoredLayer

_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs."
_OCI_LAYERS: Final = {
    "diff.tar": "application/vnd.oci.image.layer.v1.tar",
    "diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "diff.tar.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "foreign.diff.tar": "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "foreign.diff.tar.gzip": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
}


class StorageSource:
    """One image of the stores that ``reference`` or the ``environment`` names; see the module.

    ``system`` is the store of root; ``wanted`` is where ``reference`` was put, if that is not what it says.
    Raises ``ImageNotFound``, ``NotSupported`` and what ``Store`` raises.
    """

    def __init__(
        self,
        reference: ImageReference,
        system: Path,
        environment: Mapping[str, str],
        *,
        lock_timeout: float,
        check: Callable[[], None],
        wanted: StorageName | None = None,
    ) -> None:
        self._reference = reference
        self._check = check
        wanted = wanted or StorageName.of(reference)
        roots = (wanted.root,) if wanted.root is not None else default_roots(environment, system)
        self._stores = _opened(roots, lock_timeout, check)
        try:
            self._image = self._find(wanted)
            self._layers = self._all_layers()
        except BaseException:
            self.close()
            raise

    def _find(self, wanted: StorageName) -> StoredImage:
        for store in self._stores:
            image = store.find(wanted.image_id or wanted.name)
            if image is not None:
                return image
        where = ", ".join(str(store.root) for store in self._stores) or "any usual place"
        raise ImageNotFound(f"{self._reference}: there is no such image in containers-storage at {where}")

    def _all_layers(self) -> dict[DiffId, tuple[Store, StoredLayer]]:
        """The layers of all stores; the first that has one counts."""
        found: dict[DiffId, tuple[Store, StoredLayer]] = {}
        for store in self._stores:
            for diff_id, layer in store.layers().items():
                found.setdefault(diff_id, (store, layer))
        return found

    @property
    def image(self) -> StoredImage:
        """What was found."""
        return self._image

    @property
    def root(self) -> Path:
        """Where the files of layers are, in the store that has the image.

        podman may have mounted this directory onto itself; nothing can be linked out of another mount.
        """
        return self._image.store.root / "overlay"

    def manifest(self) -> FetchedManifest:
        """The manifest that the image was stored with."""
        raw = self._raw_manifest()
        digest = SourceDigest.of_hash(hashlib.sha256(raw).hexdigest())
        return FetchedManifest(to_oci(raw, self._reference), digest)

    def _raw_manifest(self) -> bytes:
        return self._image.manifest()

    def config(self, descriptor: Descriptor) -> bytes:
        """The configuration, verified."""
        return b"".join(verified(iter([self._image.config()]), descriptor, "image configuration"))

    def blob(self, descriptor: Descriptor) -> AbstractContextManager[Iterator[bytes]]:
        """Raises ``UnsupportedImage``: a store has no blobs but those of images."""
        raise UnsupportedImage(
            f"{self._reference}: blob {descriptor.digest} is no layer of a container image, and is not kept"
        )

    @contextmanager
    def unpacked(self, diff_id: DiffId) -> Iterator[UnpackedLayer]:
        """The tar of a layer in parts, with its size where that is known (else -1).

        A ``DigestMismatch`` in the context is raised anew, telling which file is damaged if one is.
        """
        if diff_id not in self._layers:
            raise ImageNotFound(f"{self._reference}: layer {diff_id} is missing from containers-storage")
        store, stored = self._layers[diff_id]
        with store.reading_layers(), Layer(store, stored.id, self._check) as layer:
            try:
                yield UnpackedLayer(layer.parts(), stored.size)
            except DigestMismatch as error:
                name = next(layer.damaged_files(), None)
                if name is None:
                    raise
                raise DigestMismatch(
                    what=f"layer {diff_id} in containers-storage at {store.root}",
                    expected=diff_id,
                    actual=f"another one: the file {printable(name)} of layer {stored.id} is damaged",
                ) from error

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FetchedSource(StorageSource):
    """The image ``image_id`` of the store ``root``, which was fetched from ``reference`` before.

    ``manifest_digest`` is the digest of its manifest at its source: a store keeps that one too, where it had
    to write another for layers that came uncompressed; else it is in the file ``kept_manifest``.
    """

    def __init__(
        self,
        reference: ImageReference,
        root: Path,
        image_id: str,
        manifest_digest: SourceDigest,
        *,
        kept_manifest: Path,
        lock_timeout: float,
        check: Callable[[], None],
    ) -> None:
        self._manifest_digest = manifest_digest
        self._kept_manifest = kept_manifest
        wanted = StorageName(root, "", image_id)
        super().__init__(reference, root, {}, lock_timeout=lock_timeout, check=check, wanted=wanted)

    def _raw_manifest(self) -> bytes:
        raw = self._image.manifest(self._manifest_digest)
        if str(self._manifest_digest) not in self._image.digests:
            with contextlib.suppress(FileNotFoundError), self._kept_manifest.open("rb") as file:
                raw = file.read(MAX_MANIFEST)
        actual = SourceDigest.of_hash(hashlib.sha256(raw).hexdigest())
        if actual != self._manifest_digest:
            raise DigestMismatch(
                what=f"manifest of {self._reference}", expected=self._manifest_digest, actual=actual
            )
        return raw


def _opened(roots: tuple[Path, ...], lock_timeout: float, check: Callable[[], None]) -> list[Store]:
    """Those of the stores that exist; raises ``StoreMissing`` if there is none."""
    found: list[Store] = []
    for root in roots:
        try:
            found.append(Store.open(root, lock_timeout=lock_timeout, check=check))
        except StoreMissing:
            if len(roots) == 1:
                raise
        except BaseException:
            for store in found:
                store.close()
            raise
    return found


def to_oci(raw: bytes, reference: ImageReference) -> bytes:
    """``raw`` if it is a manifest of OCI's format, else its conversion; raises ``UnsupportedImage``."""
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UnsupportedImage(f"{reference}: its manifest is not valid")
    kind = manifest.get("mediaType")
    if kind in INDEX_TYPES:
        raise UnsupportedImage(f"{reference}: the store has a list of images, and not which of them this is")
    if kind != DOCKER_MANIFEST_TYPE:
        return raw
    try:
        converted: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": manifest["config"] | {"mediaType": CONFIG_TYPE},
            "layers": [
                layer | {"mediaType": _layer_type(layer["mediaType"])} for layer in manifest["layers"]
            ],
        }
    except (KeyError, TypeError):
        raise UnsupportedImage(f"{reference}: its manifest is not valid") from None
    return json.dumps(converted, separators=(",", ":")).encode()


def _layer_type(media_type: str) -> str:
    return _OCI_LAYERS.get(media_type.removeprefix(_DOCKER_LAYER), media_type)
