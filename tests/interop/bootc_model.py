"""An independent model of bootc on a composefs host: its view, its changes, its refusals and its assertions.

Written from a description of bootc 1.16.9's state, with its behaviour looked up in bootc's source where that
leaves a question, and importing nothing of ours: so it can judge what we write (``Bootc.accepts``) and act on
a host between our own acts. Files are in
``bootc_formats``, storage and status in ``bootc_host``, the collector in ``bootc_collect``, the merge in
``bootc_etc``. Known mistakes are kept, since a host of ours has to live with them; each is said where it is.

Not modelled: fetching (an image is there, or is pulled by ``cfsctl``), SELinux, containers-storage, mounts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bootc_etc
import bootc_formats as formats
from bootc_checklist import wrong
from bootc_collect import TAG_PREFIX, Removed, collect, collect_artifacts
from bootc_formats import PREFIX, Entry, MenuEntry, Panicked, Refused
from bootc_host import UKI_DIR, Booted, Storage, deployments, entry_file_name, is_deployment, replace_file
from bootc_migration import migrate

from hostimage_testing.os_images import OsImage

__all__ = ["Bootc", "Panicked", "Refused", "Removed"]


class Bootc:
    """bootc on the host below ``root``; ``images`` are those it may meet, by deployment id.

    ``systemd`` is the version of systemd on the host, which decides between the keys ``uki`` and ``efi``.
    """

    def __init__(self, root: Path, cfsctl: str, images: Mapping[str, OsImage], *, systemd: int = 257) -> None:
        self.storage = Storage(root)
        self._cfsctl = cfsctl
        self._images = images
        self._systemd = systemd

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Booted]:
        """What every command does first, ``status`` not excepted."""
        with self.storage.opened() as booted:
            migrate(self.storage, booted)
            yield booted

    # Commands

    def status(self) -> dict[str, Any]:
        """``bootc status --format=json``."""
        with self._opened() as booted:
            return self.storage.status(booted)

    def upgrade(self, image: OsImage, *, download_only: bool = False) -> str:
        """``bootc upgrade`` to ``image``: ``staged``, or ``skip`` when any deployment is that already."""
        return self._update(image, download_only=download_only, switch=False)

    def switch(self, image: OsImage) -> str:
        """``bootc switch`` to ``image``."""
        return self._update(image, download_only=False, switch=True)

    def from_downloaded(self) -> str:
        """``bootc upgrade --from-downloaded``: ``unlocked``, or ``not-locked``."""
        with self._opened() as booted:
            staged = self.storage.status(booted)["status"]["staged"]
            if staged is None:
                raise Refused("No staged deployment found")
            if not staged["downloadOnly"]:
                return "not-locked"
            self._mark(staged["composefs"]["verity"], locked=False)
            return "unlocked"

    def rollback(self) -> str:
        """``bootc rollback``: ``queued`` or ``unqueued``, as bootc says it, which is not always true."""
        with self._opened() as booted:
            return self._rollback(booted)

    def finalize(self) -> str:
        """What runs at shutdown: ``nothing``, ``locked`` or ``activated``."""
        with self._opened() as booted:
            status = self.storage.status(booted)["status"]
            staged = status["staged"]
            if staged is None:
                return "nothing"
            if staged["downloadOnly"]:
                return "locked"
            state = self.storage.state_dir(staged["composefs"]["verity"])
            pristine = self._pristine(booted.id)
            bootc_etc.merge(pristine, self.storage.root / "etc", state / "etc")
            (state / "etc/.updated").unlink(missing_ok=True)
            self._activate(staged["composefs"]["bootType"])
            collect_artifacts(self.storage, booted, dry_run=False)
            return "activated"

    def gc(self, *, prune_repo: bool = True, dry_run: bool = False) -> Removed:
        """``bootc internals composefs-gc``."""
        with self._opened() as booted:
            if not prune_repo:
                return collect_artifacts(self.storage, booted, dry_run=dry_run)
            removed, roots = collect(self.storage, booted, dry_run=dry_run)
        return self._sweep(removed, roots, dry_run=dry_run)

    def delete(self, identifier: str) -> Removed:
        """``bootc delete-deployment``."""
        with self._opened() as booted:
            if identifier == booted.id:
                raise Refused("Cannot delete currently booted deployment")
            status = self.storage.status(booted)["status"]
            rows = [status["staged"], status["rollback"], *status.get("otherDeployments", ())]
            if identifier not in (row["composefs"]["verity"] for row in rows if row):
                raise Refused(f"Deployment {identifier} not found")
            staged = is_deployment(status["staged"], identifier)
            if is_deployment(status["rollback"], identifier) and status["rollbackQueued"]:
                self._rollback(booted)
            self._delete_entry(identifier, status["booted"]["composefs"]["bootType"], staged=staged)
        return self.gc()

    # Judgement

    def accepts(self) -> list[str]:
        """What bootc would not accept of the host, empty if all is well; nothing is written.

        bootc's own status goes through, its rollback does not panic, and its collector would neither fail nor
        remove anything of a deployment.
        """
        judge = Storage(self.storage.root, side_effects=False)
        try:
            with judge.opened() as booted:
                return wrong(judge, booted, judge.status(booted))
        except Refused as error:
            return [f"status: {error}"]

    # Updates

    def _update(self, image: OsImage, *, download_only: bool, switch: bool) -> str:
        with self._opened() as booted:
            status = self.storage.status(booted)["status"]
            pulled = (self.storage.repository / f"streams/oci-config-{image.config_digest}").exists()
            known = deployments(status)
            if pulled and image.id in known:
                if switch:
                    raise Refused("Target image has the same fs-verity digest as an existing deployment")
                return "skip"
            if pulled:
                self._drop_leftovers(image.id, status["booted"]["composefs"]["bootType"])
        # cfsctl takes the locks of the pull itself.
        self._pull(image)
        with self._opened() as booted:
            if image.id in known:
                raise Refused("Target image has the same fs-verity digest as an existing deployment")
            self._check_conflicts(booted, image)
            if image.uki is not None:
                self._stage_uki(booted, image)
            else:
                self._stage_kernel(booted, image)
            self._write_state(image, locked=download_only)
        self.gc()
        return "staged"

    def _drop_leftovers(self, identifier: str, boot_type: str) -> None:
        if self.storage.classic and boot_type == "Uki":
            self.storage.user_cfg_staged.unlink(missing_ok=True)
        elif self.storage.entries_staged.exists():
            shutil.rmtree(self.storage.entries_staged)
        if self.storage.state_dir(identifier).exists():
            shutil.rmtree(self.storage.state_dir(identifier))

    def _pull(self, image: OsImage) -> None:
        self._run("oci", "pull", "--bootable", image.source, TAG_PREFIX + image.manifest_digest)

    def _check_conflicts(self, booted: Booted, image: OsImage) -> None:
        current = bootc_etc.tree(self.storage.root / "etc")
        diff = bootc_etc.compare(self._pristine(booted.id), current, _image_etc(image))
        if diff.unmergeable:
            raise Refused(f"Merge conflicts found in etc: {diff.unmergeable}")

    def _stage_kernel(self, booted: Booted, image: OsImage) -> None:
        current = self._booted_entry(booted)
        if current.options is None:
            raise Refused("Found NonEFI config")
        mark = "?" if booted.insecure else ""
        options = formats.with_composefs(current.options, mark + image.id)
        options = _new_kargs(options, self._kargs_here(), image.recipe.kargs)
        directory = self._same_kernel(image.boot_digest) or self._write_kernel(image)
        root = "/EFI/Linux"
        if self.storage.classic:
            # Relative to the partition that holds them: is /boot one of its own?
            root = "" if _has_mount(self.storage.root, "/sysroot/boot") else "/boot"
        os_id, title, version = formats.os_release(image.recipe.os_release)
        entry = Entry(
            version=version or image.id,
            title=title or image.id,
            linux=f"{root}/{directory}/vmlinuz",
            initrd=(f"{root}/{directory}/initrd",),
            options=options,
            sort_key=f"bootc-{os_id}-0",
        )
        if self.storage.entries_staged.exists():
            shutil.rmtree(self.storage.entries_staged)
        self._write_pair(entry, current, os_id)

    def _stage_uki(self, booted: Booted, image: OsImage) -> None:
        data = image.uki or b""
        found = formats.composefs_value(formats.uki_section(data, ".cmdline").decode())
        if found is None or found.removeprefix("?") != image.id:
            raise Refused(
                f"The UKI has the wrong composefs= parameter (is '{found}', should be '{image.id}')"
            )
        target = self.storage.uki_path(image.id)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data)
        os_id, title, version = formats.os_release(formats.uki_section(data, ".osrel").decode())
        label = " ".join(part for part in (title, version) if part)
        path = f"/{UKI_DIR}/{target.name}"
        if self.storage.classic:
            # The first entry is taken for the booted one.
            entries = [MenuEntry(f"{label}: ({image.id})", path), self.storage.menu()[0]]
            self.storage.write_menu(entries)
            return
        key = "uki" if self._systemd >= 258 and self.storage.loader != "grub-cc" else "efi"
        sort_key = f"bootc-{os_id}-0"
        entry = Entry(version=version or image.id, title=label, efi=(key, path), sort_key=sort_key)
        self._write_pair(entry, self._booted_entry(booted), os_id)
        loader_conf = self.storage.esp / "loader/loader.conf"
        if not loader_conf.exists():
            replace_file(loader_conf, b"timeout 5")

    def _write_pair(self, first: Entry, second: Entry, os_id: str) -> None:
        place = self.storage.entries_staged
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / entry_file_name(os_id, first.version, 1), first.text().encode())
        second = replace(second, sort_key=f"bootc-{os_id}-1")
        replace_file(place / entry_file_name(os_id, second.version, 0), second.text().encode())

    def _booted_entry(self, booted: Booted) -> Entry:
        for entry in self.storage.entries():
            if booted.id in entry.path if entry.efi else entry.id() == booted.id:
                return entry
        raise Refused("Booted BLS not found")

    def _same_kernel(self, digest: str) -> str | None:
        """The directory of the same kernel; one that is not complete stops bootc for ever."""
        for name in sorted(os.listdir(self.storage.bin_dir)):
            place = self.storage.bin_dir / name
            if place.is_dir() and name.startswith(PREFIX):
                parts = [formats.read_bytes(place / part) for part in ("vmlinuz", "initrd")]
                if formats.sha256(b"".join(parts)) == digest:
                    return name
        return None

    def _write_kernel(self, image: OsImage) -> str:
        name = PREFIX + image.id
        place = self.storage.bin_dir / name
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / "vmlinuz", image.recipe.linux)
        replace_file(place / "initrd", image.recipe.initramfs)
        return name

    def _kargs_here(self) -> tuple[str, ...]:
        found: list[str] = []
        place = self.storage.root / "usr/lib/bootc/kargs.d"
        for path in sorted(place.glob("*.toml")) if place.is_dir() else ():
            found += re.findall(r'"([^"]*)"', path.read_text())
        return tuple(found)

    def _write_state(self, image: OsImage, *, locked: bool) -> None:
        state = self.storage.state_dir(image.id)
        (state / "etc").mkdir(parents=True, exist_ok=True)
        (self.storage.sysroot / "state/os/default/var").mkdir(parents=True, exist_ok=True)
        if (state / "var").is_symlink():
            raise Refused("Failed to create symlink for /var: File exists")
        (state / "var").symlink_to("../../os/default/var")
        for path, data in image.recipe.etc_files.items():
            target = state / "etc" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (state / "etc/.updated").unlink(missing_ok=True)
        reference = formats.parse_reference(f"ostree-unverified-image:{image.recipe.reference}")
        digest = formats.uki_boot_digest(image.uki) if image.uki else image.boot_digest
        origin = {
            "origin": {"container-image-reference": formats.write_reference(reference)},
            "boot": {"boot_type": "uki" if image.uki else "bls", "digest": digest},
            "image": {"manifest_digest": image.manifest_digest},
        }
        replace_file(self.storage.origin_path(image.id), formats.write_ini(origin).encode())
        self._mark(image.id, locked=locked)

    def _mark(self, identifier: str, *, locked: bool) -> None:
        self.storage.marker.parent.mkdir(parents=True, exist_ok=True)
        content = {"depl_id": identifier, "finalization_locked": locked}
        replace_file(self.storage.marker, json.dumps(content, separators=(",", ":")).encode())

    # Rollback and activation

    def _rollback(self, booted: Booted) -> str:
        host = self.storage.status(booted)
        status = host["status"]
        if status["rollback"] is None:
            raise Refused("No rollback available")
        outcome = "unqueued" if host["spec"]["bootOrder"] == "rollback" else "queued"
        if self.storage.classic and status["rollback"]["composefs"]["bootType"] == "Uki":
            entries = self.storage.menu()
            if len(entries) != 2:
                raise Panicked("assertion failed: menuentries.len() == 2")
            # A staged deployment keeps its marker, though its menu is gone.
            self.storage.write_menu(entries[::-1])
            self.storage.activate()
            return outcome
        configs = self.storage.entries(ascending=False)
        if len(configs) != 2:
            raise Panicked("assertion failed: all_configs.len() == 2")
        if self.storage.entries_staged.exists():
            shutil.rmtree(self.storage.entries_staged)
        if status["staged"] is not None:
            self.storage.marker.unlink()
        # The literal "bootc", whatever the os id of the entries is.
        first, second = replace(configs[0], sort_key="bootc-bootc-0"), configs[1]
        self.storage.entries_staged.mkdir(parents=True)
        self._write_pair(first, second, "bootc")
        self.storage.activate()
        return outcome

    def _activate(self, boot_type: str) -> None:
        staged = self.storage.entries_staged
        if self.storage.classic and boot_type == "Uki":
            staged = self.storage.user_cfg_staged
        if not staged.exists():
            raise Refused(f"renameat {staged.name}: No such file or directory")
        self.storage.activate()

    def _delete_entry(self, identifier: str, boot_type: str, *, staged: bool) -> None:
        storage = self.storage
        if storage.classic and boot_type == "Uki":
            if staged:
                storage.user_cfg_staged.unlink()
                return
            storage.write_menu([entry for entry in storage.menu() if identifier not in entry.chainloader])
            storage.activate()
            return
        place = storage.entries_staged if staged else storage.entries_dir
        for path in sorted(place.glob("*.conf")):
            entry = formats.parse_entry(path.read_text(), path.name)
            if identifier in (entry.path if entry.efi else entry.options or ""):
                path.unlink()
                break
        if staged:
            shutil.rmtree(place)

    def _sweep(self, removed: Removed, roots: list[str], *, dry_run: bool) -> Removed:
        arguments = ["--dry-run"] if dry_run else []
        out = self._run("gc", *arguments, *(part for root in roots for part in ("--root", root)))

        def number(pattern: str) -> int:
            found = re.search(pattern, out, re.MULTILINE)
            return int(found.group(1)) if found else 0

        return replace(
            removed,
            objects=number(r"^Objects: (\d+)"),
            image_links=number(r"^Pruned symlinks: (\d+) images"),
            stream_links=number(r"^Pruned symlinks: .* (\d+) streams"),
        )

    def _run(self, *argv: str) -> str:
        command = [self._cfsctl, "--repo", str(self.storage.repository), "--insecure", *argv]
        done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Refused(f"{argv[0]}: {done.stderr}")
        return done.stdout

    def _pristine(self, identifier: str) -> bootc_etc.Tree:
        if identifier not in self._images:
            raise Refused(f"image {identifier} not found")
        return _image_etc(self._images[identifier])


def _image_etc(image: OsImage) -> bootc_etc.Tree:
    return bootc_etc.from_files(image.recipe.etc_files)


def _has_mount(root: Path, place: str) -> bool:
    lines = (root / "proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == place for line in lines)


def _new_kargs(options: str, old: tuple[str, ...], new: tuple[str, ...]) -> str:
    gone = [karg for karg in old if karg not in new]
    added = [karg for karg in new if karg not in old]
    kept = [p for p in formats.parameters(options) if not any(formats.same(p, karg) for karg in gone)]
    kept += [karg for karg in added if not any(formats.same(p, karg) for p in kept)]
    return " ".join(kept)
