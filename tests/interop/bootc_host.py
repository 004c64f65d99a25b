"""How bootc sees a host: its storage and its status.

Part of ``bootc_model``. The host is a scratch root as ``--root DIR`` wants it; SELinux is off.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bootc_formats as formats
import bootc_repository
from bootc_formats import PREFIX, Entry, MenuEntry, Refused

UKI_DIR = "EFI/Linux/bootc"
_LOADER_INFO = "LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Booted:
    """The booted deployment as bootc makes it out."""

    id: str
    insecure: bool
    transient: bool


@dataclass(frozen=True)
class Row:
    """A boot entry: the deployment it starts, and whose kernel."""

    id: str
    artifact: str


def exchange(left: Path, right: Path) -> None:
    """Exchange two names in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE):
        raise Refused(f"renameat {left.name}: {os.strerror(ctypes.get_errno())}")


def entry_file_name(os_id: str, version: str, priority: int) -> str:
    """Name of a ``.conf`` file."""
    return f"bootc_{os_id.replace('-', '_')}-{version}-{priority}.conf"


class Storage:
    """bootc's view of the host below ``root``. Every failure is ``Refused``.

    Without ``side_effects`` nothing is written: no boot digest is filled in.
    """

    def __init__(self, root: Path, *, side_effects: bool = True) -> None:
        self.root = root
        self.sysroot = root / "sysroot"
        self.repository = self.sysroot / "composefs"
        self.esp = root / "efi"
        self.marker = root / "run/composefs/staged-deployment"
        self._side_effects = side_effects

    # Opening

    @contextlib.contextmanager
    def opened(self) -> Iterator[Booted]:
        """What every command does first; the repository is locked, shared, until it ends."""
        booted = self.booted()
        meta = formats.read_bytes(self.repository / "meta.json")
        if json.loads(meta).get("algorithm") != "fsverity-sha512-12":
            raise Refused("repository is not sha512")
        if not self.esp.is_dir() or not self.boot_dir.is_dir():
            raise Refused("ESP or boot directory not found")
        lock = os.open(self.repository, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield booted
        finally:
            os.close(lock)

    def booted(self) -> Booted:
        """From the command line and the mount source of the root."""
        value = formats.composefs_value(read_text(self.root / "proc/cmdline"))
        if value is None:
            raise Refused("not a composefs host")
        source = self._root_source()
        for prefix, transient in (("composefs:", False), ("transient:composefs=", True)):
            if source.startswith(prefix):
                identifier = source.removeprefix(prefix)
                # After a soft reboot the mark of the command line is lost.
                same = identifier == value.removeprefix("?")
                return Booted(identifier, same and value.startswith("?"), transient)
        raise Refused(f"Root not mounted using composefs (source: {source})")

    def _root_source(self) -> str:
        lines = read_text(self.root / "proc/self/mountinfo").splitlines()
        sources = [line.partition(" - ")[2].split()[1] for line in lines if line.split()[4] == "/"]
        if not sources:
            raise Refused("no root in mountinfo")
        return sources[-1]

    @functools.cached_property
    def loader(self) -> str:
        """``grub``, ``systemd`` or ``grub-cc``."""
        try:
            raw = (self.root / "sys/firmware/efi/efivars" / _LOADER_INFO).read_bytes()
        except FileNotFoundError:
            return "grub"
        name = raw.decode("utf-16-le", "replace").lower()
        return "systemd" if "systemd-boot" in name else "grub-cc" if "grub cc" in name else "grub"

    @property
    def classic(self) -> bool:
        """Whether this is ordinary GRUB."""
        return self.loader == "grub"

    @property
    def boot_dir(self) -> Path:
        """What holds ``loader`` and ``grub2``."""
        return self.root / "boot" if self.classic else self.esp

    @property
    def bin_dir(self) -> Path:
        """Where kernels of type 1 are."""
        return self.boot_dir if self.classic else self.esp / "EFI/Linux"

    @property
    def user_cfg(self) -> Path:
        """GRUB's menu of unified kernels."""
        return self.boot_dir / "grub2/user.cfg"

    @property
    def user_cfg_staged(self) -> Path:
        """Its staged variant."""
        return self.boot_dir / "grub2/user.cfg.staged"

    @property
    def entries_dir(self) -> Path:
        """The live entries."""
        return self.boot_dir / "loader/entries"

    @property
    def entries_staged(self) -> Path:
        """The staged entries."""
        return self.boot_dir / "loader/entries.staged"

    def state_dir(self, identifier: str) -> Path:
        """State directory of a deployment."""
        return self.sysroot / "state/deploy" / identifier

    def origin_path(self, identifier: str) -> Path:
        """Its origin."""
        return self.state_dir(identifier) / f"{identifier}.origin"

    # Entries

    def entries(self, *, ascending: bool = True, staged: bool = False) -> list[Entry]:
        """Entries in the order of the menu as bootc believes it to be, or the other way round."""
        place = self.entries_staged if staged else self.entries_dir
        if not place.is_dir():
            if staged:
                return []
            raise Refused("Getting sorted Type1 boot entries: No such file or directory")
        names = sorted(name for name in os.listdir(place) if name.endswith(".conf"))
        found = [(name, formats.parse_entry(read_text(place / name), name)) for name in names]
        if self.loader == "systemd":
            order = functools.cmp_to_key(_compare_entries)
            found.sort(key=lambda pair: order(pair[1]), reverse=not ascending)
        else:
            found.sort(key=lambda pair: pair[0], reverse=ascending)
        return [entry for _, entry in found]

    def menu(self, *, staged: bool = False) -> list[MenuEntry]:
        """Entries of GRUB's menu of unified kernels."""
        place = self.user_cfg_staged if staged else self.user_cfg
        if not place.exists():
            if staged:
                return []
            raise Refused("Opening user.cfg: No such file or directory")
        return formats.parse_menu(read_text(place))

    def rows(self) -> list[Row]:
        """All entries, live and staged: what bootc takes for the truth."""
        if self.classic and not self.user_cfg.parent.is_dir():
            raise Refused("Opening grub dir: No such file or directory")
        found: list[Entry | MenuEntry]
        if self.classic and self.user_cfg.exists():
            found = [*self.menu(), *self.menu(staged=True)]
        else:
            found = [*self.entries(), *self.entries(staged=True)]
        return [Row(entry.id(), entry.artifact()[0]) for entry in found]

    # State

    def origin(self, identifier: str) -> formats.Ini | None:
        """The origin of a deployment, None without one."""
        try:
            text = self.origin_path(identifier).read_text()
        except FileNotFoundError:
            return None
        return formats.parse_ini(text, self.origin_path(identifier).name)

    def boot_type(self, origin: formats.Ini) -> str:
        """``bls`` or ``uki``."""
        found = origin.get("boot", {}).get("boot_type")
        if found not in ("bls", "uki"):
            raise Refused("boot not found" if found is None else f"Unrecognized boot option: '{found}'")
        return found

    def staged_marker(self) -> dict[str, Any] | None:
        """Content of the staged marker."""
        try:
            content = json.loads(self.marker.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Refused(f"staged marker: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("depl_id"), str):
            raise Refused("staged marker: missing field `depl_id`")
        if not isinstance(content.get("finalization_locked"), bool):
            raise Refused("staged marker: missing field `finalization_locked`")
        return content

    def image_info(self, identifier: str, origin: formats.Ini) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Manifest, config and digest: from the repository, or the sidecar if the origin has no digest."""
        digest = origin.get("image", {}).get("manifest_digest")
        if digest is not None:
            stored = bootc_repository.open_image(self.repository, digest)
            return stored.manifest, stored.config, digest
        try:
            parsed = json.loads((self.state_dir(identifier) / f"{identifier}.imginfo").read_text())
            manifest, config = parsed["manifest"], parsed["config"]
        except FileNotFoundError as error:
            raise Refused(
                f"No manifest_digest in origin and no legacy .imginfo file for {identifier}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Refused("Failed to parse .imginfo file as JSON") from error
        return manifest, config, formats.unsorted_digest(manifest)

    # Status

    def status(self, booted: Booted) -> dict[str, Any]:
        """The host document."""
        host = _empty_host()
        status = host["status"]
        types: set[str] = set()
        extra: list[dict[str, Any]] = []
        for row in self.rows():
            origin = self.origin(row.id)
            if origin is None:
                continue
            entry = self._boot_entry(row.id, origin, booted)
            types.add(entry["composefs"]["bootType"])
            if len(types) > 1:
                raise Refused("Conflicting boot types")
            if row.id == booted.id:
                status["booted"] = entry
            elif (marker := self.staged_marker()) and marker["depl_id"] == row.id:
                status["staged"] = entry | {"downloadOnly": marker["finalization_locked"]}
            else:
                extra.append(entry)
        if not types:
            raise Refused("Could not determine boot type")
        if status["booted"] is None:
            raise Refused("Could not find booted deployment")
        tracked = status["staged"] or status["booted"]
        host["spec"]["image"] = tracked["image"]["image"] if tracked["image"] else None
        self._place_extra(status, extra, booted, uki=types == {"Uki"})
        if status["rollbackQueued"]:
            host["spec"]["bootOrder"] = "rollback"
        self._soft_reboot(status, uki=types == {"Uki"})
        return host

    def _place_extra(
        self, status: dict[str, Any], extra: list[dict[str, Any]], booted: Booted, *, uki: bool
    ) -> None:
        live: list[Entry | MenuEntry]
        # Of GRUB's entries the list is fetched the wrong way round.
        live = [*self.menu()] if self.classic and uki else [*self.entries(ascending=not self.classic)]
        if not live:
            raise Refused("First boot entry not found")
        first = live[0]
        if isinstance(first, Entry) and first.efi:
            if self.classic:
                raise Refused("Found 'efi' field in Type1 boot entry")
            # Here the negation was forgotten.
            status["rollbackQueued"] = booted.id in first.path
        elif isinstance(first, Entry) and first.options is None:
            raise Refused("options key not found in bls config")
        else:
            text = first.options if isinstance(first, Entry) else first.path
            status["rollbackQueued"] = booted.id not in str(text)
        ids = [entry.id() for entry in live]
        kept = [entry for entry in extra if entry["composefs"]["verity"] in ids]
        kept.sort(key=lambda entry: ids.index(entry["composefs"]["verity"]))
        if kept:
            status["rollback"] = kept[0]
        if kept[1:]:
            status["otherDeployments"] = kept[1:]

    def _boot_entry(self, identifier: str, origin: formats.Ini, booted: Booted) -> dict[str, Any]:
        reference = origin.get("origin", {}).get("container-image-reference")
        image = None
        if reference is not None:
            parsed = formats.parse_reference(reference)
            manifest, config, digest = self.image_info(identifier, origin)
            image = {
                "image": parsed,
                "version": (manifest.get("annotations") or {}).get("org.opencontainers.image.version"),
                "timestamp": formats.timestamp(config),
                "imageDigest": digest,
                "architecture": config["architecture"],
            }
        return {
            "image": image,
            "cachedUpdate": None,
            "incompatible": False,
            "pinned": False,
            "softRebootCapable": False,
            "downloadOnly": False,
            "store": None,
            "ostree": None,
            "composefs": {
                "verity": identifier,
                "bootType": self.boot_type(origin).capitalize(),
                "bootloader": self.loader,
                "bootDigest": origin["boot"].get("digest"),
                "missingVerityAllowed": booted.insecure,
            },
        }

    def _soft_reboot(self, status: dict[str, Any], *, uki: bool) -> None:
        others = [status["staged"], status["rollback"], *status.get("otherDeployments", ())]
        options = {} if uki else self._options()
        booted = status["booted"]
        for entry in [booted, *(other for other in others if other)]:
            identifier = entry["composefs"]["verity"]
            if uki:
                options[identifier] = self.uki_cmdline(identifier)
                self._fill_boot_digest(identifier, entry)
            elif identifier not in options:
                raise Refused("Entry not found")
            entry["softRebootCapable"] = entry is not booted and self._soft_rebootable(booted, entry, options)

    def _soft_rebootable(self, booted: Any, target: Any, options: dict[str, str]) -> bool:
        here, there = booted["composefs"], target["composefs"]
        if here["bootDigest"] is None or there["bootDigest"] is None:
            raise Refused("Could not find boot digest for deployment")
        mine, other = options[here["verity"]], options[there["verity"]]
        same_length = len(mine.encode()) == len(other.encode())
        return bool(
            here["bootDigest"] == there["bootDigest"]
            and same_length
            and formats.without_composefs_equal(mine, other)
        )

    def _options(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for entry in [*self.entries(ascending=not self.classic), *self.entries(staged=True)]:
            if entry.options is not None:
                found.setdefault(entry.id(), entry.options)
        return found

    def uki_path(self, identifier: str) -> Path:
        """The unified kernel of a deployment."""
        return self.esp / UKI_DIR / f"{PREFIX}{identifier}.efi"

    def uki_cmdline(self, identifier: str) -> str:
        """Its command line."""
        data = formats.read_bytes(self.uki_path(identifier))
        return formats.uki_section(data, ".cmdline").decode()

    def _fill_boot_digest(self, identifier: str, entry: dict[str, Any]) -> None:
        if entry["composefs"]["bootDigest"] is not None:
            return
        digest = formats.uki_boot_digest(formats.read_bytes(self.uki_path(identifier)))
        entry["composefs"]["bootDigest"] = digest
        origin = self.origin(identifier)
        if self._side_effects and origin is not None:
            origin.setdefault("boot", {})["digest"] = digest
            replace_file(self.origin_path(identifier), formats.write_ini(origin).encode())

    # Changes of the sets

    def write_menu(self, entries: list[MenuEntry]) -> None:
        """Write the staged variant of GRUB's menu of unified kernels."""
        text = formats.USER_CFG_HEAD + "".join(entry.text() for entry in entries)
        replace_file(self.user_cfg_staged, text.encode())

    def activate(self) -> None:
        """Exchange the staged set with the live one, and remove the latter."""
        if self.classic and self.user_cfg.exists():
            exchange(self.user_cfg_staged, self.user_cfg)
            self.user_cfg_staged.unlink()
        else:
            exchange(self.entries_staged, self.entries_dir)
            shutil.rmtree(self.entries_staged)


def replace_file(path: Path, data: bytes) -> None:
    """Write under another name and rename."""
    temporary = path.with_name(f".tmp{path.name}")
    temporary.write_bytes(data)
    temporary.rename(path)


def read_text(path: Path) -> str:
    """Text of a file; ``Refused`` without it."""
    try:
        return formats.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise Refused(f"Reading {path.name}: stream did not contain valid UTF-8") from error


def _compare_entries(left: Entry, right: Entry) -> int:
    for a, b in ((left.sort_key, right.sort_key), (left.machine_id, right.machine_id)):
        if a is not None and b is not None and a != b:
            return -1 if a < b else 1
    return -formats.compare_versions(left.version, right.version)


def _empty_host() -> dict[str, Any]:
    return {
        "apiVersion": "org.containers.bootc/v1",
        "kind": "BootcHost",
        "metadata": {"name": "host"},
        "spec": {"image": None, "bootOrder": "default"},
        "status": {
            "staged": None,
            "booted": None,
            "rollback": None,
            "rollbackQueued": False,
            "type": None,
            "usrOverlay": None,
            "readOnly": False,
        },
    }


def is_deployment(entry: Mapping[str, Any] | None, identifier: str) -> bool:
    """Whether a row of the status is the deployment ``identifier``."""
    return entry is not None and entry["composefs"]["verity"] == identifier


def deployments(status: Mapping[str, Any]) -> list[str]:
    """Ids of all rows of a status."""
    rows = [status["staged"], status["booted"], status["rollback"], *status.get("otherDeployments", ())]
    return [row["composefs"]["verity"] for row in rows if row]
