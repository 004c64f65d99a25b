"""Files as bootc reads and writes them: strict where it is strict, blind where it is blind.

Part of ``bootc_model``, which says where its knowledge comes from.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PREFIX = "bootc_composefs-"


class Refused(Exception):
    """bootc ends with this error."""


class Panicked(Refused):
    """bootc dies on an assertion."""


def sha256(data: bytes) -> str:
    """Its SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Content of a file; ``Refused`` without it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"Opening {path.name}: {error.strerror}") from error


# The kernel's command line


def parameters(text: str) -> list[str]:
    """Parameters of a command line; double quotes group."""
    return re.findall(r'(?:[^\s"]|"[^"]*"?)+', text)


def _key(parameter: str) -> str:
    return parameter.split("=", 1)[0].replace("-", "_")


def same(left: str, right: str) -> bool:
    """Whether two parameters are equal: dashes and underscores of the key count as one."""
    return _key(left) == _key(right) and left.split("=", 1)[1:] == right.split("=", 1)[1:]


def composefs_value(text: str) -> str | None:
    """The value of the first ``composefs=``; None without one."""
    first = next((p for p in parameters(text) if _key(p) == "composefs"), None)
    return first.split("=", 1)[1] if first is not None and "=" in first else None


def with_composefs(text: str, value: str) -> str:
    """The command line with another ``composefs=``."""
    wanted = f"composefs={value}"
    kept: list[str] = []
    for parameter in parameters(text):
        if _key(parameter) != "composefs":
            kept.append(parameter)
        elif wanted not in kept:
            kept.append(wanted)
    return " ".join(kept if wanted in kept else [*kept, wanted])


def without_composefs_equal(left: str, right: str) -> bool:
    """The comparison for a soft reboot, which is made in both directions."""
    a, b = ([p for p in parameters(text) if _key(p) != "composefs"] for text in (left, right))
    return all(any(same(x, y) for y in b) for x in a) and all(any(same(x, y) for y in a) for x in b)


# INI files


Ini = dict[str, dict[str, str]]


def parse_ini(text: str, name: str) -> Ini:
    """Sections of an origin; anything but sections, items and comments is an error."""
    sections: Ini = {}
    current: dict[str, str] | None = None
    for line in map(str.strip, text.splitlines()):
        if not line or line[0] in ";#":
            continue
        if line[0] == "[" and line[-1] == "]":
            current = sections.setdefault(line[1:-1].strip(), {})
        elif current is not None and "=" in line:
            key, value = line.split("=", 1)
            current[key.strip()] = value.strip()
        else:
            raise Refused(f"Failed to parse origin file {name}: {line!r}")
    return sections


def write_ini(sections: Ini) -> str:
    """The text of an origin: it has no newline at its end."""
    blocks = (
        "\n".join([f"[{name}]", *(f"{k} = {v}" for k, v in items.items())])
        for name, items in sections.items()
    )
    return "\n\n".join(blocks)


_TRANSPORTS = {
    "registry": "registry",
    "oci": "oci",
    "oci-archive": "oci-archive",
    "docker-archive": "docker-archive",
    "containers-storage": "containers-storage",
    "dir": "dir",
    "docker-daemon": "docker-daemon",
}


def parse_reference(text: str) -> dict[str, Any]:
    """The ``image`` of the status document, from the origin's reference."""
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise Refused(f"Missing ':' in {text}")
    signature: Any = None
    if scheme in ("ostree-remote-image", "ostree-remote-registry"):
        remote, colon, rest = rest.partition(":")
        if not colon:
            raise Refused(f"Missing second ':' in {text}")
        signature = {"ostreeRemote": remote}
    elif scheme == "ostree-image-signed":
        signature = "containerPolicy"
    elif scheme not in ("ostree-unverified-image", "ostree-unverified-registry"):
        raise Refused(f"Invalid ostree image reference scheme {scheme}")
    if scheme.endswith("-registry"):
        transport, name = "registry", rest
    else:
        transport, name = _transport(rest)
    image = {"image": name, "transport": transport}
    return image if signature is None else image | {"signature": signature}


def _transport(text: str) -> tuple[str, str]:
    transport, colon, name = text.partition(":")
    if not colon or not name:
        raise Refused(f"Missing ':' in {text}")
    if transport == "docker":
        if not name.startswith("//"):
            raise Refused(f"Missing // in docker:// in {text}")
        return "registry", name[2:]
    if transport not in _TRANSPORTS:
        raise Refused(f"Unknown transport '{transport}'")
    return transport, name


def write_reference(image: Mapping[str, Any]) -> str:
    """The reference that the origin gets: bootc forgets every wish for a signature."""
    transport, name = image["transport"], image["image"]
    return "ostree-unverified-image:" + (
        f"docker://{name}" if transport == "registry" else f"{transport}:{name}"
    )


