"""bootc's collector up to the repository's own sweep, which is ``cfsctl gc``. Part of ``bootc_model``."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bootc_repository
from bootc_formats import PREFIX, Refused
from bootc_host import UKI_DIR, Booted, Storage, deployments, is_deployment

TAG_PREFIX = "localhost/bootc-"


@dataclass(frozen=True)
class Removed:
    """What a collection removed, or in a dry run would: names, and the number of objects and links.

    ``stored``: ids of images of containers-storage that podman is to remove; the model leaves them.
    """

    artifacts: tuple[str, ...] = ()
    state_dirs: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    objects: int = 0
    image_links: int = 0
    stream_links: int = 0
    stored: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether it is nothing at all."""
        return self == Removed()


def tag_path(repository: Path, name: str) -> Path:
    """The link of a tag."""
    return repository / "streams/refs/oci" / name.replace("%", "%25").replace("/", "%2F")


def tags(repository: Path) -> dict[str, str]:
    """Manifest digest of each tag."""
    place = repository / "streams/refs/oci"
    names = os.listdir(place) if place.is_dir() else []
    found = {n.replace("%2F", "/").replace("%25", "%"): os.readlink(place / n) for n in names}
    return {name: target.rpartition("/oci-manifest-")[2] for name, target in sorted(found.items())}


def unreferenced(storage: Storage) -> list[str]:
    """Kernels, by the name without prefix, that no live or staged entry names."""
    used = {row.artifact for row in storage.rows()}
    return [name for name in _artifacts(storage) if name not in used]


def _artifacts(storage: Storage) -> list[str]:
    ukis = storage.esp / UKI_DIR
    names = [p.name for p in ukis.glob(f"{PREFIX}*.efi")] if ukis.is_dir() else []
    if not storage.bin_dir.is_dir():
        raise Refused("Opening EFI/Linux: No such file or directory")
    directories = [p.name for p in storage.bin_dir.glob(f"{PREFIX}*") if p.is_dir()]
    return sorted({n.removeprefix(PREFIX).removesuffix(".efi") for n in names + directories})


def collect_artifacts(storage: Storage, booted: Booted, *, dry_run: bool) -> Removed:
    """Part A: kernels without an entry."""
    storage.status(booted)
    dead = unreferenced(storage)
    if booted.id in dead:
        raise Refused(f"Inconsistent state. Booted binaries '{booted.id}' found for cleanup")
    for name in dead if not dry_run else ():
        shutil.rmtree(storage.bin_dir / (PREFIX + name), ignore_errors=True)
        storage.uki_path(name).unlink(missing_ok=True)
        shutil.rmtree(storage.esp / UKI_DIR / f"{PREFIX}{name}.efi.extra.d", ignore_errors=True)
    return Removed(artifacts=tuple(dead))


def collect(storage: Storage, booted: Booted, *, dry_run: bool) -> tuple[Removed, list[str]]:
    """Parts A to C; returns the ids that the sweep gets as roots besides."""
    status = storage.status(booted)["status"]
    removed = collect_artifacts(storage, booted, dry_run=dry_run)
    states = _orphan_states(storage, booted, status, dry_run=dry_run)
    gone = [row.id for row in storage.rows() if not storage.state_dir(row.id).is_dir()]
    live = [name for name in deployments(status) if name not in gone]
    dead_tags = _collect_tags(storage, live, dry_run=dry_run)
    stored = () if dry_run else _unneeded_images(storage, live)
    return replace(removed, state_dirs=states, tags=dead_tags, stored=stored), live


def _orphan_states(
    storage: Storage, booted: Booted, status: dict[str, Any], *, dry_run: bool
) -> tuple[str, ...]:
    """Part B. Entries without a state directory stay in the menu, and boot to an emergency shell."""
    ids = {row.id for row in storage.rows()}
    with os.scandir(storage.sysroot / "state/deploy") as entries:
        states = sorted(entry.name for entry in entries if not entry.is_file(follow_symlinks=False))
    orphans = [name for name in states if name not in ids]
    entries_alone = [identifier for identifier in ids if identifier not in states]
    if booted.id in orphans + entries_alone:
        raise Refused(f"Inconsistent state. Booted entry '{booted.id}' found for cleanup")
    if dry_run:
        return tuple(orphans)
    if any(is_deployment(status["staged"], identifier) for identifier in orphans + entries_alone):
        storage.marker.unlink(missing_ok=True)
    for name in orphans:
        shutil.rmtree(storage.state_dir(name))
    return tuple(orphans)


def _collect_tags(storage: Storage, live: list[str], *, dry_run: bool) -> tuple[str, ...]:
    """Part C: missing tags are made, tags of no live manifest are removed, other people's are left."""
    digests = set()
    for identifier in live:
        origin = storage.origin(identifier) or {}
        digest = origin.get("image", {}).get("manifest_digest") or _by_image(storage, identifier)
        digests |= {digest} if digest else set()
    for digest in sorted(digests) if not dry_run else ():
        if TAG_PREFIX + digest not in tags(storage.repository):
            link = tag_path(storage.repository, TAG_PREFIX + digest)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../oci-manifest-{digest}")
    found = tags(storage.repository)
    dead = [name for name, digest in found.items() if name.startswith(TAG_PREFIX) and digest not in digests]
    for name in dead if not dry_run else ():
        tag_path(storage.repository, name).unlink()
    return tuple(dead)


def _unneeded_images(storage: Storage, live: list[str]) -> tuple[str, ...]:
    """Part D: images of which no name is, to the letter, that of a live origin; bound ones among them."""
    origins = [(storage.origin(identifier) or {}).get("origin", {}) for identifier in live]
    texts = [origin.get("container-image-reference", "") for origin in origins]
    names = {_bare_name(text) for text in texts if text}
    index = storage.repository / "bootc/storage/overlay-images/images.json"
    if not names or not index.is_file():
        return ()
    images = json.loads(index.read_text())
    return tuple(image["id"] for image in images if not names & set(image.get("names") or ()))


def _bare_name(reference: str) -> str:
    """``quay.io/os:1`` of ``ostree-unverified-image:docker://quay.io/os:1``."""
    scheme, _, rest = reference.partition(":")
    if scheme.endswith("-registry"):
        return rest
    transport, _, name = rest.partition(":")
    return name.removeprefix("//") if transport in ("docker", "registry") else name


def _by_image(storage: Storage, identifier: str) -> str | None:
    """A tagged manifest whose plain image is the deployment: hardly ever, since that is its boot image."""
    for digest in tags(storage.repository).values():
        try:
            if identifier in bootc_repository.open_image(storage.repository, digest).plain_ids:
                return digest
        except Refused:
            continue
    return None
