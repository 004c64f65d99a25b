"""Kernels without the prefix: bootc renames them whenever it opens a host. Part of ``bootc_model``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bootc_formats as formats
from bootc_formats import PREFIX, Entry, Refused
from bootc_host import UKI_DIR, Booted, Storage, entry_file_name, read_text, replace_file


def migrate(storage: Storage, booted: Booted) -> None:
    """Give every kernel and the entries the prefix, if any entry lacks it."""
    origin = storage.origin(booted.id)
    if origin is None:
        raise Refused("Opening origin file: No such file or directory")
    uki = storage.boot_type(origin) == "uki"
    if storage.classic and uki:
        _migrate_menu(storage)
        return
    os_id, _, _ = formats.os_release(read_text(storage.root / "usr/lib/os-release"))
    renames: dict[str, str] = {}
    written: dict[str, Entry] = {}
    for entry in storage.entries():
        artifact, prefixed = entry.artifact()
        if prefixed:
            # It is not carried over into the set that becomes live.
            continue
        if not entry.efi and not (storage.bin_dir / artifact).is_dir():
            raise Refused(f"Directory for entry {artifact} not found")
        renames[artifact + (".efi" if uki else "")] = PREFIX + artifact + (".efi" if uki else "")
        name = entry_file_name(os_id, entry.version, 1 if artifact == booted.id else 0)
        written[name] = _with_prefix(entry, artifact)
    if not renames:
        return
    storage.entries_staged.mkdir(parents=True, exist_ok=True)
    for name, entry in written.items():
        replace_file(storage.entries_staged / name, entry.text().encode())
    _rename_all(storage.esp / UKI_DIR if uki else storage.bin_dir, renames)
    storage.activate()


def _migrate_menu(storage: Storage) -> None:
    entries = [entry for entry in storage.menu() if not entry.artifact()[1]]
    if not entries:
        return
    names = [entry.artifact()[0] for entry in entries]
    new = [replace(e, chainloader=f"/{UKI_DIR}/{PREFIX}{n}.efi") for e, n in zip(entries, names, strict=True)]
    storage.write_menu(new)
    _rename_all(storage.esp / UKI_DIR, {f"{name}.efi": f"{PREFIX}{name}.efi" for name in names})
    storage.activate()


def _with_prefix(entry: Entry, artifact: str) -> Entry:
    if entry.efi:
        return replace(entry, efi=(entry.efi[0], f"/{UKI_DIR}/{PREFIX}{artifact}.efi"))
    return replace(
        entry,
        linux=str(entry.linux).replace(artifact, PREFIX + artifact),
        initrd=tuple(path.replace(artifact, PREFIX + artifact) for path in entry.initrd),
    )


def _rename_all(place: Path, renames: dict[str, str]) -> None:
    for old, new in renames.items():
        if not (place / old).exists():
            raise Refused(f"Failed to rename {old}: No such file or directory")
        (place / old).rename(place / new)
