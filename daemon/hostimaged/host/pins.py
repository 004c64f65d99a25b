"""Pinning: a deployment that stays, as a tag on its manifest that every collector of garbage heeds.

bootc has no pins. It sees a tag of other people and keeps the content; the state directory is kept by us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import PreconditionFailed
from hostimaged.host import reorder
from hostimaged.host.tags import pin_tag, stream_ref
from hostimaged.oci import images

if TYPE_CHECKING:
    from hostimaged.host.session import Session
    from hostimaged.ids import DeploymentId

#: Named points of ``Reporter.at``.
FAULT_POINTS: Final = ("pin.tagged", "pin.done")


def set_pinned(session: Session, id_: DeploymentId, *, pinned: bool) -> dict[str, Any]:
    """Pin a deployment, or let it go; ``result`` is ``pinned``, ``unpinned`` or ``unchanged``.

    Raises ``NoSuchDeployment``, and ``PreconditionFailed`` where the manifest is not in the repository.
    """
    state = reorder.begin(session)
    row = state.get(id_)
    digest = row.manifest_digest
    result = {"deployment": str(id_)}
    if row.pinned is pinned:
        return {"result": "unchanged", **result}
    if digest is None:
        raise PreconditionFailed(f"the repository does not know which image deployment {id_} is")
    repository = session.repository
    if pinned:
        images.tag(repository, pin_tag(digest), digest)
    else:
        repository.remove_stream_ref(stream_ref(pin_tag(digest)))
    session = session.steady()
    session.reporter.at("pin.tagged")
    repository.sync()
    session.reporter.at("pin.done")
    return {"result": "pinned" if pinned else "unpinned", **result}
