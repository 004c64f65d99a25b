"""Unified storage of a host: whether its images are in the store as well, and how that begins and ends.

A host is unified if the settings say so, or if the image that it follows, or one that runs or is staged, is
in the store under its name (bootc). So it stays once it is, also when another image is followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository, RepositoryMissing, Verity
from hostimaged.errors import HostimageError, InvalidReference
from hostimaged.host.followed import demands_signature
from hostimaged.host.read import read_host
from hostimaged.host.session import optional_verity
from hostimaged.host.storelabels import labeller
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.fetch import Wanted, fetch_image
from hostimaged.oci.storage.naming import name_in_store
from hostimaged.progress import Phase
from hostimaged.system.workdir import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Names that a scan tells of at most; a store has some dozens.
MAX_NAMES: Final = 1000


def stored_names(paths: HostPaths) -> list[str]:
    """The names of the images in the store, for the status; takes no lock, and creates nothing.

    [] for a store that cannot be read: then nothing is in it that could be used.
    """
    try:
        store = owned.open_store(paths)
        if store is None:
            return []
        with store:
            return store.names()[:MAX_NAMES]
    except HostimageError:
        return []


def begin(
    paths: HostPaths, reference: str, *, verity: str, lock_timeout: float, reporter: Reporter
) -> dict[str, Any]:
    """Have ``reference`` in the store: out of root's own store if that has it, else from its source.

    Nothing is imported. See ``fetch_image``.
    """
    image = ImageReference.parse(reference)
    signed = demands_signature(paths, image)
    fetched = fetch_image(
        paths,
        Wanted(image, signed=signed, imports=False, local_first=True),
        verity=Verity(verity),
        lock_timeout=lock_timeout,
        reporter=reporter,
        label=labeller(paths),
    )
    return fetched.as_dict() | {"changed": fetched.bytes_fetched > 0}


def end(paths: HostPaths, reference: str, *, lock_timeout: float, reporter: Reporter) -> dict[str, Any]:
    """Remove from the store the names of ``reference``, if given, and of the images of deployments.

    An image with other names stays, and so does all that is in the repository. Raises as podman does.
    """
    reporter.phase(Phase.DELETING)
    try:
        with Repository.open(
            paths.repository,
            lock_timeout=lock_timeout,
            insecure=optional_verity(paths),
            check=lambda: reporter.at("unify.lock"),
        ) as repository:
            rows = read_host(paths, repository).visible
            references = [row.origin.reference for row in rows if row.origin is not None]
            texts = [reference, *(each.image_text for each in references if each is not None)]
            names = sorted(set(_names(texts)) & set(stored_names(paths)))
            if names:
                with (
                    private_directory(paths.temporary, "unify-") as work_dir,
                    owned.podman(paths, work_dir, lambda: reporter.at("unify.waiting")) as podman,
                ):
                    podman.remove(names)
    except RepositoryMissing:
        names = []
    return {"unified": False, "removed": names, "changed": bool(names)}


def _names(references: Iterable[str]) -> Iterable[str]:
    for text in references:
        try:
            yield name_in_store(ImageReference.parse(text))
        except InvalidReference:
            continue
