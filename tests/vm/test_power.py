"""The power fails in the middle of work, and what was not flushed is lost: the guest boots, and can go on."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing import successors
from hostimage_testing.guest_registry import HOST, GuestRegistry
from hostimage_testing.guest_state import deployment, status
from hostimage_testing.installed import Installed
from hostimage_testing.intact import check_nothing_lost
from hostimage_testing.power import Disk, Mains
from hostimage_testing.tools import require

pytestmark = [pytest.mark.vm]

FULL = os.environ.get("HOSTIMAGE_VM_FULL") == "1"
#: In full each kind comes six times.
CUTS = ("finalizing", "importing", "deleting")
ALL_CUTS = ("finalizing", "pulling", "importing", "staging", "deleting") * 6
SEED = int(os.environ.get("HOSTIMAGE_POWER_SEED", "20261201"))
#: Another image than the one that is followed, of which the newest is kept for a while.
OTHER = f"docker://{HOST}/other:latest"
LIMIT = 900.0
#: Seconds that a phase is taken to last until it was seen to end.
FIRST_GUESS = 12.0
#: What may be told after a cut: that what was staged was not activated.
AFTER_A_CUT = {"boot"}


@pytest.fixture
def mains(tmp_path: Path, disks: Installed, registry: GuestRegistry) -> Iterator[Mains]:
    with Mains(tmp_path, disks.raw(tmp_path), disks.images, registry.network) as running:
        yield running


def test_what_is_not_flushed_is_lost_with_the_power(tmp_path: Path) -> None:
    """Without this, no cut would prove anything."""
    raw = tmp_path / "disk"
    raw.write_bytes(bytes(1 << 20))
    disk = Disk(tmp_path, raw)
    disk.start()
    # The read shows that what was written arrived; neither a flush nor the end follows.
    orders = ["write -P 65 0 64k", "flush", "write -P 66 256k 64k", "read -P 66 256k 64k", "sleep 60000"]
    commands = [word for order in orders for word in ("-c", order)]
    argv = ["stdbuf", "-oL", require("qemu-io"), "-f", "raw", "-t", "none", *commands, disk.url]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = ""
        while "read 65536/65536" not in said:
            line = writer.stdout.readline()
            assert line, said
            said += line
        assert "Pattern verification failed" not in said
        disk.cut()
        writer.kill()
    data = raw.read_bytes()
    assert data[: 64 << 10] == b"A" * (64 << 10)
    assert data[64 << 10 :] == bytes(len(data) - (64 << 10))


class Campaign:
    """Cuts of one guest's power, one after the other, each in an operation that is then repeated."""

    def __init__(self, mains: Mains, registry: GuestRegistry, directory: Path) -> None:
        self.mains = mains
        self.guest = mains.guest
        self._registry = registry
        self._directory = directory
        self._random = random.Random(SEED)
        self._numbers = itertools.count()
        self._offered = ""
        #: Seconds that each phase took the last time, uninterrupted.
        self._took: dict[str, float] = {}

    def cut(self, phase: str) -> str:
        """Cut the power at a random moment of ``phase``, and see that nothing but the work since is lost.

        Gives a line that tells of it.
        """
        if phase == "finalizing":
            return self._cut_shutdown()
        if phase == "deleting":
            return self._cut_collection()
        self._offer_next()
        return self._cut_update(phase)

    def update(self) -> dict[str, Any]:
        """Stage the newest, and remember how long its phases took; gives the row of it."""
        begin = time.monotonic()
        self.guest.begin('hostimagectl upgrade; echo "ended with $?"')
        starts = {}
        for phase in ("pulling", "importing", "staging", "ended with "):
            self.guest.hear(phase, LIMIT)
            starts[phase] = time.monotonic()
        assert self.guest.hear("0\r?\n") == ""
        phases = itertools.pairwise(starts.items())
        self._took |= {name: max(end - at, 1.0) for (name, at), (_, end) in phases}
        print(f"updated in {time.monotonic() - begin:.0f} s")
        row = deployment(self.guest, "staged")
        assert row["version"] == self._offered
        return row

    def check(self, *booted: str) -> str:
        """The guest is well and runs one of these deployments, which is given; nothing is damaged."""
        state = self.guest.run("systemctl", "is-system-running", "--wait", check=False, limit=LIMIT)
        assert state.out.strip() == "running", self.guest.run("systemctl", "--failed").out
        told = status(self.guest)
        (row,) = (each for each in told["deployments"] if each["booted"])
        assert row["id"] in booted
        assert f"composefs={row['id']}" in self.guest.run("cat", "/proc/cmdline").out.split()
        assert row["default"]
        assert {each["verity"] for each in told["deployments"]} == {"ok"}
        assert {each["id"] for each in told["problems"]} <= AFTER_A_CUT, told["problems"]
        check_nothing_lost(self.guest)
        return str(row["id"])

    def _offer_next(self, name: str = "os") -> None:
        number = next(self._numbers)
        layout = successors.make(self._registry.images, self._directory, number)
        self._registry.offer(successors.version(number), layout, name)
        shutil.rmtree(layout)
        if name == "os":
            self._offered = successors.version(number)

    def _fail_in(self, phase: str) -> str:
        """Cut the power within the time that ``phase``, which just began, is expected to take; and boot."""
        delay = self._random.random() * self._took.get(phase, FIRST_GUESS)
        time.sleep(delay)
        self.mains.cut()
        seconds = self.mains.start()
        return f"{phase}: cut after {delay:.2f} s, booted in {seconds:.0f} s"

    def _cut_update(self, phase: str) -> str:
        running = deployment(self.guest, "booted")["id"]
        self.guest.shell("echo kept >/var/synced && sync /var/synced")
        self.guest.begin("hostimagectl upgrade")
        self.guest.hear(phase, LIMIT)
        told = self._fail_in(phase)
        self.check(running)
        assert self.guest.run("cat", "/var/synced").out.strip() == "kept"
        self.guest.run("hostimagectl", "upgrade", limit=LIMIT)
        assert deployment(self.guest, "staged")["version"] == self._offered
        return told

    def _cut_shutdown(self) -> str:
        self._offer_next()
        old, new = deployment(self.guest, "booted")["id"], self.update()["id"]
        self._begin_shutdown()
        told = self._fail_in("finalizing")
        if self.check(old, new) == new:
            return f"{told}, activated"
        # Nobody else would tell that what was staged is not what runs.
        assert {each["id"] for each in status(self.guest)["problems"]} == {"boot"}
        self.guest.run("hostimagectl", "upgrade", limit=LIMIT)
        assert deployment(self.guest, "staged")["id"] == new
        self._begin_shutdown()
        begin = time.monotonic()
        self._wait_for_console("Stopped")
        self._took["finalizing"] = time.monotonic() - begin
        self.guest.wait_until_off()
        self.guest.start()
        self.check(new)
        return f"{told}, not activated"

    def _house_keeping(self) -> str:
        """The commands that delete what can be deleted."""
        rollback = any(each["is-rollback"] for each in status(self.guest)["deployments"])
        return f"{'hostimagectl delete rollback && ' if rollback else ''}hostimagectl gc"

    def _begin_shutdown(self) -> None:
        self.guest.begin("systemctl --no-block reboot")
        self._wait_for_console("Stopping")

    def _wait_for_console(self, done: str) -> None:
        """Wait until systemd says on the console that this is done to the finalizer."""
        deadline = time.monotonic() + LIMIT
        while not re.search(rf"{done} .*Finalize Staged", self.guest.console_of_boot()):
            assert time.monotonic() < deadline, self.guest.console_of_boot()[-2000:]
            time.sleep(0.05)

    def _cut_collection(self) -> str:
        running = deployment(self.guest, "booted")["id"]
        for _ in range(2):
            self._offer_next("other")
            self.guest.run("hostimagectl", "pull", OTHER, limit=LIMIT)
        self.guest.begin(self._house_keeping())
        self.guest.hear("deleting", LIMIT)
        told = self._fail_in("deleting")
        self.check(running)
        self.guest.shell(self._house_keeping(), limit=LIMIT)
        left = json.loads(
            self.guest.run("hostimagectl", "--quiet", "gc", "--dry-run", "--json", limit=LIMIT).out
        )
        assert left["result"]["result"] == "nothing", left
        check_nothing_lost(self.guest)
        return told


@pytest.mark.timeout(3600 * 6 if FULL else 3000)
def test_power_fails_in_the_middle_of_work(mains: Mains, registry: GuestRegistry, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    mains.start()
    campaign = Campaign(mains, registry, tmp_path)
    for number, phase in enumerate(ALL_CUTS if FULL else CUTS):
        print(f"cut {number}: {campaign.cut(phase)}", flush=True)