# Boot entries


@dataclass(frozen=True)
class Entry:
    """A boot entry of type 1 or for a unified kernel."""

    version: str
    title: str | None = None
    linux: str | None = None
    initrd: tuple[str, ...] = ()
    options: str | None = None
    efi: tuple[str, str] | None = None
    machine_id: str | None = None
    sort_key: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Path of the kernel."""
        return self.efi[1] if self.efi else str(self.linux)

    def id(self) -> str:
        """The deployment id; for a unified kernel its name must have the prefix."""
        if self.efi:
            return id_of_uki(self.path)
        if self.options is None:
            raise Refused("No options")
        value = composefs_value(self.options)
        if value is None:
            raise Refused("No composefs= param")
        return value.removeprefix("?")

    def artifact(self) -> tuple[str, bool]:
        """Name of the kernel's file or directory without the prefix, and whether it had it."""
        return artifact_of(self.path, uki=self.efi is not None)

    def text(self) -> str:
        """The file's text."""
        lines = [("title", self.title), ("version", self.version)]
        lines += [self.efi] if self.efi else [("linux", self.linux), *(("initrd", i) for i in self.initrd)]
        lines += [] if self.efi else [("options", self.options)]
        lines += [("machine-id", self.machine_id), ("sort-key", self.sort_key), *self.extra.items()]
        return "".join(f"{key} {value}\n" for key, value in lines if value is not None)


def id_of_uki(path: str) -> str:
    """The id in the name of a unified kernel."""
    name = path.rsplit("/", 1)[-1]
    if not name.startswith(PREFIX):
        raise Refused("efi does not start with custom prefix")
    if not name.endswith(".efi"):
        raise Refused("efi doesn't end with .efi")
    return name.removeprefix(PREFIX).removesuffix(".efi")


def artifact_of(path: str, *, uki: bool) -> tuple[str, bool]:
    """As ``Entry.artifact``; the prefix may be missing here."""
    parts = [part for part in path.split("/") if part]
    if uki:
        if not parts or not parts[-1].endswith(".efi"):
            raise Refused(f"EFI file name missing expected suffix: {path}")
        name = parts[-1].removesuffix(".efi")
    else:
        if len(parts) < 2:
            raise Refused(f"Linux kernel path has no parent directory: {path}")
        name = parts[-2]
    return name.removeprefix(PREFIX), name.startswith(PREFIX)


def parse_entry(text: str, name: str) -> Entry:
    """A ``.conf`` file; a key is divided from its value by a space, and by nothing else."""
    found: dict[str, str] = {}
    initrd: list[str] = []
    efi: tuple[str, str] | None = None
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#") or " " not in line:
            continue
        key, value = line.split(" ", 1)
        value = value.strip()
        if key == "initrd":
            initrd.append(value)
        elif key in ("efi", "uki"):
            efi = (key, value)
        else:
            found[key] = value
    if "version" not in found:
        raise Refused(f"Parsing bls config {name}: Missing 'version' value")
    if "linux" in found and efi:
        raise Refused(f"Parsing bls config {name}: 'linux' and 'efi'/'uki' values present")
    if "linux" not in found and not efi:
        raise Refused(f"Parsing bls config {name}: Missing 'linux', 'efi', or 'uki' value")
    known = {
        key: found.pop(key, None)
        for key in ("title", "version", "linux", "options", "machine-id", "sort-key")
    }
    return Entry(
        version=str(known["version"]),
        title=known["title"],
        linux=known["linux"],
        initrd=tuple(initrd),
        options=known["options"],
        efi=efi,
        machine_id=known["machine-id"],
        sort_key=known["sort-key"],
        extra=found,
    )


# GRUB's user.cfg

USER_CFG_HEAD = """
if [ -f ${config_directory}/efiuuid.cfg ]; then
        source ${config_directory}/efiuuid.cfg
fi
"""


@dataclass(frozen=True)
class MenuEntry:
    """One entry of ``user.cfg``."""

    title: str
    chainloader: str
    insmod: tuple[str, ...] = ("fat", "chain")
    search: str = '--no-floppy --set=root --fs-uuid "${EFI_PART_UUID}"'
    extra: tuple[tuple[str, str], ...] = ()

    def id(self) -> str:
        """The deployment id."""
        return id_of_uki(self.chainloader)

    def artifact(self) -> tuple[str, bool]:
        """As ``Entry.artifact``."""
        return artifact_of(self.chainloader, uki=True)

    @property
    def path(self) -> str:
        """Path of the kernel."""
        return self.chainloader

    def text(self) -> str:
        """The text of the entry."""
        lines = [f'menuentry "{self.title}" {{', *(f"insmod {module}" for module in self.insmod)]
        lines += [f"search {self.search}", f"chainloader {self.chainloader}"]
        return "\n".join([*lines, *(f"{key} {value}" for key, value in self.extra), "}"]) + "\n"


