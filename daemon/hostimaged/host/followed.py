"""How deployments follow an image: under which reference, and what that demands of signatures.

The name of an image alone says nothing of signatures; the origin of a deployment does (deployments.md 4.3).
``ostree-image-signed`` is enforced by the signature policy, which then has to demand a signature of the image
itself: what it would accept anyhow is refused, as ostree-ext does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostimaged.composefs.repository import Repository
from hostimaged.errors import HostimageError
from hostimaged.host.imgref import OriginReference, Scheme
from hostimaged.host.read import read_host

if TYPE_CHECKING:
    from hostimaged.host.model import HostState
    from hostimaged.oci.reference import ImageReference
    from hostimaged.system.paths import HostPaths


def followed(state: HostState, wanted: OriginReference) -> OriginReference:
    """The reference to follow ``wanted`` by: as what is staged, or runs, has it if it is of the same image.

    Then it stays as it is written, with what it demands; another image is followed as ``wanted`` says.
    """
    rows = (state.staged_deployment, state.booted_deployment)
    known = [row.origin.reference for row in rows if row is not None and row.origin is not None]
    return next((each for each in known if each is not None and each.names_same(wanted)), wanted)


def demands_signature(paths: HostPaths, image: ImageReference) -> bool:
    """Whether what is staged, or runs, follows ``image`` only as far as it is signed. Takes no lock."""
    try:
        repository = Repository.open_unlocked(paths.repository)
    except HostimageError:
        # Origins are beside it.
        state = read_host(paths, None)
    else:
        with repository:
            state = read_host(paths, repository)
    return followed(state, OriginReference.of(image)).scheme is Scheme.SIGNED
