"""Removing images from bootc's own containers-storage, by podman; what stays is decided in ``storekeep``.

Only that store is ever touched. An image is removed by its id, after its names are: podman refuses to remove
one with several names by its id. Nothing is forced, so what a container uses since stays, and nothing else is
pruned with it: podman would take parents without a name along. Whatever interrupts this, doing it again ends
the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import Cancelled, HostimageError
from hostimaged.host import storerecord
from hostimaged.host.storekeep import LOCK_TIMEOUT
from hostimaged.oci.storage import owned
from hostimaged.oci.storage.leftovers import sweep
from hostimaged.oci.storage.store import Store

if TYPE_CHECKING:
    from hostimaged.host.session import Session
    from hostimaged.host.storeplan import StorePlan
    from hostimaged.system.paths import HostPaths

#: Images for one call of podman, as in bootc.
BATCH: Final = 100
#: Names that a result tells.
_TOLD: Final = 100


def remember(paths: HostPaths, plan: StorePlan) -> None:
    """Write down which images are needed now: when they are not any more, they go at once.

    In doubt it stays as it is. Raises what writing raises.
    """
    if plan.doubts:
        return
    there = {image.id for image, _ in plan.stay} | {image.id for image in plan.gone}
    storerecord.write(paths.store_record, (storerecord.read(paths.store_record) | plan.needed) & there)


def remove(session: Session, plan: StorePlan) -> dict[str, Any]:
    """Remove what goes, images before layers that nobody has. The result has ``store-problem`` if some of it
    is still there, and says why.

    Raises ``Cancelled``. A podman that fails is no error: all else is collected.
    """
    problem = "podman kept them"
    try:
        with owned.podman(
            session.paths, session.work, lambda: session.reporter.at("collect.podman")
        ) as podman:
            for image in plan.gone:
                if len(image.names) > 1:
                    podman.untag(image.id, *image.names)
            for start in range(0, len(plan.gone), BATCH):
                podman.remove(image.id for image in plan.gone[start : start + BATCH])
                session.reporter.at("collect.store")
            if plan.layers:
                with Store.open(session.paths.store, lock_timeout=LOCK_TIMEOUT) as store:
                    sweep(store, podman, plan.spared)
    except Cancelled:
        raise
    except HostimageError as error:
        problem = error.message
    left = _left(session, plan)
    if not left:
        return {}
    return {"store-problem": f"{', '.join(left[:_TOLD])} could not be removed: {problem}"}


def _left(session: Session, plan: StorePlan) -> list[str]:
    """What should be gone, and is still there or may be, for people."""
    images, layers = {image.id for image in plan.gone}, set(plan.layers)
    try:
        with Store.open(session.paths.store, lock_timeout=LOCK_TIMEOUT) as store:
            images &= {image.id for image in store.images()}
            layers &= store.layer_facts().keys()
    except HostimageError as error:
        return [error.message]
    return [
        *(image.called for image in plan.gone if image.id in images),
        *(f"layer {layer}" for layer in sorted(layers)),
    ]
