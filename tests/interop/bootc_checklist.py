"""What of a host bootc would not accept: a checklist. Part of ``bootc_model``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import bootc_formats as formats
import bootc_repository
from bootc_collect import TAG_PREFIX, tags, unreferenced
from bootc_formats import Entry, MenuEntry
from bootc_host import Booted, Storage, is_deployment


def wrong(storage: Storage, booted: Booted, host: dict[str, Any]) -> list[str]:
    """Everything that is wrong, in words; ``host`` is the status document."""
    uki = host["status"]["booted"]["composefs"]["bootType"] == "Uki"
    live: list[Entry | MenuEntry] = [*storage.menu()] if storage.classic and uki else [*storage.entries()]
    staged: list[Entry | MenuEntry]
    staged = [*storage.menu(staged=True)] if storage.classic and uki else [*storage.entries(staged=True)]
    found = [*_wrong_set(storage, booted, live), *_wrong_marker(storage, host)]
    known = tags(storage.repository)
    if storage.staged_marker() is None:
        # What is left over after a power cut: hidden, half collected, and removed by the next update.
        staged = []
    for entry in live + staged:
        name = entry.id()[:8]
        found += [f"{name}: {what}" for what in _wrong_deployment(storage, entry.id(), known)]
        found += [f"{name}: {what}" for what in _wrong_entry(storage, entry)]
    if booted.id in unreferenced(storage):
        found.append("the collector would meet the booted kernel")
    return list(dict.fromkeys(found))


def _wrong_set(storage: Storage, booted: Booted, live: list[Entry | MenuEntry]) -> list[str]:
    ids = [entry.id() for entry in live]
    found = [f"{len(live)} live entries: rollback asserts two"] if len(live) > 2 else []
    if len(set(ids)) != len(ids):
        found.append("a deployment has two live entries")
    if booted.id not in ids:
        found.append("the booted deployment has no live entry")
    return found


def _wrong_marker(storage: Storage, host: dict[str, Any]) -> list[str]:
    marker = storage.staged_marker()
    if marker and not is_deployment(host["status"]["staged"], marker["depl_id"]):
        return ["a marker without entry or origin"]
    staged = storage.user_cfg_staged if storage.user_cfg.exists() else storage.entries_staged
    return ["a marker without a staged set"] if marker and not staged.exists() else []


def _wrong_deployment(storage: Storage, identifier: str, known: Mapping[str, str]) -> list[str]:
    if not re.fullmatch(r"[0-9a-f]{128}", identifier):
        return ["the id is not 128 hex digits"]
    found: list[str] = []
    state, origin = storage.state_dir(identifier), storage.origin(identifier)
    if not (state / "etc").is_dir() or (state / "etc").is_symlink():
        found.append("no etc")
    if not (state / "var").is_symlink() or os.readlink(state / "var") != "../../os/default/var":
        found.append("var is not the link it should be")
    image = storage.repository / "images" / identifier
    if not image.is_symlink() or not image.exists():
        found.append("no image in the repository")
    if origin is None:
        return [*found, "no origin"]
    if not re.fullmatch(r"[0-9a-f]{64}", origin.get("boot", {}).get("digest", "")):
        found.append("no boot digest in the origin")
    digest = origin.get("image", {}).get("manifest_digest")
    if digest is None:
        return found
    if known.get(TAG_PREFIX + digest) != digest:
        found.append("no tag for its manifest")
    if identifier not in bootc_repository.open_image(storage.repository, digest).image_ids:
        found.append("its manifest does not refer to it")
    return found


def _wrong_entry(storage: Storage, entry: Entry | MenuEntry) -> list[str]:
    found = [] if entry.artifact()[1] else ["its kernel's name has no prefix"]
    root, paths = storage.esp, [entry.path]
    if isinstance(entry, Entry):
        paths += entry.initrd
        if storage.classic:
            root = storage.root if entry.path.startswith("/boot/") else storage.boot_dir
    found += [f"{path} is not there" for path in paths if not (root / path.lstrip("/")).is_file()]
    options = entry.options if isinstance(entry, Entry) else None
    if options is not None:
        keys = [p for p in formats.parameters(options) if p.split("=")[0].startswith("composefs")]
        found += [] if len(keys) == 1 else ["not exactly one composefs argument"]
    return found
