"""Boot Loader Specification entries (``loader/entries/*.conf``) and the names bootc gives to what they name.

Reading is tolerant, as entries of other tools lie in the same directory; writing is strict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from hostimaged.boot.cmdline import Cmdline
from hostimaged.errors import BootLoaderError
from hostimaged.ids import DeploymentId

#: Bytes of an entry; the longest part is the kernel command line.
MAX_SIZE: Final = 128 << 10

#: Prefix of kernel directories and unified kernel images of bootc; older ones have none.
ARTIFACT_PREFIX: Final = "bootc_composefs-"
#: Directory of unified kernel images on the ESP, below which no boot loader looks on its own.
UKI_DIRECTORY: Final = "EFI/Linux/bootc"
EFI_SUFFIX: Final = ".efi"
ADDONS_SUFFIX: Final = ".efi.extra.d"
ENTRY_SUFFIX: Final = ".conf"

#: Characters of an id and of a version in a name, which VFAT limits to 255.
_MAX_PART: Final = 100
_ID: Final = re.compile(r"[0-9a-f]{128}\Z")
# Not "+", which begins a boot counter for systemd-boot, nor "-", at which GRUB splits names.
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._~^]")
_SEPARATOR: Final = re.compile(r"[ \t]+")
_KEY: Final = re.compile(r"[!-~]+\Z")

EfiKey = Literal["efi", "uki"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. A kernel (``linux``) or an EFI program (``efi`` under ``efi_key``), never both.

    ``extra`` has the keys that nothing here knows, in their order. Copies with other values are made by
    ``dataclasses.replace``.
    """

    title: str = ""
    version: str = ""
    linux: str = ""
    initrd: tuple[str, ...] = ()
    efi: str = ""
    efi_key: EfiKey = "efi"
    options: str | None = None
    machine_id: str = ""
    sort_key: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def cmdline(self) -> Cmdline:
        """The command line in ``options``; raises ``BootLoaderError``."""
        return Cmdline.parse(self.options or "")

    def deployment_id(self) -> DeploymentId | None:
        """The deployment that it boots; None for an entry that is not of a composefs host.

        Of a kernel the ``composefs`` argument, of an EFI program the file name. Raises ``BootLoaderError``
        for an argument that the initramfs refuses.
        """
        if not self.efi:
            found = self.cmdline.composefs()
            return found.id if found else None
        return efi_deployment(self.efi)

    def artifact(self) -> str:
        """Name of the kernel directory or EFI program, without prefix and suffix; "" without a directory.

        It is the id of the deployment that the kernel was written for, which another may share.
        """
        return artifact_name(self._artifact_file)

    @property
    def has_prefix(self) -> bool:
        """Whether its artifact has the prefix by which bootc's garbage collection knows its own."""
        return self._artifact_file.startswith(ARTIFACT_PREFIX)

    @property
    def _artifact_file(self) -> str:
        if self.efi:
            return self.efi.rpartition("/")[2]
        return self.linux.rpartition("/")[0].rpartition("/")[2]

    def with_order(self, os_id: str, position: int) -> Self:
        """With the sort key of the entry at ``position`` of the menu."""
        return replace(self, sort_key=sort_key(os_id, position))

    def serialise(self) -> bytes:
        """The file, with keys in the order bootc writes them.

        Raises ``BootLoaderError`` for a value that cannot be written: no line breaks, no ``version``.
        """
        lines = [("title", self.title)] if self.title else []
        lines.append(("version", self.version))
        if bool(self.linux) == bool(self.efi):
            raise BootLoaderError("boot entry needs one of a kernel and an EFI program")
        lines.append((self.efi_key, self.efi) if self.efi else ("linux", self.linux))
        lines += [("initrd", path) for path in self.initrd]
        if self.options:
            lines.append(("options", self.options))
        lines += [(k, v) for k, v in (("machine-id", self.machine_id), ("sort-key", self.sort_key)) if v]
        lines += self.extra
        data = "".join(f"{key} {_checked(key, value)}\n" for key, value in lines)
        encoded = data.encode("utf-8", "surrogateescape")
        if len(encoded) > MAX_SIZE:
            raise BootLoaderError(f"boot entry longer than {MAX_SIZE} bytes")
        return encoded


