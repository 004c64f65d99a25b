"""The host document of ``bootc status --format-version=1``, with the values that bootc would give.

Facts: deployments.md 9 and 10 (bootc 1.16). Where bootc gives up because of one damaged deployment, that one
has no image here, or is left out if bootc would not show it; the flag of optional fs-verity stays true after
a soft reboot, too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from hostimaged.host.model import BootType, Deployment, HostState, ImageFacts, Role
from hostimaged.oci.times import utc_text

if TYPE_CHECKING:
    from hostimaged.host.imgref import OriginReference

_VERSION: Final = "org.opencontainers.image.version"
_TYPES: Final = {BootType.BLS: "Bls", BootType.UKI: "Uki"}


def render(document: dict[str, Any]) -> str:
    """The document as bootc prints it: canonical JSON."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def document(state: HostState) -> dict[str, Any]:
    """The document; all is null on a host that does not run from composefs."""
    booted = state.booted_deployment
    shown = state.visible if booted is not None else ()
    # bootc passes over those without an origin; the one that runs is too important for that.
    extras = [
        row
        for row in shown
        if row.role in (Role.ROLLBACK, Role.OTHER) and row.live is not None and row.origin is not None
    ]
    staged = state.staged_deployment if shown else None
    queued = bool(shown) and state.rollback_queued
    status: dict[str, Any] = {
        "staged": _entry(state, staged),
        "booted": _entry(state, booted),
        "rollback": _entry(state, extras[0] if extras else None),
        "rollbackQueued": queued,
        "type": None,
        "usrOverlay": _overlay(state) if shown else None,
        "readOnly": bool(shown) and state.read_only,
    }
    if len(extras) > 1:
        status["otherDeployments"] = [_entry(state, row) for row in extras[1:]]
    return {
        "apiVersion": "org.containers.bootc/v1",
        "kind": "BootcHost",
        "metadata": {"name": "host"},
        "spec": {
            "image": _spec_image(staged or booted),
            "bootOrder": "rollback" if queued else "default",
        },
        "status": status,
    }


def _spec_image(row: Deployment | None) -> dict[str, Any] | None:
    if row is None or row.origin is None or row.origin.reference is None:
        return None
    return _reference(row.origin.reference)


def _overlay(state: HostState) -> dict[str, str] | None:
    if not state.usr_overlay:
        return None
    return {"accessMode": state.usr_overlay, "persistence": "transient"}


def _entry(state: HostState, row: Deployment | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "image": _image(row),
        "cachedUpdate": None,
        "incompatible": False,
        "pinned": False,
        "softRebootCapable": row.soft_reboot.capable,
        "downloadOnly": row.locked,
        "store": None,
        "ostree": None,
        "composefs": {
            "verity": str(row.id),
            "bootType": _TYPES[row.boot_type or BootType.BLS],
            "bootloader": str(state.loader),
            "bootDigest": None if row.boot_digest is None else row.boot_digest.hex,
            "missingVerityAllowed": state.booted is not None and state.booted.optional,
        },
    }


def _image(row: Deployment) -> dict[str, Any] | None:
    facts = row.image
    if facts is None or row.origin is None or row.origin.reference is None:
        return None
    return {
        "image": _reference(row.origin.reference),
        # Of labels bootc takes no notice for composefs hosts.
        "version": facts.annotations.get(_VERSION),
        "timestamp": utc_text(facts.created),
        "imageDigest": _digest(facts),
        "architecture": facts.architecture,
    }


def _digest(facts: ImageFacts) -> str:
    """The manifest's digest; of an unknown one that of what bootc kept of it, which bootc shows as well."""
    return str(facts.manifest_digest or f"sha256:{facts.sidecar_digest}")


def _reference(reference: OriginReference) -> dict[str, Any]:
    found: dict[str, Any] = {"image": reference.name, "transport": reference.transport_label}
    if reference.signature is not None:
        found["signature"] = reference.signature
    return found
