"""What an image's ``setup-root-conf.toml`` says about ``/etc`` and ``/var`` (bootc, initramfs setup).

The initramfs has the copy that was there when it was built; the image's own is the best we can know.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

from hostimaged.errors import UnsupportedImage, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

#: From the root of the image.
PATH: Final = "usr/lib/composefs/setup-root-conf.toml"
#: It has five keys. The parser's depth is bounded by the size, and its time, by the square of it.
MAX_SIZE: Final = 16 << 10


class MountMode(StrEnum):
    """How a directory of the image becomes that of the running system."""

    #: The image's own directory is seen.
    NONE = "none"
    #: The directory of the deployment's state replaces it.
    BIND = "bind"
    #: An overlay whose upper directory is ``upper`` in that directory.
    OVERLAY = "overlay"
    #: An overlay whose upper directory is in memory: changes end with the boot.
    TRANSIENT = "transient"

    @property
    def persistent(self) -> bool:
        """Whether changes made in the running system outlive it."""
        return self in {MountMode.BIND, MountMode.OVERLAY}


_ALIASES: Final = {"root": MountMode.NONE, "volatile": MountMode.TRANSIENT}
_MODES: Final = {mode.value: mode for mode in MountMode} | _ALIASES


class SetupRootError(UnsupportedImage):
    """{path}: {detail}"""

    def __init__(self, detail: object) -> None:
        super().__init__(detail, path="/" + PATH)


class Files(Protocol):
    """The files of an image."""

    def read(self, path: str, limit: int) -> bytes | None:
        """Content of the regular file at ``path``; None if there is none."""


@dataclass(frozen=True, slots=True)
class SetupRoot:
    """The configuration; without one, and for what it leaves out, the defaults.

    ``var_given``: it says where ``/var`` is, which counts even where the kernel's command line asks for a
    volatile one.
    """

    transient_root: bool = False
    etc: MountMode = MountMode.BIND
    var: MountMode = MountMode.BIND
    var_given: bool = False

    @classmethod
    def parse(cls, data: bytes) -> SetupRoot:
        """From the bytes of the file.

        Unknown keys are ignored, as there. Raises ``SetupRootError`` for what stops the boot there.
        """
        if len(data) > MAX_SIZE:
            raise SetupRootError(f"larger than {MAX_SIZE} bytes")
        try:
            parsed = tomllib.loads(data.decode())
        except RecursionError:
            raise SetupRootError("nested too deeply") from None
        except ValueError as error:
            # UnicodeDecodeError and TOMLDecodeError are among them.
            raise SetupRootError(printable(error)[:200]) from None
        return cls(
            transient_root=_flag(_section(parsed, "root"), "root"),
            etc=_mode(_section(parsed, "etc"), "etc"),
            var=_mode(_section(parsed, "var"), "var"),
            var_given="mount" in _section(parsed, "var") or _flag(_section(parsed, "var"), "var"),
        )

    @classmethod
    def load(cls, files: Files) -> SetupRoot:
        """That of an image. Raises ``SetupRootError``, and what ``files.read`` does."""
        data = files.read(PATH, MAX_SIZE)
        return cls() if data is None else cls.parse(data)


def _section(parsed: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = parsed.get(name, {})
    if not isinstance(section, dict):
        raise SetupRootError(f"{name} is not a table")
    return section


def _flag(section: Mapping[str, Any], name: str) -> bool:
    value = section.get("transient", False)
    if not isinstance(value, bool):
        raise SetupRootError(f"{name}.transient is neither true nor false")
    return value


def _mode(section: Mapping[str, Any], name: str) -> MountMode:
    transient = _flag(section, name)
    if "mount" not in section:
        return MountMode.TRANSIENT if transient else MountMode.BIND
    text = section["mount"]
    mode = _MODES.get(text) if isinstance(text, str) else None
    if mode is None:
        raise SetupRootError(f"{name}.mount is none of {', '.join(_MODES)}")
    return mode
