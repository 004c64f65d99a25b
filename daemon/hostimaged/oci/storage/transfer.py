"""How an image comes into the store of the host: podman downloads it, or skopeo copies it from another store.

podman tells bytes from 5.9 on, over its API; before that it names what it copies, and the bytes are those of
the files that it keeps until they are unpacked. Out of another store ``podman image push`` would do the same
as ``skopeo copy`` (bootc uses it); but with mounts of its own podman would take the machine for one that was
just booted, and forget which containers of root's own store run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

from hostimaged.errors import StorageError
from hostimaged.oci.reference import Transport
from hostimaged.oci.storage.podman import LOCATION
from hostimaged.system.paths import CONTAINERS_HOME, STORE_RUNS
from hostimaged.system.workdir import used_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hostimaged.oci.reference import ImageReference
    from hostimaged.oci.storage.podman import Podman
    from hostimaged.oci.storage.store import StoredImage
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: The first podman whose API tells the bytes of a pull.
TELLS_BYTES: Final = (5, 9)
_ID: Final = re.compile(r"[0-9a-f]{64}")
_SKIPPED: Final = re.compile(r"Copying blob (?:sha256:)?([0-9a-f]{12,64})\S* skipped")


class Transfer(Protocol):
    """A way for an image to come into the store."""

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """Put the image into the store of ``podman``; gives its id.

        Under ``name``, save what podman names itself. ``missing``: digests and sizes of blobs that are not
        there; ``reporter`` is told of their bytes.
        """


class Downloading:
    """podman fetches ``reference``."""

    def __init__(self, reference: ImageReference) -> None:
        self._reference = reference

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """See ``Transfer``."""
        count = Count(missing, podman.work_dir, reporter)
        from_registry = self._reference.transport is Transport.DOCKER
        if from_registry and podman.version() >= TELLS_BYTES:
            from hostimaged.oci.storage.service import pull

            image_id = pull(podman, name, self._reference, count)
        else:
            said = podman.run(
                ["pull", name if from_registry else str(self._reference)],
                reference=self._reference,
                said=count.line,
                looked=count.look,
            )
            found = _ID.findall(said.decode("ascii", "replace"))
            image_id = found[-1] if found else ""
        if not _ID.fullmatch(image_id):
            raise StorageError(f"podman does not say what {self._reference} is")
        count.finish()
        return image_id


class Copying:
    """skopeo copies ``image`` of another store, for ``reference``."""

    def __init__(self, paths: HostPaths, reference: ImageReference, image: StoredImage) -> None:
        self._reference = reference
        self._image_id = image.id
        root = image.store.root
        if root == paths.containers.storage:
            root = CONTAINERS_HOME / root.name
        self._source = f"containers-storage:[overlay@{root}+{STORE_RUNS}]@{image.id}"
        self._options = ["--policy", str(paths.containers.policy)]

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """See ``Transfer``."""
        count = Count(missing, podman.work_dir, reporter)
        podman.run(
            [*self._options, "copy", "--quiet", "--remove-signatures", self._source, f"{LOCATION}{name}"],
            reference=self._reference,
            looked=count.look,
            program="skopeo",
        )
        count.finish()
        return self._image_id


class Count:
    """Tells the reporter of bytes of ``missing`` blobs: each once, and no more than there are."""

    def __init__(self, missing: Mapping[str, int], work_dir: Path, reporter: Reporter) -> None:
        self._sizes = missing
        self._total = sum(missing.values())
        self._work_dir = work_dir
        self._used_before = used_bytes(work_dir)
        self._done: dict[str, int] = {}
        self._told = 0
        self._reporter = reporter

    def look(self) -> None:
        """See how much is in temporary files."""
        skipped = sum(self._done.values())
        self._tell(skipped + used_bytes(self._work_dir) - self._used_before)

    def line(self, line: str) -> None:
        """podman says something: of a blob that it has already, for one."""
        found = _SKIPPED.match(line)
        if found is not None:
            for digest in self._sizes:
                if digest.removeprefix("sha256:").startswith(found[1]):
                    self._done[digest] = self._sizes[digest]

    def component(self, digest: str, current: int, *, whole: bool = False) -> None:
        """podman tells bytes: ``current`` of a blob, or all of it."""
        size = self._sizes.get(digest)
        if size is not None:
            done = size if whole else min(max(current, 0), size)
            self._done[digest] = max(self._done.get(digest, 0), done)
            self._tell(sum(self._done.values()))

    def finish(self) -> None:
        """All is there."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        done = min(done, self._total)
        if done > self._told:
            self._reporter.advance(done - self._told)
            self._told = done
