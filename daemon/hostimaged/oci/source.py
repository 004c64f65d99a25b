"""Where images come from: the interface of every source, and the choice among them.

A source hands out bytes that are verified against the digests naming them; it stores nothing. Which way an
image is fetched depends on its transport and on the signature policy that applies to it:

* ``oci:`` layouts are read directly where the policy asks for no signature;
* ``containers-storage:`` is read directly too, and refused where the policy asks for more than anything: no
  signature of an image in a store is checked;
* everything else goes through skopeo's image proxy, which enforces the policy from protocol 0.2.6 on;
* an older proxy serves only images that need no signature; others are copied by ``skopeo copy``, which
  enforces the policy, into a private directory and read from there.

A registry that is out of reach for a moment is asked again (``retry``); nothing local is.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self, runtime_checkable

from hostimaged.errors import DigestMismatch, SignatureRejected
from hostimaged.oci.policy import requirement
from hostimaged.oci.reference import ImageReference, Transport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from hostimaged.ids import DiffId, SourceDigest
    from hostimaged.oci.models import Descriptor
    from hostimaged.oci.policy import Requirements
    from hostimaged.oci.storage.layer import OpenFile
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest as a source gives it: the manifest for this machine where the name is that of a list.

    ``source_digest`` is the source's digest of the manifest in its original form. It is the sha256 of
    ``raw``, save for images in docker's format, where ``raw`` is a conversion to OCI.
    """

    raw: bytes
    source_digest: SourceDigest


class BlobSource(Protocol):
    """Where blobs can be had. They may be read side by side, from several threads."""

    def blob(self, descriptor: Descriptor) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of a blob, as transferred, in pieces of up to 1 MiB.

        The iteration ends normally only if size and digest are the descriptor's, and raises
        ``DigestMismatch`` otherwise. Leaving the context early abandons the transfer.
        """


class ImageSource(BlobSource, Protocol):
    """One opened image. Methods may be called from several threads, and blobs read side by side."""

    def manifest(self) -> FetchedManifest:
        """The image's manifest, at most ``models.MAX_MANIFEST`` bytes."""

    def config(self, descriptor: Descriptor) -> bytes:
        """The configuration that the manifest names, at most ``models.MAX_CONFIG`` bytes.

        Raises ``DigestMismatch`` unless its bytes have the descriptor's digest and size.
        """

    def close(self) -> None:
        """Give up everything held; nothing else may be called afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class UnpackedLayer(NamedTuple):
    """The parts of a layer's tar, and how many bytes they are; -1 if that is not known."""

    parts: Iterator[bytes | OpenFile]
    size: int


@runtime_checkable
class UnpackedSource(ImageSource, Protocol):
    """A source that has layers as files, not as blobs."""

    @property
    def root(self) -> Path:
        """The directory that the files are in."""

    def unpacked(self, diff_id: DiffId) -> AbstractContextManager[UnpackedLayer]:
        """A layer's tar; whoever reads it verifies that it has the digest ``diff_id``."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How much is borne from a registry; times in seconds.

    One that gives no sign of life for ``silence`` is given up. What may pass is tried ``tries`` times before
    anything new was received: first after ``pause``, then after ``growth`` times as long, each time more or
    less by half at random, so that many hosts do not come back in step. Over the whole of a pull no more than
    ``retries``.
    """

    silence: float = 120.0
    tries: int = 4
    pause: float = 1.0
    growth: float = 3.0
    retries: int = 30


DEFAULT_PATIENCE: Final = Patience()


def open_source(
    reference: ImageReference,
    paths: HostPaths,
    work_dir: Path,
    reporter: Reporter,
    patience: Patience = DEFAULT_PATIENCE,
    *,
    look: bool = False,
    signed: bool = False,
    lock_timeout: float = 60.0,
) -> ImageSource:
    """Open ``reference``, by the way its transport and the signature policy allow.

    With ``look`` only manifest and configuration are wanted, so nothing is copied; an old proxy, which does
    not enforce the policy, is asked all the same.
    With ``signed`` a policy that would do without a signature is not enough.

    ``work_dir`` is an existing private directory for temporary files, which the caller removes. Call it from
    a thread that lives as long as the source is used: helper processes die with it. ``reporter.at`` is
    called while waiting, so that a cancelled job stops; ``reporter.message`` tells of what is tried again.

    Raises ``SignatureRejected`` before anything is opened where the policy says so; ``ImageNotFound``,
    ``RegistryAuth``, ``NetworkError``, ``UnsupportedImage``, ``ProgramMissing`` and ``StorageError`` for what
    stands in the way.
    """
    required = requirement(paths.containers.policy, reference)
    if required.rejects:
        raise SignatureRejected(f"the signature policy {paths.containers.policy} rejects {reference}")
    if signed and not required.demands_signature:
        raise SignatureRejected(
            f"what follows {reference} demands signatures, but the signature policy "
            f"{paths.containers.policy} does not"
        )
    if reference.transport is Transport.OCI and required.accepts_anything:
        from hostimaged.oci.layout import LayoutSource

        layout = LayoutSource(reference)
        if not layout.needs_conversion:
            return layout
        layout.close()
    if reference.transport is Transport.CONTAINERS_STORAGE:
        return _open_storage(reference, paths, required, reporter, lock_timeout)
    from hostimaged.oci.skopeo import open_image

    opened = partial(
        open_image,
        reference,
        paths.containers,
        work_dir,
        reporter,
        verify=not required.accepts_anything,
        look=look,
        silence=patience.silence,
    )
    if reference.transport is not Transport.DOCKER:
        return opened()
    from hostimaged.oci.retry import RetryingSource

    return RetryingSource(opened, reporter, patience)


def _open_storage(
    reference: ImageReference,
    paths: HostPaths,
    required: Requirements,
    reporter: Reporter,
    lock_timeout: float,
) -> ImageSource:
    if not required.accepts_anything:
        raise SignatureRejected(
            f"the signature policy {paths.containers.policy} asks for more than can be checked of "
            f"{reference}: signatures of images in containers-storage are not"
        )
    from hostimaged.oci.storage.source import StorageSource

    # A host below a directory has a store of its own, whatever the environment says.
    environment = {} if paths.scratch_root is not None else os.environ
    return StorageSource(
        reference,
        paths.containers.storage,
        environment,
        lock_timeout=lock_timeout,
        check=lambda: reporter.at("source.waiting"),
    )


def verified(chunks: Iterator[bytes], descriptor: Descriptor, what: str) -> Iterator[bytes]:
    """Pass ``chunks`` on; ends normally only if they are the ``what`` that ``descriptor`` names.

    Raises ``DigestMismatch``: for bytes too many at once, otherwise at the end.
    """
    sha256 = hashlib.sha256()
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > descriptor.size:
            raise wrong_size(descriptor, what, "more")
        sha256.update(chunk)
        yield chunk
    if received != descriptor.size:
        raise wrong_size(descriptor, what, f"{received} bytes")
    actual = "sha256:" + sha256.hexdigest()
    if actual != descriptor.digest:
        raise DigestMismatch(what=what, expected=descriptor.digest, actual=actual)


def wrong_size(descriptor: Descriptor, what: str, actual: str) -> DigestMismatch:
    """The error for a ``what`` that is not as long as its descriptor says."""
    return DigestMismatch(
        what=f"{what} {descriptor.digest}", expected=f"{descriptor.size} bytes", actual=actual
    )
