"""What scans find, as it is taken in from workers: models of the host's state."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Size = Annotated[int, Field(ge=0, lt=1 << 53)]


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


class _Found(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=_hyphens, populate_by_name=True)


class ImageRow(_Found):
    """An image of the repository; None where unknown. ``pulled`` is in seconds since the epoch."""

    tag: str | None = None
    manifest_digest: str | None = None
    config_digest: str | None = None
    reference: str | None = None
    source_digest: str | None = None
    pulled: _Size | None = None
    version: str | None = None
    size: _Size | None = None
    image_ids: list[str] | None = None
    artifact: bool = False
    deployed: bool = False
    problem: str | None = None


class RepositoryRow(_Found):
    """The repository; ``used`` is in bytes."""

    algorithm: str
    formats: list[str]
    secure: bool
    used: _Size


class Problem(_Found):
    """Something wrong on this host."""

    id: str
    severity: Literal["error", "warning"] = "error"
    text: str


class DeploymentRow(_Found):
    """An installed operating system; ``timestamp`` is in microseconds since the epoch, 0 unknown.

    ``verity`` and ``boot_type`` as the properties of a Deployment on the bus.
    """

    id: str = Field(pattern=r"^[0-9a-f]{32,128}$")
    image: str = ""
    image_digest: str = ""
    config_digest: str = ""
    version: str = ""
    timestamp: _Size = 0
    boot_type: str = "bls"
    boot_entries: list[str] = Field(default_factory=list)
    kernel_arguments: str = ""
    booted: bool = False
    staged: bool = False
    is_rollback: bool = False
    pinned: bool = False
    locked: bool = False
    soft_reboot_capable: bool = False
    verity: Literal["ok", "unverified", "broken"] = "unverified"
    order: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    size_exclusive: _Size = 0


class Findings(_Found):
    """What a scan found (``hostimaged.oci.scan``)."""

    deployments: list[DeploymentRow] = Field(default_factory=list)
    rollback_queued: bool = False
    unified: bool = False
    repository: RepositoryRow | None = None
    images: list[ImageRow] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)
