"""os-release of an image, for the names and titles of its boot entries (os-release(5))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hostimaged.errors import UnsupportedImage

#: Bytes of an os-release; those of distributions have less than one KiB.
MAX_SIZE: Final = 64 << 10
#: Characters of one value: a title is a line of a boot menu.
MAX_VALUE: Final = 256

#: What bootc calls a system without ``ID``.
DEFAULT_ID: Final = "bootc"


@dataclass(frozen=True, slots=True)
class OsRelease:
    """The fields that boot entries need; "" where the file lacks one.

    Values are one line of printable text each, whatever the file holds.
    """

    id: str = DEFAULT_ID
    name: str = ""
    pretty_name: str = ""
    version: str = ""
    version_id: str = ""
    has_id: bool = False

    def entry_version(self, fallback: str) -> str:
        """``version`` of a boot entry: ``VERSION_ID``, else ``VERSION``, else ``fallback``."""
        return self.version_id or self.version or fallback

    def title(self, fallback: str) -> str:
        """``title`` of a boot entry: ``PRETTY_NAME``, else ``NAME``, else ``ID``, else ``fallback``."""
        return self.pretty_name or self.name or (self.id if self.has_id else "") or fallback

    def boot_label(self, fallback: str) -> str:
        """Label of a unified kernel image: the title, then the version where there is one."""
        return f"{self.title(fallback)} {self.entry_version('')}".rstrip()


def parse(data: bytes) -> OsRelease:
    """Read an os-release; raises ``UnsupportedImage`` if it is too long, and for nothing else.

    Lines that make no sense are passed over, as composefs-rs 0.9 does; a later line wins.
    """
    if len(data) > MAX_SIZE:
        raise UnsupportedImage(f"os-release is longer than {MAX_SIZE} bytes")
    raw: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").split("\n"):
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith("#"):
            raw[key] = value
    values = {key: _clean(_unquoted(value)) for key, value in raw.items()}
    os_id = values.get("ID", "")
    return OsRelease(
        id=os_id or DEFAULT_ID,
        name=values.get("NAME", ""),
        pretty_name=values.get("PRETTY_NAME", ""),
        version=values.get("VERSION", ""),
        version_id=values.get("VERSION_ID", ""),
        has_id=bool(os_id),
    )


def _unquoted(value: str) -> str:
    """The value without its shell quoting; "" if a quote is not closed.

    A backslash means something within double quotes only (composefs-rs 0.9, ``dequote``).
    """
    found: list[str] = []
    characters = iter(value.strip())
    quote = ""
    for character in characters:
        if character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif character == "\\" and quote == '"':
            escaped = next(characters, None)
            if escaped is None:
                return ""
            found.append(escaped)
        else:
            found.append(character)
    return "" if quote else "".join(found)


def _clean(value: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in value[:MAX_VALUE])
    return " ".join(text.split())
