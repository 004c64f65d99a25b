"""The shipped introspection XML, parsed: what the object server serves and checks itself against."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Emits", "Interface", "Method", "Property", "load", "load_shipped", "parse"]

DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_EMITS: Final = "org.freedesktop.DBus.Property.EmitsChangedSignal"
_ELEMENT: Final = re.compile(r"^[ \t]*<interface\b.*?</interface>\n?", re.DOTALL | re.MULTILINE)


class Emits(StrEnum):
    """What a change of a property sends (annotation EmitsChangedSignal)."""

    TRUE = "true"
    INVALIDATES = "invalidates"
    CONST = "const"
    FALSE = "false"


@dataclass(frozen=True, slots=True)
class Method:
    """A method: D-Bus signatures of what it takes and gives."""

    name: str
    signature: str
    out_signature: str


@dataclass(frozen=True, slots=True)
class Property:
    """A property."""

    name: str
    signature: str
    emits: Emits
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface; ``signals`` maps a signal's name to its signature, ``xml`` is the element as shipped."""

    name: str
    methods: Mapping[str, Method]
    properties: Mapping[str, Property]
    signals: Mapping[str, str]
    xml: str


def load(file_name: str) -> dict[str, Interface]:
    """The interfaces of a shipped file, by name."""
    return parse(resources.files("hostimage_dbus").joinpath("interfaces", file_name).read_text("utf-8"))


def load_shipped() -> dict[str, Interface]:
    """All shipped interfaces, by name. Reads files: not for the event loop."""
    names = (entry.name for entry in resources.files("hostimage_dbus").joinpath("interfaces").iterdir())
    return {name: found for file in names if file.endswith(".xml") for name, found in load(file).items()}


def parse(text: str) -> dict[str, Interface]:
    """The interfaces in an introspection document of ours, by name."""
    elements = {ET.fromstring(xml).get("name", ""): xml for xml in _ELEMENT.findall(text)}  # noqa: S314 (ours)
    return {name: _interface(name, xml) for name, xml in elements.items()}


def _interface(name: str, xml: str) -> Interface:
    root = ET.fromstring(xml)  # noqa: S314 (shipped with this package)
    methods = {
        (member := element.get("name", "")): Method(
            member, _signature(element, "in"), _signature(element, "out")
        )
        for element in root.iter("method")
    }
    properties = {
        (member := element.get("name", "")): Property(
            member, element.get("type", ""), _emits(element), writable=element.get("access") == "readwrite"
        )
        for element in root.iter("property")
    }
    signals = {element.get("name", ""): _signature(element, None) for element in root.iter("signal")}
    return Interface(name, methods, properties, signals, xml)


def _signature(element: ET.Element, direction: str | None) -> str:
    return "".join(arg.get("type", "") for arg in element.iter("arg") if arg.get("direction") == direction)


def _emits(element: ET.Element) -> Emits:
    for annotation in element.iter("annotation"):
        if annotation.get("name") == _EMITS:
            return Emits(annotation.get("value", ""))
    return Emits.TRUE
