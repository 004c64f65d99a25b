"""Layers that other stores of this machine have, for repairs: nothing has to be fetched for them.

Looked into are layouts (``oci:``) that images were pulled from, whatever is in them now, and stores of
containers-storage. No signature is asked for: what comes from here is judged by the digests that the images
of the repository have always had, as everything that repairs is.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.repository import Sharing
from hostimaged.composefs.splitstream import ContentType
from hostimaged.errors import Cancelled, HostimageError, NoSpace, ReadOnly
from hostimaged.oci.layer_repair import fill_from_blob, restore_contents
from hostimaged.oci.layout import LayoutBlobs
from hostimaged.oci.reference import Transport
from hostimaged.oci.storage.layer import Layer
from hostimaged.oci.storage.places import StorageName
from hostimaged.oci.storage.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import DiffId, OciDigest
    from hostimaged.oci.layer_repair import Gap
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.store import StoredLayer
    from hostimaged.progress import Reporter

#: Directories that are looked into: a host is updated from one or two.
MAX_PLACES: Final = 16
#: Seconds that the lock of a store is waited for: there are other places.
_LOCK_TIMEOUT: Final = 5.0
#: What would go wrong with every place.
_FATAL: Final = (Cancelled, NoSpace, ReadOnly)


class LocalLayers:
    """The layers of all stores that ``references`` name, and of those at ``roots``; a context manager.

    A store that is gone, or cannot be read, has none. The stores are opened when they are first needed.
    """

    def __init__(
        self, references: Iterable[ImageReference], roots: Iterable[Path], reporter: Reporter
    ) -> None:
        self._references = list(references)
        self._roots = dict.fromkeys(roots)
        self._reporter = reporter
        self._stack = ExitStack()
        self._opened = False
        self._layouts: list[tuple[str, LayoutBlobs]] = []
        self._stores: list[tuple[Store, dict[DiffId, StoredLayer]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fill(self, repository: Repository, gap: Gap) -> str:
        """Store what is missing of a layer; the place where all of it was found, "" if it was nowhere.

        Raises ``Cancelled``, ``NoSpace`` and ``ReadOnly``.
        """
        self._open()
        for place, layout in self._layouts:
            try:
                fill_from_blob(repository, layout, gap, self._reporter)
            except _FATAL:
                raise
            except HostimageError:
                continue
            return place
        for store, layers in self._stores:
            try:
                if self._fill_from_store(repository, store, layers, gap):
                    return f"containers-storage at {store.root}"
            except _FATAL:
                raise
            except HostimageError:
                continue
        return ""

    def place_of(self, gap: Gap) -> str:
        """Where ``fill`` would look first, "" if no place has the layer; of the content nothing is read."""
        self._open()
        for place, layout in self._layouts:
            if layout.has(gap.plan.descriptor):
                return place
        for store, layers in self._stores:
            if gap.plan.content_type is ContentType.LAYER and gap.plan.id in layers:
                return f"containers-storage at {store.root}"
        return ""

    def document(self, digest: OciDigest, limit: int) -> bytes | None:
        """A manifest or configuration of at most ``limit`` bytes, None if no layout has it."""
        self._open()
        for _, layout in self._layouts:
            with suppress(HostimageError):
                raw = layout.document(digest, limit)
                if hashlib.sha256(raw).hexdigest() == digest.hex:
                    return raw
        return None

    def _fill_from_store(
        self, repository: Repository, store: Store, layers: dict[DiffId, StoredLayer], gap: Gap
    ) -> bool:
        plan = gap.plan
        if plan.content_type is not ContentType.LAYER or plan.id not in layers:
            return False
        check = lambda: self._reporter.at("source.waiting")  # noqa: E731
        with store.reading_layers(), Layer(store, layers[plan.id].id, check) as layer:
            if gap.is_partial:
                restore_contents(repository, gap, layer.parts(), self._reporter, files=True)
            else:
                from hostimaged.oci.unpacked_import import import_unpacked

                import_unpacked(repository, layer.parts(), plan.id, self._reporter, Sharing.AUTO)
        return True

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        directories: dict[str, ImageReference] = {}
        for reference in self._references:
            if reference.transport is Transport.OCI:
                directories.setdefault(reference.path, reference)
            elif reference.transport is Transport.CONTAINERS_STORAGE:
                with suppress(HostimageError):
                    if (root := StorageName.of(reference).root) is not None:
                        self._roots[root] = None
        for path, reference in list(directories.items())[:MAX_PLACES]:
            with suppress(HostimageError):
                self._layouts.append((f"oci:{path}", self._stack.enter_context(LayoutBlobs(reference))))
        for root in list(self._roots)[:MAX_PLACES]:
            with suppress(HostimageError):
                store = Store.open(
                    root, lock_timeout=_LOCK_TIMEOUT, check=lambda: self._reporter.at("source.waiting")
                )
                self._stack.enter_context(store)
                self._stores.append((store, store.layers()))
