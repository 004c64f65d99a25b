"""What scans find, as it is taken in from workers: models of the host's state."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostimaged.errors import printable

#: Rows of a kind that are told each as a problem of its own, and characters of their names.
_TOLD: Final = 8
_NAME: Final = 128

_Size = Annotated[int, Field(ge=0, lt=1 << 53)]
#: No D-Bus message holds a NUL: the bus ends the connection that sends one.
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]

#: Not made of ``_Text``: of two patterns for one field only the inner one would count.
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32,128}$")]


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


class Hyphened(BaseModel):
    """What a worker tells: names have hyphens there, and what is not known is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=_hyphens, populate_by_name=True)


class ImageRow(Hyphened):
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


class RepositoryRow(Hyphened):
    """The repository; ``used`` and ``reclaimable``, None where a scan did not look, are in bytes."""

    algorithm: _Text
    formats: list[_Text]
    secure: bool
    used: _Size | None = None
    reclaimable: _Size | None = None


class Problem(Hyphened):
    """Something wrong on this host."""

    id: _Text
    severity: Literal["error", "warning"] = "error"
    text: _Text


class BoundImage(Hyphened):
    """An image that a deployment is bound to; ``present``: whether it is there, None if nobody can tell."""

    image: _Text
    present: bool | None = None


class DeploymentRow(Hyphened):
    """An installed operating system; ``timestamp`` is in microseconds since the epoch, 0 unknown.

    ``verity`` and ``boot_type`` as the properties of a Deployment on the bus.
    """

    id: _Id
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
    bound_images: list[BoundImage] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)


class HostRow(Hyphened):
    """The host as a whole; ``next`` is the id of what an orderly reboot boots, or empty."""

    bootloader: _Text
    next: _Text = ""
    soft_rebooted: bool = False
    transient_root: bool = False
    verity_optional: bool = False
    usr_overlay: _Text = ""
    read_only: bool = False


class Findings(Hyphened):
    """What a scan found (``hostimaged.host.status``); ``bootc`` is the host document of bootc.

    ``rollback_ordered``: the one that is queued was asked for since the boot, of us. ``contents``: what
    sizes of deployments depend on (``hostimaged.host.sizes``). ``stored_names``: what is in the store of the
    host, by name.
    """

    deployments: list[DeploymentRow] = Field(default_factory=list)
    rollback_queued: bool = False
    rollback_ordered: bool = False
    unsettled: bool = False
    host: HostRow | None = None
    bootc: dict[str, Any] = Field(default_factory=dict)
    stored_names: Annotated[list[_Text], Field(max_length=1000)] = Field(default_factory=list)
    contents: _Text = ""
    repository: RepositoryRow | None = None
    images: list[ImageRow] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)


_Row = TypeVar("_Row", ImageRow, DeploymentRow)


def take_findings(status: dict[str, Any]) -> Findings:
    """What a scan found; a deployment or an image that cannot be told of costs a problem, not the rest.

    Raises ``ValidationError`` if anything else is not as it should be.
    """
    problems: list[Problem] = []
    rows = {
        "deployments": _good(DeploymentRow, "deployment", ("id",), status.get("deployments", []), problems),
        "images": _good(ImageRow, "image", ("tag", "manifest-digest"), status.get("images", []), problems),
    }
    found = Findings.model_validate(status | rows)
    return found.model_copy(update={"problems": [*found.problems, *problems]})


def _good(
    model: type[_Row], what: str, names: tuple[str, ...], rows: object, problems: list[Problem]
) -> list[_Row] | object:
    """Those of ``rows`` that are right; ``rows`` itself if it is no list."""
    if not isinstance(rows, list):
        return rows
    good: list[_Row] = []
    bad: list[str] = []
    for row in rows:
        try:
            good.append(model.model_validate(row))
        except ValidationError as error:
            bad.append(f"{_name(row, names)} cannot be shown: {_reason(error)}")
    if len(bad) > _TOLD:
        bad[_TOLD:] = [f"and {len(bad) - _TOLD} more like it"]
    problems += [Problem(id=what, text=f"{what} {text}") for text in bad]
    return good


def _name(row: object, names: tuple[str, ...]) -> str:
    known = [row.get(name) for name in names] if isinstance(row, dict) else []
    return next(
        (printable(name)[:_NAME] for name in known if isinstance(name, str) and name), "without a name"
    )


def _reason(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
