"""Disks as an older bootc left them, with ``.imginfo`` or without tags, are booted, adopted and updated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hostimage_testing import loaders
from hostimage_testing.emulator import Machine
from hostimage_testing.guest_state import OFFERED, check_booted, deployment, offer, status, tagged
from hostimage_testing.loader_disks import Workshop

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get("HOSTIMAGE_VM_FULL") != "1", reason="for make test-vm-full"),
]

#: Turns the state of a deployment into that of December 2025 to May 2026: image information in a file beside
#: the origin, which names no manifest, and a kernel below the bare id.
_AGE = """
import json, pathlib, re
row, layout = json.loads(%(row)r), pathlib.Path("/run/images/v1")
name = row["id"]
state = pathlib.Path("/sysroot/state/deploy") / name
(listed,) = json.loads((layout / "index.json").read_text())["manifests"]
assert listed["digest"] == row["image-digest"]
blob = lambda digest: json.loads((layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_text())
manifest = blob(listed["digest"])
info = {"config": blob(manifest["config"]["digest"]), "manifest": manifest}
(state / (name + ".imginfo")).write_text(json.dumps(info, separators=(",", ":")))
origin = state / (name + ".origin")
text = origin.read_text()
assert "manifest_digest" in text
text = re.sub(r"(?s)\\n*\\[image\\].*", "", text)
origin.write_text(re.sub("(?m)^container-image-reference *=.*$", %(reference)r, text))
kernels = pathlib.Path("/efi/EFI/Linux")
(kernels / ("bootc_composefs-" + name)).rename(kernels / name)
(entry,) = pathlib.Path("/efi/loader/entries").iterdir()
entry.write_text(entry.read_text().replace("bootc_composefs-" + name, name))
"""
_REFERENCE = f"container-image-reference = ostree-unverified-image:oci:{OFFERED}:latest"
_UNTAG = "rm -v /sysroot/composefs/streams/refs/oci/*bootc-*"


def on_the_root(guest: Machine, command: str) -> None:
    """Run a line of shell while the physical root can be written; the daemon does not run."""
    guest.run("systemctl", "stop", "hostimaged.service")
    guest.shell(f"unshare --mount sh -ec 'mount -o remount,rw /sysroot; {command}'")


def kernels(guest: Machine) -> set[str]:
    return set(guest.run("ls", "/efi/EFI/Linux").out.split())


def test_disks_of_old(tmp_path: Path, workshop: Workshop) -> None:
    disk = workshop.disk(loaders.SYSTEMD)
    with Machine(tmp_path, disk.overlay(tmp_path), disk.images) as guest:
        guest.start()
        first = deployment(guest, "booted")
        offer(guest, "v1")
        program = _AGE % {"row": json.dumps(first), "reference": _REFERENCE}
        guest.shell(f"cat >/run/age.py <<'END'\n{program}\nEND")
        on_the_root(guest, f"python3 /run/age.py; {_UNTAG}")
        assert (tagged(guest), kernels(guest)) == (set(), {first["id"]})
        guest.reboot()

        # What it is of is known at once; that it stays known is the daemon's first work, and done after gc.
        row = deployment(guest, "booted")
        assert (row["id"], row["version"], row["verity"]) == (first["id"], "v1", "ok")
        assert (row["image-digest"], row["config-digest"]) == (first["image-digest"], first["config-digest"])
        guest.run("hostimagectl", "gc", limit=600)
        assert tagged(guest) == {first["image-digest"]}
        assert check_booted(guest, "v1")["id"] == first["id"]
        offer(guest, "v2")
        guest.run("hostimagectl", "upgrade", limit=900)
        second = deployment(guest, "staged")
        assert kernels(guest) == {f"bootc_composefs-{first['id']}"}
        guest.reboot()

        assert check_booted(guest, "v2")["id"] == second["id"]
        assert deployment(guest, "is-rollback")["id"] == first["id"]
        on_the_root(guest, _UNTAG)
        assert tagged(guest) == set()
        guest.reboot()

        row = deployment(guest, "booted")
        assert (row["id"], row["image-digest"]) == (second["id"], second["image-digest"])
        guest.run("hostimagectl", "gc", limit=600)
        assert tagged(guest) == {first["image-digest"], second["image-digest"]}
        assert check_booted(guest, "v2")["id"] == second["id"]
        assert {each["id"] for each in status(guest)["deployments"]} == {first["id"], second["id"]}
        offer(guest, "v3")
        guest.run("hostimagectl", "upgrade", limit=900)
        guest.reboot()

        check_booted(guest, "v3")
        assert deployment(guest, "is-rollback")["id"] == second["id"]
        guest.run("hostimagectl", "verify", limit=1200)
