"""The image that a quadlet file names: a ``.image`` or ``.container`` unit of podman, of which that is read.

Facts: bootc 1.16 (logically bound images, and the parser it uses); podman-systemd.unit(5) for continued
lines. Specifiers are refused, as there is no unit to expand them for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: A unit of this kind has a few lines.
MAX_SIZE: Final = 256 << 10
#: The section with the key ``Image``, by the end of the file's name.
_SECTIONS: Final[Mapping[str, str]] = {"image": "Image", "container": "Container"}
_IMAGE: Final = "Image"
_AUTH_FILE: Final = "AuthFile"
#: Names that podman's generator takes for another unit.
_UNITS: Final = (".image", ".build")


class QuadletError(ValueError):
    """What is wrong with a unit, for people."""


def image_of(name: str, data: bytes) -> str:
    """The image that the unit ``data`` with the file name ``name`` starts or fetches, as it is written there.

    Raises ``QuadletError``. Whether it is the name of an image is not looked at.
    """
    stem, dot, kind = name.rpartition(".")
    if not dot or not stem or kind not in _SECTIONS:
        raise QuadletError("its name ends in neither .image nor .container")
    if len(data) > MAX_SIZE:
        raise QuadletError(f"larger than {MAX_SIZE} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise QuadletError("it is not UTF-8") from None
    section = _SECTIONS[kind]
    values = {key: value for found, key, value in _values(text) if found == section}
    if kind == "image" and _AUTH_FILE in values:
        raise QuadletError("AuthFile= is not supported: images are fetched with the host's credentials")
    if not values.get(_IMAGE):
        raise QuadletError(f"it has no Image= in [{section}]")
    image = _without_specifiers(values[_IMAGE])
    if kind == "container" and image.endswith(_UNITS):
        raise QuadletError(f"Image={image} is another unit: bind that")
    return image


def _values(text: str) -> Iterator[tuple[str, str, str]]:
    """Section, key and value of each assignment, in order; of several the last counts."""
    section = ""
    for line in _lines(text):
        if line.startswith("["):
            if not line.endswith("]"):
                raise QuadletError(f"no section: {line[:80]}")
            section = line.strip("[]")
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise QuadletError(f"neither a section nor an assignment: {line[:80]}")
        yield section, key.strip(), value.strip()


def _lines(text: str) -> Iterator[str]:
    """Lines without comments, those that a backslash continues put together.

    A comment may follow something, for bootc; systemd takes it for a part of that, which names no image.
    """
    held: list[str] = []
    for raw in text.split("\n"):
        line = raw.strip()
        if held and line.startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            held.append(line[:-1])
            continue
        whole = " ".join([*held, line]).strip()
        held = []
        for mark in "#;":
            whole = whole.partition(mark)[0].strip()
        if whole:
            yield whole
    if held:
        raise QuadletError("its last line is continued")


def _without_specifiers(value: str) -> str:
    """``%%`` is a percent sign, everything else with one is refused."""
    parts = value.split("%%")
    if any("%" in part for part in parts):
        raise QuadletError(f"specifiers (%) are not supported: {value[:200]}")
    return "%".join(parts)