def _checked(key: str, value: str) -> str:
    if not _KEY.match(key) or key.startswith("#"):
        raise BootLoaderError(f"boot entry cannot have the key {key!r}")
    if not value or value != value.strip():
        raise BootLoaderError(f"boot entry cannot have {key} {value!r}")
    if any((c < " " and c != "\t") or c in "\x7f\x85\u2028\u2029" for c in value):
        raise BootLoaderError(f"boot entry cannot have control characters in {key}")
    return value


def parse(data: bytes, name: str) -> Entry:
    """Read an entry; ``name`` is the file in messages. Raises ``BootLoaderError`` for what cannot boot.

    A value begins after the first space or tab. Of repeated keys the last counts, except that ``initrd`` adds
    up. A missing ``version``, which bootc refuses, is "".
    """
    if len(data) > MAX_SIZE:
        raise BootLoaderError(f"{name}: longer than {MAX_SIZE} bytes")
    values: dict[str, str] = {}
    initrd: list[str] = []
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        key, *rest = _SEPARATOR.split(line.strip(), maxsplit=1)
        if not rest or key.startswith("#"):
            continue
        if key == "initrd":
            initrd.append(rest[0])
        else:
            values[key] = rest[0]
    efi_keys: list[EfiKey] = [key for key in ("efi", "uki") if key in values]
    if len(efi_keys) + ("linux" in values) != 1:
        raise BootLoaderError(f"{name}: needs exactly one of linux, efi and uki")
    efi_key: EfiKey = efi_keys[0] if efi_keys else "efi"
    return Entry(
        title=values.pop("title", ""),
        version=values.pop("version", ""),
        linux=values.pop("linux", ""),
        initrd=tuple(initrd),
        efi=values.pop(efi_key, ""),
        efi_key=efi_key,
        options=values.pop("options", None),
        machine_id=values.pop("machine-id", ""),
        sort_key=values.pop("sort-key", ""),
        extra=tuple(values.items()),
    )


def artifact_name(file_name: str) -> str:
    """The artifact name in the name of a kernel directory or EFI program."""
    return file_name.removesuffix(EFI_SUFFIX).removeprefix(ARTIFACT_PREFIX)


def efi_deployment(path: str) -> DeploymentId | None:
    """The deployment in the path of a unified kernel image, with or without our prefix."""
    file_name = path.rpartition("/")[2]
    stem = artifact_name(file_name)
    return DeploymentId(stem) if file_name.endswith(EFI_SUFFIX) and _ID.match(stem) else None


def kernel_directory(artifact: DeploymentId | str) -> str:
    """Name of the directory that holds ``vmlinuz`` and ``initrd``."""
    return f"{ARTIFACT_PREFIX}{artifact}"


def uki_name(artifact: DeploymentId | str) -> str:
    """Name of a unified kernel image in ``UKI_DIRECTORY``."""
    return f"{ARTIFACT_PREFIX}{artifact}{EFI_SUFFIX}"


def addons_name(artifact: DeploymentId | str) -> str:
    """Name of the directory of the addons of a unified kernel image."""
    return f"{ARTIFACT_PREFIX}{artifact}{ADDONS_SUFFIX}"


def file_name(os_id: str, version: str, priority: int) -> str:
    """Name of an entry, which is what GRUB sorts by: a higher ``priority`` comes first.

    As bootc names them (``bootc_<id>-<version>-<priority>.conf``), with all characters replaced at which a
    boot loader would split the id or the version, or take a part for a boot counter.
    """
    safe_id, safe_version = (_UNSAFE.sub("_", part)[:_MAX_PART] for part in (os_id, version))
    return f"bootc_{safe_id}-{safe_version}-{priority}{ENTRY_SUFFIX}"


def sort_key(os_id: str, position: int) -> str:
    """``sort-key`` of the entry at ``position`` of the menu, which systemd-boot sorts by."""
    return f"bootc-{os_id}-{position}"
