"""The life of a host at random: our operations, crashes amidst them, bootc in between, reboots, power cuts.

After every step status tells the truth: whatever is in the menu would start, the boot loader's default is
what is shown as such, and bootc accepts the host. ``HOSTIMAGE_SOAK=1`` runs ten times as much.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bootc_model import Bootc, Refused
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hostimage_testing.disk import Crash
from hostimage_testing.hosts import Kind, RecordedHost
from hostimage_testing.lives import Life, Records
from hostimage_testing.operating import At
from hostimage_testing.os_images import OsImage, Recipe
from hostimage_testing.recorded import paths_of, problems_of, state_of
from hostimaged.errors import HostimageError
from hostimaged.host import finalize, pins, recover, reorder, stage
from hostimaged.host.collect import collect
from hostimaged.host.imgref import OriginReference
from hostimaged.host.model import HostState, ProblemId
from hostimaged.host.session import Session, open_session
from hostimaged.ids import DeploymentId, ManifestDigest
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(600)]

SOAK = os.environ.get("HOSTIMAGE_SOAK") == "1"
#: Lives of each kind of host.
EXAMPLES = int(os.environ.get("HOSTIMAGE_LIVES", "100" if SOAK else "10"))
REFERENCE = OriginReference.of(ImageReference.parse("docker://registry.example/os:stable"))
#: Versions that differ in text, in number, or not at all; kernels that are shared or not.
RECIPES = [
    Recipe(version="a", os_version="44"),
    Recipe(version="b", os_version="44", kernel=b"kernel two "),
    Recipe(version="c", os_version="9.10"),
    Recipe(version="d", os_version="9.9", kernel=b"kernel two ", os_id="other-os"),
    Recipe(version="e", os_version="45", etc={"hostname": b"another image\n"}),
]

Operation = Callable[[Session], dict[str, Any]]


def full_of_images(host: RecordedHost) -> Life:
    """The second image runs, the first did; all are in the repository, under tags that bootc leaves alone."""
    pulled = [host.image(recipe) for recipe in RECIPES]
    for image in pulled:
        host.write_tag(image, "localhost/hostimaged-pull-")
    old, new = host.deploy(pulled[0]), host.deploy(pulled[1])
    host.live(new, old)
    host.booted(new)
    return Life(host, new, rollback=old)


indices = st.integers(0, len(RECIPES) - 1)
steps = st.integers(0, 24)
orders = st.sampled_from(["ours", "bootc", "ours, bootc", "bootc, ours", "both at once"])


class HostMachine(RuleBasedStateMachine):
    """The machine; ``records``, ``cfsctl`` and ``kind`` are set by the test."""

    records: ClassVar[Records]
    cfsctl: ClassVar[str]
    kind: ClassVar[Kind]

    @initialize()
    def begin(self) -> None:
        """A host with two deployments."""
        self.place = Path(tempfile.mkdtemp(dir=self.records.place))
        self.host = self.records.copy(full_of_images, self.place / "host", self.kind).host
        self.bootc = Bootc(self.host.root, self.cfsctl, self.host.images)
        self.running = self.host.reboot()
        self.edits = 0
        # What bootc itself leaves behind, and then would not accept of others.
        self.untidy = False
        self.crashed = False
        self.foreign = self.host.entries / "0memtest.conf"

    def teardown(self) -> None:
        """Nothing of it stays."""
        shutil.rmtree(getattr(self, "place", Path("/nonexistent")), ignore_errors=True)

    # What is done

    def _image(self, index: int) -> OsImage:
        return list(self.host.images.values())[index]

    def _row(self, index: int) -> str:
        """The id of a deployment that is there, nearly always."""
        visible = self._state().visible
        return self._image(index).id if index >= len(visible) else str(visible[index].id)

    def _run(self, operation: Operation, crash: int | None = None) -> dict[str, Any] | None:
        """Run an operation of ours; None if it refused or crashed."""
        reporter = Silent() if crash is None else At(crash)
        try:
            with open_session(paths_of(self.host), reporter) as session:
                done = operation(session)
        except HostimageError:
            return None
        except Crash:
            self.crashed = True
            return None
        self.crashed = False
        return done

    def _stage(self, index: int, *, locked: bool) -> Operation:
        digest = ManifestDigest(self._image(index).manifest_digest)
        request = stage.StageRequest(digest, REFERENCE, locked=locked)
        return lambda session: stage.stage(session, request)

    @rule(index=indices, locked=st.booleans())
    def stage_image(self, index: int, locked: bool) -> None:
        """What is staged is staged, and nothing else is."""
        done = self._run(self._stage(index, locked=locked))
        assert done is not None
        state = self._state()
        if done["result"] in ("staged", "already-staged"):
            assert str(state.staged_deployment.id) == self._image(index).id  # type: ignore[union-attr]
            self.untidy = False

    @rule()
    def unlock(self) -> None:
        """What was downloaded may be activated."""
        self._run(stage.unlock)

    @rule()
    def unstage(self) -> None:
        """Nothing is staged afterwards."""
        if self._run(stage.unstage) is not None:
            self.untidy = False
        assert self._state().staged_deployment is None

    @rule()
    def roll_back(self) -> None:
        """The loader's default is the rollback deployment."""
        target = self._state().rollback_deployment
        done = self._run(reorder.rollback)
        assert (done is None) == (target is None)
        if done is not None:
            self.untidy = self.untidy and done["result"] != "queued"
            assert self._default() == done["deployment"] != self.running

    @rule()
    def cancel_rollback(self) -> None:
        """The loader's default is what runs."""
        assert self._run(reorder.cancel_rollback) is not None
        assert self._default() == self.running

    @rule(index=indices)
    def make_default(self, index: int) -> None:
        """The loader's default is what was asked for."""
        target = self._row(index)
        done = self._run(lambda session: reorder.make_default(session, DeploymentId(target)))
        if done is not None:
            self.untidy = self.untidy and done["result"] != "default"
            assert self._default() == target

    @rule(index=indices)
    def delete(self, index: int) -> None:
        """It is nowhere afterwards, kernel included; what runs cannot be deleted."""
        target = self._row(index)
        done = self._run(lambda session: reorder.delete(session, DeploymentId(target)))
        if done is not None:
            assert target != self.running
            assert not self.host.state(target).exists()
            assert self._state().find(DeploymentId(target)) is None

    @rule(index=indices, pinned=st.booleans())
    def pin(self, index: int, pinned: bool) -> None:
        """A deployment is pinned, or let go."""
        target = DeploymentId(self._row(index))
        self._run(lambda session: pins.set_pinned(session, target, pinned=pinned))

    @precondition(lambda self: not self.kind.uki)
    @rule(word=st.sampled_from(["quiet", "debug=1", "systemd.volatile=no"]), add=st.booleans())
    def kernel_arguments(self, word: str, add: bool) -> None:
        """An argument is there, or is not."""
        given = ((word,), ()) if add else ((), (word,))
        self._run(lambda session: reorder.set_kernel_arguments(session, *given))

    @rule(
        which=st.sampled_from(["unstage", "rollback", "default", "delete", "recover"]),
        index=indices,
        crash=steps,
    )
    def crash_in_the_middle(self, which: str, index: int, crash: int) -> None:
        """An operation is killed at any of its steps."""
        target = DeploymentId(self._row(index))
        operations: dict[str, Operation] = {
            "unstage": stage.unstage,
            "rollback": reorder.rollback,
            "default": lambda session: reorder.make_default(session, target),
            "delete": lambda session: reorder.delete(session, target),
            "recover": self._recovery,
        }
        self._run(operations[which], crash)

    @rule(index=indices, crash=steps)
    def crash_while_staging(self, index: int, crash: int) -> None:
        """Staging is killed at any of its steps."""
        self._run(self._stage(index, locked=False), crash)

    @precondition(lambda self: self._state().staged_deployment is not None)
    @rule(crash=steps)
    def crash_while_finalising(self, crash: int) -> None:
        """The machine goes down in the middle of the shutdown, or the finaliser does."""
        self._run(finalize.finalize, crash)

    @staticmethod
    def _recovery(session: Session) -> dict[str, Any]:
        recover.settle(session)
        return {}

    @rule()
    def recover(self) -> None:
        """What another tool staged stays staged; nothing of ours is left over."""
        before, crashed = self._state().staged_deployment, self.crashed
        assert self._run(self._recovery) is not None
        after = self._state().staged_deployment
        if before is not None and not crashed:
            assert after is not None
            assert after.id == before.id
        assert not (self.host.sysroot / "state/hostimaged/transaction.json").exists()
        temporary = [
            path for path in self.host.root.rglob("*") if path.name.startswith((".tmp", ".hostimaged"))
        ]
        assert not temporary

    @rule()
    def collect(self) -> None:
        """Nothing of the menu goes, as the invariants say, and a second time there is nothing to do."""
        before = {str(row.id) for row in self._state().visible}
        done = self._run(collect)
        assert done is not None
        assert {str(row.id) for row in self._state().visible} == before
        if done["result"] == "kept":
            assert done["reasons"]
            return
        again = self._run(collect)
        assert again is not None
        assert again["result"] == "nothing"

    @rule(crash=st.integers(0, 400))
    def crash_while_collecting(self, crash: int) -> None:
        """A collection is killed at any of its steps."""
        self._run(collect, crash)

    # bootc in between

    def _by_bootc(self, command: Callable[[], object]) -> bool:
        with suppress(Refused):
            command()
            return True
        return False

    @precondition(lambda self: self._default() == self.running)
    @rule(index=indices, download_only=st.booleans())
    def bootc_upgrade(self, index: int, download_only: bool) -> None:
        """bootc stages an image, and recovery leaves it so.

        Not while the booted deployment is second: in GRUB's menu bootc then would drop it.
        """
        image = self._image(index)
        if not self._by_bootc(lambda: self._bootc_stages(image, download_only)):
            return
        assert self._run(self._recovery) is not None
        staged = self._state().staged_deployment
        assert staged is not None
        assert str(staged.id) == image.id
        self.untidy = False

    def _bootc_stages(self, image: OsImage, download_only: bool) -> None:
        if self.bootc.upgrade(image, download_only=download_only) != "staged":
            raise Refused("it is there")

    @rule()
    def bootc_rollback(self) -> None:
        """What bootc makes the default is shown as such, whatever bootc thinks of it."""
        if self._by_bootc(self.bootc.rollback):
            self.untidy = True

    @rule()
    def bootc_collects(self) -> None:
        """Whatever bootc collects, all that is shown stays whole."""
        self._by_bootc(self.bootc.gc)

    @rule(index=indices)
    def bootc_delete(self, index: int) -> None:
        """bootc deletes a deployment, and may leave a marker."""
        target = self._row(index)
        if self._by_bootc(lambda: self.bootc.delete(target)):
            self.untidy = True

    # What else goes wrong

    @rule()
    def half_a_kernel(self) -> None:
        """A full file system stopped somebody; it keeps bootc from updating, and us from nothing."""
        directory = self.host.bin_dir / ("bootc_composefs-" + "0" * 128)
        directory.mkdir(exist_ok=True)
        (directory / "vmlinuz").write_bytes(b"half")

    @rule()
    def orphaned_state(self) -> None:
        """The state directory of nothing."""
        (self.host.sysroot / "state/deploy" / ("0" * 128) / "etc").mkdir(parents=True, exist_ok=True)

    @rule(index=indices)
    def lost_tag(self, index: int) -> None:
        """A tag is gone; recovery, and bootc's collector, make it again."""
        self.host.tag(self._image(index)).unlink(missing_ok=True)
        if not self._run(self._recovery):
            self.untidy = True

    @precondition(lambda self: not (self.kind.classic and self.kind.uki))
    @rule()
    def foreign_entry(self) -> None:
        """Somebody else's entry comes, or goes: bootc does nothing while it is there, and we keep it."""
        if self._stopped_bootc:
            # It is in the staged set as well, if something was staged meanwhile.
            for place in (self.host.entries, self.host.entries_staged):
                (place / self.foreign.name).unlink(missing_ok=True)
        else:
            self.foreign.write_text("title Memory test\nlinux /memtest/memtest.bin\nsort-key zz\n")

    # Ends of a boot

    @rule()
    def edit_etc(self) -> None:
        """The administrator changes something."""
        self.edits += 1
        (self.host.root / "etc/local.conf").write_text(f"{self.edits}\n")
        (self.host.root / "etc/hostname").write_text(f"edited {self.edits}\n")

    @rule()
    def power_cut(self) -> None:
        """The next boot is the loader's default, and nothing is staged."""
        expected = self._default()
        self.running = self.host.reboot()
        self.untidy = False
        assert self.running == expected
        assert self._state().staged_deployment is None

    @rule(order=orders)
    def shut_down(self, order: str) -> None:
        """Whoever finalises, and however often: what is staged is activated exactly once."""
        state = self._state()
        staged = state.staged_deployment
        activated = staged is not None and not staged.locked and not self.crashed
        activated = activated and not (self._stopped_bootc and order == "bootc")
        menu = None if staged is None or not activated else self._staged_default()
        edits = {name: self._etc(name) for name in ("local.conf", "hostname")} if self.edits else {}
        if order == "both at once":
            other = threading.Thread(target=self._by_bootc, args=(self.bootc.finalize,))
            other.start()
            self._run(finalize.finalize)
            other.join()
        else:
            for who in order.split(", "):
                if who == "ours":
                    self._run(finalize.finalize)
                else:
                    self._by_bootc(self.bootc.finalize)
        self.running = self.host.reboot()
        self.untidy = False
        if menu is not None:
            assert self.running == menu
            if staged is not None and self.running == str(staged.id):
                assert {name: self._etc(name) for name in edits} == edits

    @rule(index=indices, order=orders)
    def update(self, index: int, order: str) -> None:
        """An update from beginning to end."""
        self.stage_image(index=index, locked=False)
        self.edit_etc()
        self.shut_down(order=order)

    def _etc(self, name: str) -> bytes | None:
        path = self.host.root / "etc" / name
        return path.read_bytes() if path.exists() else None

    @property
    def _stopped_bootc(self) -> bool:
        places = (self.host.entries, self.host.entries_staged)
        return any((place / self.foreign.name).exists() for place in places if place.is_dir())

    # What always holds

    def _state(self) -> HostState:
        return state_of(self.host)

    def _default(self) -> str:
        return self.host.startable(self.host.menu()[0]).id

    def _staged_default(self) -> str:
        return self.host.startable(self.host.menu(staged=True)[0]).id

    @invariant()
    def every_line_of_the_menu_starts(self) -> None:
        """What a person may choose boots: also right after a crash."""
        menu = [self.host.startable(line).id for line in self.host.menu() if line.name != self.foreign.name]
        assert self.running in menu

    @invariant()
    def status_tells_the_truth(self) -> None:
        """Order and default are the loader's; nothing is wrong with anything."""
        state = self._state()
        menu = [self.host.startable(line).id for line in self.host.menu() if line.name != self.foreign.name]
        assert [str(row.id) for row in state.visible if row.live is not None and not _first(row)] == [
            identifier for identifier in menu if not _first(state.get(DeploymentId(identifier)))
        ]
        assert str(state.default_deployment.id) == menu[0]  # type: ignore[union-attr]
        assert str(state.booted_deployment.id) == self.running  # type: ignore[union-attr]
        assert problems_of(state) <= {ProblemId.MARKER_DAMAGED}
        for row in state.visible:
            # Pinned and beyond the two entries that bootc bears.
            bare = row.pinned and row.entry is None
            assert problems_of(row) == ({ProblemId.ENTRY_MISSING} if bare else set())
            assert row.image is not None
            assert row.image.proven

    @invariant()
    def bootc_accepts_the_host(self) -> None:
        """Save what it left behind itself; after a crash it must at least read it."""
        wrong = self.bootc.accepts()
        if self.crashed and not self._stopped_bootc:
            assert not any(what.startswith("status:") for what in wrong), wrong
        elif not self.untidy and not self._stopped_bootc:
            assert wrong == []


def _first(row: Any) -> bool:
    """Whether a row stands before the menu, being staged and not locked, or behind it."""
    return bool(row.role == "staged")


@pytest.mark.timeout(1200)
def test_random_lives(records: Records, cfsctl: str, kind: Kind) -> None:
    namespace = {"records": records, "cfsctl": cfsctl, "kind": kind, "TestCase": None}
    machine = type("Machine", (HostMachine,), namespace)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40 if SOAK else 20,
            deadline=None,
            derandomize=not SOAK,
            database=None,
            print_blob=True,
            # Shrinking a life takes many minutes; the steps that led to a failure are printed in any case.
            phases=(Phase.generate, Phase.shrink) if SOAK else (Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
