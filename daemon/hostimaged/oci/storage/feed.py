"""An image of which the repository has layers that the store lacks: only what neither has is downloaded.

podman knows nothing of the repository, and would fetch all. So a directory is made of the image, in the form
of ``dir:``: layers of the repository as the tars they were, those that are nowhere as they are fetched, and
none of those that the store has, which skopeo finds there by the digests of their tars. The store then has a
manifest of its own, with these digests; the one of the source goes to the repository.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from hostimaged.composefs.splitstream import cat
from hostimaged.errors import from_os_error
from hostimaged.oci.layers import UNCOMPRESSED
from hostimaged.oci.storage.podman import LOCATION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hostimaged.composefs.fsverity import Buffer
    from hostimaged.composefs.repository import Repository
    from hostimaged.ids import ConfigDigest
    from hostimaged.oci.layers import LayerPlan
    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.source import ImageSource
    from hostimaged.oci.storage.podman import Podman
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import ContainersConfig

_VERSION: Final = "Directory Transport Version: 1.1\n"


class Feeding:
    """A ``Transfer`` of ``reference``, whose ``manifest`` is OCI's.

    ``plans`` are all its layers. Those in ``here`` are in the repository and not in the store; what is
    neither there nor ``missing`` is in the store. ``opened`` opens the source, for what is missing.
    """

    def __init__(
        self,
        containers: ContainersConfig,
        reference: ImageReference,
        repository: Repository,
        manifest: bytes,
        config: tuple[ConfigDigest, bytes],
        plans: Sequence[LayerPlan],
        here: Sequence[LayerPlan],
        opened: Callable[[], AbstractContextManager[ImageSource]],
    ) -> None:
        self._policy = str(containers.policy)
        self._reference = reference
        self._repository = repository
        self._manifest = manifest
        self._config_digest, self._config = config
        self._plans = plans
        self._here = here
        self._opened = opened

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """See ``Transfer``."""
        directory = podman.work_dir / "feed"
        try:
            directory.mkdir()
            (directory / "version").write_text(_VERSION)
            (directory / "manifest.json").write_bytes(self._changed_manifest(missing))
            (directory / self._config_digest.hex).write_bytes(self._config)
            for plan in self._here:
                self._write_tar(directory, plan, reporter)
            self._fetch(directory, missing, reporter)
        except OSError as error:
            raise from_os_error(error, f"cannot put {self._reference} together") from error
        podman.run(
            ["--policy", self._policy, "copy", "--quiet", f"dir:{directory}", f"{LOCATION}{name}"],
            reference=self._reference,
            program="skopeo",
        )
        return self._config_digest.hex

    def _changed_manifest(self, missing: Mapping[str, int]) -> bytes:
        """The manifest with the digests of tars, save for what is fetched."""
        manifest = json.loads(self._manifest)
        for entry, plan in zip(manifest["layers"], self._plans, strict=True):
            if plan.descriptor.digest not in missing:
                entry |= {"mediaType": UNCOMPRESSED, "digest": str(plan.id)}
        return json.dumps(manifest).encode()

    def _write_tar(self, directory: Path, plan: LayerPlan, reporter: Reporter) -> None:
        with (
            (directory / plan.id.hex).open("wb") as file,
            self._repository.open_stream(plan.stream, None, plan.content_type) as stream,
        ):

            def write(piece: Buffer) -> None:
                reporter.at("fetch.feeding")
                file.write(piece)

            cat(stream, self._repository, write)

    def _fetch(self, directory: Path, missing: Mapping[str, int], reporter: Reporter) -> None:
        wanted = {plan.descriptor.digest: plan.descriptor for plan in self._plans}
        descriptors = [wanted[digest] for digest in missing]
        if not descriptors:
            return
        with self._opened() as source:
            for descriptor in descriptors:
                path = directory / descriptor.digest.removeprefix("sha256:")
                with path.open("wb") as file, source.blob(descriptor) as chunks:
                    for chunk in chunks:
                        reporter.at("fetch.feeding")
                        reporter.advance(len(chunk))
                        file.write(chunk)
