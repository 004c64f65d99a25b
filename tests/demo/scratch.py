"""The demo's host: a root of plain files, with a power switch.

What a kernel, its boot loader and its initramfs tell of a running system are plain files below the root;
``power_on`` writes them anew, from the boot menu as systemd-boot would show it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from report import DemoFailed

#: A socket's path may have 107 bytes, and ours end in /hostimaged-demo-XXXXXXXX/notify.
_LONGEST_DIRECTORY: Final = 75
_COMPOSEFS: Final = re.compile(r"(?:^| )composefs=\??([0-9a-f]{128})(?: |$)")
_LOADER_INFO: Final = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
#: Configuration that belongs to the host and not to the image: updates keep it.
_LOCAL: Final = {
    "hostimaged.toml": 'verity = "opportunistic"\n',
    "containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}\n',
    "containers/registries.conf": "",
}


@dataclass(frozen=True, slots=True)
class MenuEntry:
    """An entry of the boot menu."""

    title: str
    options: str
    sort_key: str

    @property
    def deployment(self) -> str:
        """Id of the deployment that the entry boots."""
        found = _COMPOSEFS.search(self.options)
        if found is None:
            raise DemoFailed(f"the boot entry {self.title!r} names no deployment")
        return found[1]


class Scratch:
    """The scratch root, and everything else that the demo makes."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(parent) > _LONGEST_DIRECTORY:
            parent = "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="hostimaged-demo-", dir=parent))
        self.root = self.path / "root"
        self.image = self.path / "image"
        self.log = self.path / "hostimaged.log"
        for name in ("sysroot", "boot", "efi", "run"):
            (self.root / name).mkdir(parents=True)
        for name, text in _LOCAL.items():
            _write(self.root / "etc" / name, text)
        self._write_boot_id()
        # As systemd-boot introduces itself, by which the daemon knows whose menu it writes.
        _write(self.root / _LOADER_INFO, b"\x06\0\0\0" + "systemd-boot 257.9\0".encode("utf-16-le"))

    @property
    def repository(self) -> Path:
        """The composefs repository that the first pull makes."""
        return self.root / "sysroot/composefs"

    @property
    def etc(self) -> Path:
        """The configuration of what runs."""
        return self.root / "etc"

    def menu(self) -> list[MenuEntry]:
        """The boot menu, what boots by itself first."""
        directory = self.root / "efi/loader/entries"
        return sorted(map(_entry, directory.glob("*.conf")), key=lambda entry: entry.sort_key)

    def configure(self) -> None:
        """Give the only deployment, not booted yet, the host's own configuration, as an installer does."""
        (entry,) = self.menu()
        for name, text in _LOCAL.items():
            _write(self._etc_of(entry.deployment) / name, text)

    def power_on(self) -> MenuEntry:
        """Start the first entry of the menu; gives it."""
        entry = self.menu()[0]
        identifier = entry.deployment
        for needed in (self.repository / "images" / identifier, self._etc_of(identifier)):
            if not needed.exists():
                raise DemoFailed(f"the host does not come up: {needed} is missing")
        shutil.rmtree(self.root / "run")
        (self.root / "run").mkdir()
        _write(self.root / "proc/cmdline", entry.options + "\n")
        _write(self.root / "proc/self/mountinfo", _mounts(identifier))
        self._write_boot_id()
        if self.etc.is_symlink():
            self.etc.unlink()
        else:
            shutil.rmtree(self.etc)
        self.etc.symlink_to(self._etc_of(identifier).relative_to(self.root))
        return entry

    def size(self) -> int:
        """Bytes on disk of the repository."""
        return sum(path.lstat().st_blocks * 512 for path in self.repository.rglob("*"))

    def _etc_of(self, identifier: str) -> Path:
        return self.root / "sysroot/state/deploy" / identifier / "etc"

    def _write_boot_id(self) -> None:
        _write(self.root / "proc/sys/kernel/random/boot_id", f"{uuid.uuid4()}\n")


def _entry(path: Path) -> MenuEntry:
    fields = dict(line.split(" ", 1) for line in path.read_text().splitlines() if " " in line)
    return MenuEntry(fields["title"], fields["options"], fields["sort-key"])


def _mounts(identifier: str) -> str:
    return (
        f"36 1 0:31 / / ro,relatime shared:1 - overlay composefs:{identifier} ro,metacopy=on\n"
        "37 36 253:3 / /sysroot rw,relatime shared:2 - ext4 /dev/vda3 rw\n"
        f"38 36 253:3 /state/deploy/{identifier}/etc /etc rw,relatime shared:3 - ext4 /dev/vda3 rw\n"
        "39 36 253:3 /state/os/default/var /var rw,relatime shared:4 - ext4 /dev/vda3 rw\n"
        "40 36 0:24 / /run rw,nosuid,nodev shared:5 - tmpfs tmpfs rw,mode=755\n"
    )


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
