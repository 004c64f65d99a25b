"""The demo: the whole job end to end, on a private bus and a scratch root, without root privileges.

Starts a message bus and the daemon for itself, builds a sample OS image, deploys it, and drives the daemon
with ``hostimagectl`` as a user would: pull, status, upgrade, reboot, roll back. Each command is shown with
its output, and what came of it is checked. A reboot is a new start of the daemon on a root whose facts are
written anew. Ends with a summary of what was done; everything it made is removed, unless ``--keep`` says
otherwise. Exit code 0 if all went as it should.

usage: run.py [--keep]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NoReturn

from report import DemoFailed, Report, heading

if TYPE_CHECKING:
    from pathlib import Path

    from programs import Programs
    from sample_image import SampleImage
    from scratch import Scratch

_NOT_FOUND: Final = 22
_PACKAGES: Final = ("hostimaged", "hostimagectl", "hostimage_dbus", "zstandard")
#: The name in the layout that updates follow, as a tag in a registry that is moved to each new version.
_TAG: Final = "stable"


def main() -> int:
    """Run the demo and give the exit code."""
    parser = argparse.ArgumentParser(
        description="Show hostimaged at work on a private bus and a scratch root."
    )
    parser.add_argument("--keep", action="store_true", help="keep the scratch directory and say where it is")
    arguments = parser.parse_args()
    check_requirements()
    from programs import Programs
    from scratch import Scratch

    signal.signal(signal.SIGTERM, _terminated)
    report = Report()
    scratch = Scratch()
    try:
        with ExitStack() as stack:
            Demo(scratch, report, Programs(scratch, report, stack)).run()
    except DemoFailed as error:
        print(f"\nThe demo FAILED: {error}", flush=True)
        _show_log(scratch.log)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was interrupted.", flush=True)
        return 130
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch.path)
    summary(report, scratch, kept=arguments.keep)
    return 0


def check_requirements() -> None:
    """Name everything that is missing, and leave."""
    missing = [f"the program {name}" for name in ("dbus-daemon",) if shutil.which(name) is None]
    missing += [f"the Python package {name}" for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}; 'make demo' installs what it can.")


class Demo:
    """The steps, each of which raises ``DemoFailed``."""

    def __init__(self, scratch: Scratch, report: Report, programs: Programs) -> None:
        self._scratch = scratch
        self._report = report
        self._programs = programs

    def run(self) -> None:
        """Every step in turn."""
        image = self._prepare()
        self._pull(image)
        self._deploy(image)
        self._upgrade()
        self._roll_back()
        self._collect()
        self._unify()
        heading("The end")
        status = self._status()
        self._check("no problems, nothing left running", status["problems"] == [] and status["jobs"] == [])
        accepted = self._programs.cfsctl_accepts()
        if accepted is None:
            print("  (cfsctl, composefs-rs's own tool, is not installed: its check is left out)", flush=True)
        else:
            self._check("cfsctl accepts the repository", accepted)

    def _prepare(self) -> SampleImage:
        heading("A sample OS image in an OCI image layout")
        image = self._publish("1")
        for layer in image.layers:
            print(
                f"  layer {layer.title:<10} {layer.compression:<5} {layer.size / 2**20:6.1f} MiB", flush=True
            )
        heading("A private bus, and the daemon on a scratch root")
        self._programs.start_bus()
        self._programs.start_daemon()
        return image

    def _publish(self, version: str) -> SampleImage:
        from sample_image import build

        # Files of the image belong to who runs this: only root could deploy those of others.
        return build(self._scratch.image, version=version, tag=_TAG, owner=(os.geteuid(), os.getegid()))

    def _pull(self, image: SampleImage) -> None:
        heading("Pull the image: fetched, verified, stored, turned into a composefs image")
        self._programs.ctl("pull", image.reference)
        rows = self._programs.json("images")["images"]
        row = next((row for row in rows if row["manifest-digest"] == image.manifest_digest), {})
        self._check("the image is listed with its digest and version", row.get("version") == "1")

        heading("Pull again: nothing to do")
        again = self._programs.json("pull", image.reference, show=True)
        self._check("nothing was changed", again["result"]["changed"] is False)
        self._check("and no layer was read", again["job"]["bytesDone"] < 100_000)

        heading("What goes wrong says so, and has its own exit code")
        self._programs.ctl("pull", f"oci:{self._scratch.image}:no-such-version", code=_NOT_FOUND)

    def _deploy(self, image: SampleImage) -> None:
        heading("The first deployment, as an installer makes it: without the bus")
        self._programs.stop_daemon()
        root = str(self._scratch.root)
        self._programs.hostimaged("deploy", "--root", root, "--verity", "opportunistic", image.reference)
        self._scratch.configure()
        self._power_on("The host starts for the first time")
        self._programs.ctl("status")
        status = self._status()
        self._check("version 1 runs", _version(status, "booted") == "1")
        self._check("its image is the one that updates follow", status["trackedImage"] == image.reference)
        (self._scratch.etc / "motd").write_text("changed by the administrator\n")

    def _upgrade(self) -> None:
        heading("A new version is published: what would an update be?")
        image = self._publish("2")
        self._programs.ctl("check")

        heading("Upgrade: only what is new is fetched, then staged beside what runs")
        done = self._programs.json("upgrade", "--expect-digest", image.manifest_digest, show=True)
        self._check("the new version is staged", done["result"]["result"] == "staged")
        shared = sum(layer.size for layer in image.layers[:-1])
        self._check("the layers it shares were not read again", done["job"]["bytesCached"] >= shared)
        self._programs.ctl("upgrade")
        self._programs.ctl("status")
        status = self._status()
        self._check("version 1 still runs", _version(status, "booted") == "1")
        self._check("version 2 boots next", _version(status, "staged") == "2")
        self._programs.ctl("diff", "booted", "staged")

        self._reboot("Reboot: the shutdown merges /etc and activates what is staged")
        self._programs.ctl("status")
        status = self._status()
        self._check("version 2 runs", _version(status, "booted") == "2")
        self._check("version 1 can be rolled back to", _version(status, "is-rollback") == "1")
        self._check("/etc has what is new in version 2", "2" in (self._scratch.etc / "issue").read_text())
        motd = (self._scratch.etc / "motd").read_text()
        self._check("and keeps what the administrator wrote", motd == "changed by the administrator\n")

    def _roll_back(self) -> None:
        heading("Roll back: the former version is still there, so nothing is fetched")
        self._programs.ctl("rollback")
        self._programs.ctl("status")
        self._check("the rollback waits for the reboot", self._status()["rollbackQueued"] is True)
        self._reboot("Reboot into the former version")
        self._programs.ctl("status")
        status = self._status()
        self._check("version 1 runs again", _version(status, "booted") == "1")
        self._check("version 2 is what could be gone to", _version(status, "is-rollback") == "2")

    def _collect(self) -> None:
        heading("A third version is pulled, so the second is only kept for going to")
        self._publish("3")
        self._programs.ctl("pull")
        self._programs.ctl("gc", "--dry-run")
        self._programs.ctl("gc")
        self._programs.ctl("why", "rollback")
        told = self._programs.json("why", "rollback")["result"]

        heading("Delete it, and collect what only it needed")
        before = self._objects()
        self._programs.ctl("delete", "rollback")
        self._programs.ctl("gc")
        freed = before - self._objects()
        print(f"  {freed} of {before} objects are gone, {told['objects-freed']} were announced")
        self._check("what was announced is gone, and nothing else", freed == told["objects-freed"] > 0)
        status = self._status()
        self._check("version 1 still runs, alone", _version(status, "booted") == "1")

    def _unify(self) -> None:
        if not self._programs.can_run_containers():
            print("  (podman, runc and root's rights are needed for containers: left out)", flush=True)
            return
        heading("Unified storage: the image is a container image, too, and is stored once")
        image = self._publish("4")
        self._programs.ctl("set-unified", "on")
        done = self._programs.json("pull", show=True)["result"]
        self._check("nothing of it was fetched twice", done["bytes-fetched"] == 0 and done["unified"] is True)
        self._check("and nothing copied", done["objects-copied"] == 0)
        self._check("it is the image that was published", done["manifest-digest"] == image.manifest_digest)
        printed = self._programs.container(done["stored-as"], "/usr/bin/release")
        print(printed, end="", flush=True)
        self._check("a container of it prints its own os-release", "VERSION_ID=4" in printed)

    def _objects(self) -> int:
        return sum(1 for _ in (self._scratch.repository / "objects").glob("??/*"))

    def _reboot(self, title: str) -> None:
        heading(title)
        self._programs.stop_daemon()
        self._programs.hostimaged("finalize", "--root", str(self._scratch.root))
        self._power_on()

    def _power_on(self, title: str = "") -> None:
        if title:
            heading(title)
        entry = self._scratch.power_on()
        print(f"  the boot loader starts '{entry.title}', the kernel deployment {entry.deployment[:12]}")
        self._programs.start_daemon()
        self._report.booted(entry.title)

    def _status(self) -> dict[str, Any]:
        return self._programs.json("status")

    def _check(self, what: str, truth: bool) -> None:
        self._report.check(what, truth)


def _version(status: dict[str, Any], role: str) -> str | None:
    """Version of the one deployment that has a role, None if there is none or there are several."""
    versions = [row["version"] for row in status["deployments"] if row[role]]
    return versions[0] if len(versions) == 1 else None


def summary(report: Report, scratch: Scratch, *, kept: bool) -> None:
    """Say what was done, made and removed."""
    heading("Summary")
    for line in report.lines():
        print(f"  {line}")
    print("  Started and ended: a private dbus-daemon, hostimaged and its workers.")
    if kept:
        print(f"  Kept: {scratch.path}")
        print(f"        the repository is {scratch.repository}, the daemon's log {scratch.log}")
    else:
        print(f"  Created and removed: {scratch.path} (image, scratch root, repository, logs).")
    print("  Nothing else was touched: no system bus, no system directory.", flush=True)


def _show_log(log: Path) -> None:
    if log.exists() and log.stat().st_size:
        print("The end of the daemon's log:")
        for line in log.read_text(errors="replace").splitlines()[-30:]:
            print(f"  {line}")


def _terminated(number: int, frame: object) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
