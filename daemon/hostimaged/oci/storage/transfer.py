"""How an image comes into the store: podman downloads it, or skopeo copies what is on the machine.

podman tells bytes from 5.9 on, over its API; before that it names what it copies, and the bytes are those of
the files that it keeps until they are unpacked. skopeo has the same code for storing, and is told the name:

* Out of another store bootc uses ``podman image push``; but with mounts of its own podman would take the
  machine for one that was just booted, and forget which containers of root's own store run.
* From files bootc uses ``podman pull``. Of ``oci:DIRECTORY:TAG`` podman 4.3 makes one name for all tags of a
  directory, and podman 5.4 stores the image, looks for it by its tag alone, and fails.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol, Self

from hostimaged.errors import StorageError
from hostimaged.oci.storage.podman import LOCATION
from hostimaged.system.paths import CONTAINERS_HOME, STORE_RUNS
from hostimaged.system.workdir import used_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hostimaged.ids import ConfigDigest
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
        """Put the image into the store of ``podman`` under ``name``; gives its id.

        ``missing``: digests and sizes of blobs that are not there; ``reporter`` is told of their bytes.
        """


class Downloading:
    """podman fetches ``reference`` from a registry."""

    def __init__(self, reference: ImageReference) -> None:
        self._reference = reference

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """See ``Transfer``."""
        count = Count(missing, podman.work_dir, reporter)
        if podman.version() >= TELLS_BYTES:
            from hostimaged.oci.storage.service import pull

            image_id = pull(podman, name, self._reference, count)
        else:
            said = podman.run(
                ["pull", name],
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
    """skopeo copies ``source``, in its notation, which is the image ``image_id``, for ``reference``."""

    def __init__(
        self, paths: HostPaths, reference: ImageReference, source: str, image_id: str, *options: str
    ) -> None:
        self._reference = reference
        self._source = source
        self._image_id = image_id
        self._policy = ["--policy", str(paths.containers.policy)]
        self._options = ["--quiet", *options]

    @classmethod
    def from_store(cls, paths: HostPaths, reference: ImageReference, image: StoredImage) -> Self:
        """The copy of ``image`` of another store."""
        root = image.store.root
        if root == paths.containers.storage:
            root = CONTAINERS_HOME / root.name
        source = f"containers-storage:[overlay@{root}+{STORE_RUNS}]@{image.id}"
        # They are for the name that it has there.
        return cls(paths, reference, source, image.id, "--remove-signatures")

    @classmethod
    def from_source(cls, paths: HostPaths, reference: ImageReference, config: ConfigDigest) -> Self:
        """The copy of an image whose configuration is ``config``, from where ``reference`` says.

        A path is given without its links, which may lead through what is hidden.
        """
        source = str(reference)
        if reference.real_path is not None:
            inner = f":{reference.inner}" if reference.inner else ""
            source = f"{reference.transport}:{reference.real_path}{inner}"
        return cls(paths, reference, source, config.hex)

    def run(self, podman: Podman, name: str, missing: Mapping[str, int], reporter: Reporter) -> str:
        """See ``Transfer``."""
        count = Count(missing, podman.work_dir, reporter)
        podman.run(
            [*self._policy, "copy", *self._options, self._source, f"{LOCATION}{name}"],
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
