"""The settings of the administrator: a TOML file and drop-ins, read into a model with defaults.

A mistake in a file costs the setting it is in, never the start of the daemon; each is told as a problem.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hostimaged.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: Settings are a few lines; whatever is longer is not a settings file.
_MAX_FILE: Final = 64 << 10
_MAX_FILES: Final = 100

LogLevel = Literal["debug", "info", "notice", "warning", "error"]


class Settings(BaseModel):
    """What an administrator can set; names in the files have hyphens.

    ``tracked_image``: the image that is meant where a call names none and no deployment tells. ``verity``:
    whether a new repository may be on a file system without fs-verity. ``lock_timeout``: seconds a job waits
    for a lock. ``max_live_entries``: deployments in the boot menu; beyond two, pinned ones get an entry, and
    bootc refuses to roll back. ``keep_pulled``: days that a pulled image stays which is not that to follow.
    ``minimum_free``: MiB on the file system of the repository; where less is free, such an image goes before.
    ``unified``: pull through the containers-storage of the host, which shares its files with the repository.
    ``update_policy``: how far updates go without being asked, until somebody chooses (SetUpdatePolicy).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=False,
    )

    tracked_image: str = Field(default="", max_length=4096)
    verity: Literal["require", "opportunistic"] = "require"
    lock_timeout: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)
    log_level: LogLevel = "info"
    #: Entries of the boot menu: bootc's rollback insists on two.
    max_live_entries: int = Field(default=2, ge=2, le=10)
    keep_pulled: int = Field(default=30, ge=0, le=36500)
    minimum_free: int = Field(default=0, ge=0, le=1 << 32)
    unified: bool = False
    update_policy: Literal["none", "check", "download", "stage"] = "none"


@dataclass(frozen=True, slots=True)
class SettingsProblem:
    """A mistake in a settings file: the file and what is wrong, for people."""

    file: str
    text: str


def load(paths: Sequence[Path]) -> tuple[Settings, list[SettingsProblem]]:
    """Read the settings: a file, then directories of ``*.toml`` drop-ins in rising order of precedence.

    A drop-in replaces single settings. As with systemd's drop-ins, one in a later directory hides one of the
    same name in an earlier one.
    """
    problems: list[SettingsProblem] = []
    values: dict[str, Any] = {}
    for file in _files(paths, problems):
        values |= _read(file, problems)
    return Settings.model_validate(values), problems


def _files(paths: Sequence[Path], problems: list[SettingsProblem]) -> Iterable[Path]:
    first, *directories = paths
    drop_ins: dict[str, Path] = {}
    for directory in directories:
        try:
            names = [name for name in os.listdir(directory) if name.endswith(".toml")]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problems.append(SettingsProblem(str(directory), f"cannot be read: {error.strerror}"))
            continue
        drop_ins |= {name: directory / name for name in names}
    if len(drop_ins) > _MAX_FILES:
        problems.append(SettingsProblem(str(directories[-1]), f"more than {_MAX_FILES} drop-ins"))
    return [first, *(drop_ins[name] for name in sorted(drop_ins)[:_MAX_FILES])]


def _read(file: Path, problems: list[SettingsProblem]) -> dict[str, Any]:
    """The usable settings of one file."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_FILE + 1)
        if len(raw) > _MAX_FILE:
            raise ValueError(f"longer than {_MAX_FILE >> 10} KiB")
        values = tomllib.loads(raw.decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(SettingsProblem(str(file), f"cannot be read: {error.strerror}"))
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(SettingsProblem(str(file), printable(error) or "not TOML"))
        return {}
    return _usable(file, values, problems)


def _usable(file: Path, values: dict[str, Any], problems: list[SettingsProblem]) -> dict[str, Any]:
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False, include_context=False):
            key = str(detail["loc"][0])
            text = "unknown setting" if detail["type"] == "extra_forbidden" else detail["msg"]
            problems.append(SettingsProblem(str(file), printable(f"{key}: {text}")))
            values.pop(key, None)
    return values