def parse_menu(text: str) -> list[MenuEntry]:
    """The entries of ``user.cfg``; what stands between them is skipped."""
    entries = []
    while (start := text.find("menuentry")) >= 0:
        head = re.match(r'menuentry\s+"((?:[^"\\]|\\.)+)"\s*\{', text[start:], re.DOTALL)
        if not head:
            raise Refused("Failed to parse GRUB menuentries")
        body_start = start + head.end()
        end = _closing_brace(text, body_start)
        entries.append(_menu_entry(head.group(1), text[body_start:end]))
        text = text[end + 1 :]
    return entries


def _closing_brace(text: str, start: int) -> int:
    depth, escaped = 1, False
    for place in range(start, len(text)):
        character = text[place]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
    raise Refused("Failed to parse GRUB menuentries: braces do not balance")


def _menu_entry(title: str, body: str) -> MenuEntry:
    lines = (line.strip() for line in body.splitlines())
    pairs = [
        (k, v.strip()) for k, _, v in (line.partition(" ") for line in lines if " " in line) if k[:1] != "#"
    ]
    last = dict(pairs)
    return MenuEntry(
        title,
        chainloader=last.get("chainloader", ""),
        insmod=tuple(value for key, value in pairs if key == "insmod"),
        search=last.get("search", ""),
        extra=tuple(p for p in pairs if p[0] not in ("insmod", "chainloader", "search", "set")),
    )


# os-release, unified kernels


def os_release(text: str) -> tuple[str, str | None, str | None]:
    """``(id, title, version)`` as an entry needs them."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] != "#")

    def first(*keys: str) -> str | None:
        return next((values[key].strip("\"'") for key in keys if key in values), None)

    return first("ID") or "bootc", first("PRETTY_NAME", "NAME", "ID"), first("VERSION_ID", "VERSION")


def uki_section(data: bytes, name: str) -> bytes:
    """A section of a PE file: as many bytes as its virtual size says."""
    start = struct.unpack_from("<I", data, 0x3C)[0]
    if data[start : start + 4] != b"PE\0\0":
        raise Refused("UKI is not valid EFI executable")
    count, optional = (
        struct.unpack_from("<H", data, start + 6)[0],
        struct.unpack_from("<H", data, start + 20)[0],
    )
    for number in range(count):
        place = start + 24 + optional + 40 * number
        if data[place : place + 8] == name.encode().ljust(8, b"\0"):
            size, _, _, offset = struct.unpack_from("<IIII", data, place + 8)
            return data[offset : offset + size]
    raise Refused(f"UKI doesn't contain a '{name}' section")


def uki_boot_digest(data: bytes) -> str:
    """The boot digest of a unified kernel."""
    return hashlib.sha256(uki_section(data, ".linux") + uki_section(data, ".initrd")).hexdigest()


# Versions


def compare_versions(left: str, right: str) -> int:
    """UAPI.10 comparison of two versions: below, at or above 0."""
    a, b = (list(_tokens(text)) for text in (left, right))
    for x, y in zip(a, b, strict=False):
        if x != y:
            return -1 if x < y else 1
    rest = a[len(b) :] or b[len(a) :]
    if not rest:
        return 0
    # What goes on is newer, unless it goes on with a tilde.
    longer = -1 if rest[0] == (0, 0, "") else 1
    return longer if len(a) > len(b) else -longer


def _tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Tokens, ordered as UAPI.10 has them: tilde, dash, caret, dot, letters, digits."""
    for token in re.findall(r"[~^.-]|[0-9]+|[A-Za-z]+", text):
        if token in "~-^.":
            yield ("~-^.".index(token), 0, "")
        elif token.isdigit():
            yield (5, int(token), "")
        else:
            yield (4, 0, token)


def timestamp(config: Mapping[str, Any]) -> str | None:
    """The time of creation as chrono writes it, or null when it is not RFC 3339."""
    try:
        moment = datetime.fromisoformat(str(config.get("created")))
    except ValueError:
        return None
    return None if moment.tzinfo is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def unsorted_digest(manifest: Mapping[str, Any]) -> str:
    """What bootc shows as digest of a legacy manifest: of its own serialisation, and without algorithm."""
    known = ("schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "annotations")
    ordered = {key: manifest[key] for key in known if key in manifest}
    return hashlib.sha256(json.dumps(ordered, separators=(",", ":")).encode()).hexdigest()
