"""What bootc kept of an image beside the origin, from December 2025 to May 2026 (``<id>.imginfo``).

Facts: deployments.md 5. It is read where the origin names no manifest, and never written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostimaged.errors import DamagedState, HostimageError
from hostimaged.host.statefile import read_state_file
from hostimaged.oci.models import (
    MAX_CONFIG,
    MAX_MANIFEST,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest,
)

if TYPE_CHECKING:
    from hostimaged.ids import DeploymentId

#: A manifest and a configuration.
MAX_SIZE: Final = MAX_MANIFEST + MAX_CONFIG


@dataclass(frozen=True, slots=True)
class ImgInfo:
    """Manifest and configuration of an old deployment.

    ``manifest_sha256``: hex digest of the manifest as it stands there. bootc wrote it anew, so it may differ
    from that of any registry.
    """

    manifest: Manifest
    config: ImageConfig
    manifest_sha256: str

    @classmethod
    def parse(cls, data: bytes, name: str) -> ImgInfo:
        """The two in ``data``; raises ``DamagedState``."""
        if len(data) > MAX_SIZE:
            raise DamagedState(f"it is larger than {MAX_SIZE} bytes", file=name)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise DamagedState("it is not JSON", file=name) from None
        if not isinstance(found, dict) or not {"manifest", "config"} <= found.keys():
            raise DamagedState("it is no object with a manifest and a config", file=name)
        try:
            raw = _compact(found["manifest"])
            return cls(
                parse_manifest(raw), parse_config(_compact(found["config"])), hashlib.sha256(raw).hexdigest()
            )
        except HostimageError as error:
            raise DamagedState(error.message, file=name) from None
        except (ValueError, RecursionError):
            # A lone surrogate, or a number of too many digits.
            raise DamagedState("it has values that JSON cannot have", file=name) from None


def _compact(value: object) -> bytes:
    """JSON as bootc writes it: members in their order, no white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def imginfo_name(id_: DeploymentId) -> str:
    """File name of the sidecar of ``id_`` in its directory."""
    return f"{id_}.imginfo"


def read_imginfo(directory: int, id_: DeploymentId) -> ImgInfo | None:
    """The sidecar in the state directory open as ``directory``; None if there is none.

    Raises ``DamagedState`` or ``StorageError``.
    """
    name = imginfo_name(id_)
    data = read_state_file(directory, name, MAX_SIZE)
    return None if data is None else ImgInfo.parse(data, name)
