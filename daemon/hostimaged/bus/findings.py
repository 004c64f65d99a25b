"""What scans find, as it is taken in from workers: models of the host's state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Size = Annotated[int, Field(ge=0, lt=1 << 53)]
#: No D-Bus message holds a NUL: the bus ends the connection that sends one.
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


class _Found(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=_hyphens, populate_by_name=True)


class ImageRow(_Found):
    """An image of the repository; None where unknown. ``pulled`` is in seconds since the epoch."""

    tag: _Text | None = None
    manifest_digest: _Text | None = None
    config_digest: _Text | None = None
    reference: _Text | None = None
    source_digest: _Text | None = None
    pulled: _Size | None = None
    version: _Text | None = None
    size: _Size | None = None
    image_ids: list[_Text] | None = None
    artifact: bool = False
    deployed: bool = False
    problem: _Text | None = None


class RepositoryRow(_Found):
    """The repository; ``used`` is in bytes."""

    algorithm: _Text
    formats: list[_Text]
    secure: bool
    used: _Size


class Problem(_Found):
    """Something wrong on this host."""

    id: _Text
    severity: Literal["error", "warning"] = "error"
    text: _Text


class DeploymentRow(_Found):
    """An installed operating system; ``timestamp`` is in microseconds since the epoch, 0 unknown.

    ``verity`` and ``boot_type`` as the properties of a Deployment on the bus.
    """

    id: _Text = Field(pattern=r"^[0-9a-f]{32,128}$")
    image: _Text = ""
    image_digest: _Text = ""
    config_digest: _Text = ""
    version: _Text = ""
    timestamp: _Size = 0
    architecture: _Text = ""
    boot_digest: _Text = ""
    boot_type: _Text = "bls"
    boot_entries: list[_Text] = Field(default_factory=list)
    kernel_arguments: _Text = ""
    booted: bool = False
    staged: bool = False
    is_rollback: bool = False
    default: bool = False
    pinned: bool = False
    locked: bool = False
    soft_reboot_capable: bool = False
    soft_reboot_obstacle: _Text = ""
    verity: Literal["ok", "unverified", "broken"] = "unverified"
    order: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    size_exclusive: _Size = 0
    problems: list[Problem] = Field(default_factory=list)


class HostRow(_Found):
    """The host as a whole; ``next`` is the id of what an orderly reboot boots, or empty."""

    bootloader: _Text
    next: _Text = ""
    soft_rebooted: bool = False
    transient_root: bool = False
    verity_optional: bool = False
    usr_overlay: _Text = ""
    read_only: bool = False


class Findings(_Found):
    """What a scan found (``hostimaged.host.status``); ``bootc`` is the host document of bootc."""

    deployments: list[DeploymentRow] = Field(default_factory=list)
    rollback_queued: bool = False
    host: HostRow | None = None
    bootc: dict[str, Any] = Field(default_factory=dict)
    unified: bool = False
    repository: RepositoryRow | None = None
    images: list[ImageRow] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)
