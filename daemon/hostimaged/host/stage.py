"""Staging: making the deployment of a pulled image and having the next orderly shutdown activate it.

Order of work (operations.md 3.4, with what is ours): boot image and tag under the shared lock; then under the
exclusive one the decision, the checks, the journal, the kernel, the state directory, the staged menu, and the
marker as the last, which is the commit point. Until then nothing of the running host has changed, and what
was made is taken back by ``recover``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hostimaged.boot import kargs
from hostimaged.boot.cmdline import Cmdline
from hostimaged.boot.files import TreeFiles
from hostimaged.errors import (
    BootLoaderError,
    HostimageError,
    ImageNotFound,
    NothingStaged,
    PreconditionFailed,
)
from hostimaged.host import (
    bootcheck,
    bootimage,
    boundimages,
    boundstore,
    cleanup,
    etcmerge,
    failedboots,
    journal,
    statedirs,
)
from hostimaged.host.bootfs import directory, told
from hostimaged.host.etctree import read_image, subdirectory
from hostimaged.host.followed import followed
from hostimaged.host.journal import Operation, Transaction
from hostimaged.host.marker import Marker
from hostimaged.host.menu import Menu, live_menu
from hostimaged.host.model import Role
from hostimaged.host.newdeployment import NewDeployment
from hostimaged.host.origin import Origin
from hostimaged.host.prefix import migrate
from hostimaged.host.recover import recover, settle
from hostimaged.host.setuproot import SetupRoot
from hostimaged.host.tags import tag_deployment
from hostimaged.oci.times import microseconds
from hostimaged.progress import Phase

if TYPE_CHECKING:
    from hostimaged.composefs.tree import Directory
    from hostimaged.host.bootimage import BootImage
    from hostimaged.host.bootsets import RawSet
    from hostimaged.host.boundimages import BoundImage
    from hostimaged.host.imgref import OriginReference
    from hostimaged.host.model import Deployment, HostState
    from hostimaged.host.session import Session
    from hostimaged.ids import BootDigest, DeploymentId, ManifestDigest
    from hostimaged.oci.images import StoredImage

#: Named points of ``Reporter.at``, in the order of work; between two of them lies one effect.
FAULT_POINTS: Final = (
    "stage.image",
    "stage.tagged",
    "stage.planned",
    "stage.journal",
    "unstage.marker",
    "discard.state",
    "unstage.entries",
    "discard.artifact",
    "stage.kernel",
    "stage.etc",
    "stage.state",
    "stage.entries",
    "stage.marker",
    "stage.done",
)

#: bootc's rollback takes two entries for granted (deployments.md 13).
BOOTC_ENTRIES: Final = 2

#: In place of a ``Result``: nothing is staged yet, bound images are to be fetched first.
BOUND_MISSING: Final = "bound-missing"


class Result(StrEnum):
    """What came of a request; never silently nothing."""

    STAGED = "staged"
    #: It was staged before; only the lock or the reference may have changed.
    ALREADY_STAGED = "already-staged"
    #: It is what runs.
    ALREADY_CURRENT = "already-current"
    #: It is what a rollback would boot; rolling back is what gets there.
    SAME_AS_ROLLBACK = "same-as-rollback"
    #: It is another deployment that is there; making it the default is what gets there.
    SAME_AS_OTHER = "same-as-other"


@dataclass(frozen=True, slots=True)
class StageRequest:
    """What to stage: a manifest in the repository, under the reference that later updates follow.

    ``locked``: download only, the shutdown does not activate it. ``allow_downgrade``: an image older than
    what runs is wanted. ``retry_failed``: one that did not start is. ``max_entries``: entries of a menu, of
    which pinned deployments get those beyond two.
    ``bound_fetched``: the images that it is bound to were fetched; one that is missing now is an error.
    """

    manifest_digest: ManifestDigest
    reference: OriginReference
    locked: bool = False
    allow_downgrade: bool = False
    retry_failed: bool = False
    max_entries: int = BOOTC_ENTRIES
    bound_fetched: bool = False
    systemd_version: int | None = None


def stage(session: Session, request: StageRequest) -> dict[str, Any]:
    """Stage an image. The result has ``result`` (see ``Result``), ``deployment`` and what is known of it.

    With ``BOUND_MISSING`` nothing has changed: ``boundstore.fetch`` the images that the deployment is bound
    to, and stage again. Raises ``ImageNotFound``, ``UnsupportedImage``, ``PreconditionFailed`` (a downgrade,
    an image that did not start, conflicts in ``/etc``), ``NoSpace``, ``BootLoaderError``, ``LockTimeout`` and
    what writing raises. Then nothing is staged that was not, and what was made is taken back; what was staged
    before may be gone.
    """
    session.reporter.phase(Phase.STAGING)
    boot = bootimage.generate(session.repository, request.manifest_digest, session.reporter)
    session.reporter.at("stage.image")
    tag_deployment(session.paths, session.repository, request.manifest_digest)
    session.repository.sync()
    session.reporter.at("stage.tagged")
    return _Stage(session, request, boot, settle(session)).run()


def unlock(session: Session) -> dict[str, Any]:
    """Let the next shutdown activate what was downloaded; ``result`` is ``staged`` or ``already-staged``.

    Raises ``NothingStaged``.
    """
    row = settle(session).staged_deployment
    if row is None:
        raise NothingStaged("no deployment is staged")
    if row.locked:
        bootcheck.hold_back(session, row.id, held=False)
        session.write_marker(Marker(row.id, finalization_locked=False))
        session.steady().reporter.at("stage.marker")
    return {"result": str(Result.STAGED if row.locked else Result.ALREADY_STAGED), "deployment": str(row.id)}


def unstage(session: Session) -> dict[str, Any]:
    """Take back what is staged; ``result`` is ``unstaged``. Raises ``NothingStaged``."""
    state = settle(session)
    if state.marker is None:
        raise NothingStaged("no deployment is staged")
    staged = state.marker.depl_id
    cleanup.unstage(session, state)
    return {"result": "unstaged", "deployment": str(staged)}


class _Stage:
    """One staging under the exclusive lock."""

    def __init__(
        self,
        session: Session,
        request: StageRequest,
        boot: BootImage,
        state: HostState,
    ) -> None:
        self._session = session
        self._request = request
        self._image = boot.image
        self._boot = boot
        self._state = state
        self._at = session.reporter.at
        self.id: DeploymentId = boot.id
        self._reference = followed(state, request.reference)

    def run(self) -> dict[str, Any]:
        """Decide, check, write."""
        known = self._known()
        if known is not None:
            return known
        if not self._request.retry_failed:
            known_failed = failedboots.read(self._session.paths)
            failedboots.refuse(known_failed, self._request.manifest_digest, self.id)
        if migrate(self._session, self._state):
            self._state = self._session.state()
        base = self._base()
        self._check_boot_type(base)
        self._check_downgrade(base)
        new = NewDeployment(
            self._session, self._state, self._boot, systemd_version=self._request.systemd_version
        )
        base_tree = read_image(self._session.repository, base.id)
        etc = self._check_etc(new, base_tree)
        files = self._staged_files(new, base, base_tree)
        # What the shutdown would refuse is refused now, while somebody is there to hear of it.
        self._session.store(self._state).require_replaceable()
        new.require_space(freed=cleanup.staged_only_bytes(self._session, self._state))
        bound = boundimages.read(new.tree, self._session.repository)
        if self._lacks(bound):
            return self._result(BOUND_MISSING)
        self._at("stage.planned")
        path = self._session.paths.transaction
        try:
            journal.write(path, self._transaction(files))
            self._at("stage.journal")
            self._write(new, files)
        except (HostimageError, OSError):
            # Told to stop, or failed: taken back now, not when the next job comes.
            with contextlib.suppress(HostimageError, OSError):
                recover(self._session.steady(), self._session.state())
            raise
        journal.remove(path)
        self._session.steady().reporter.at("stage.done")
        self._verify(files)
        named = {"bound-images": [image.image for image in bound]} if bound else {}
        return self._result(Result.STAGED, etc | named)

    def _write(self, new: NewDeployment, files: RawSet) -> None:
        session = self._session
        if self._state.marker is not None or self._state.sets.staged is not None:
            cleanup.unstage(session, self._state)
        new.write_kernel()
        self._at("stage.kernel")
        new.write_state(self._origin(new.boot_digest))
        self._at("stage.state")
        session.store(self._state).write_staged(files)
        self._at("stage.entries")
        bootcheck.hold_back(session, self.id, held=self._request.locked)
        session.write_marker(Marker(self.id, finalization_locked=self._request.locked))
        session.steady().reporter.at("stage.marker")
        session.expect_garbage()

    def _known(self) -> dict[str, Any] | None:
        """The result if this deployment is there already."""
        state = self._state
        row = state.find(self.id)
        if row is None or row.role is Role.HIDDEN:
            return None
        if row.role is Role.BOOTED:
            self._follow(row)
            return self._result(Result.ALREADY_CURRENT)
        if row.role is Role.STAGED:
            if self._lacks(boundimages.of_deployment(self._session.repository, self.id)):
                return self._result(BOUND_MISSING)
            self._change_staged(row)
            return self._result(Result.ALREADY_STAGED)
        if row.live is None:
            # Pinned, without an entry: it is staged like a new one, with the state directory it has.
            raise PreconditionFailed(
                f"the image is that of the pinned deployment {row.id}; make that the default"
            )
        is_rollback = row.role is Role.ROLLBACK
        return self._result(Result.SAME_AS_ROLLBACK if is_rollback else Result.SAME_AS_OTHER)

    def _lacks(self, bound: tuple[BoundImage, ...]) -> bool:
        """Whether images have to be fetched first. Raises ``ImageNotFound`` if that was done, in vain."""
        missing = boundstore.missing(self._session.paths, bound)
        if missing and self._request.bound_fetched:
            raise ImageNotFound(
                f"the image is bound to {missing[0].image}, which was fetched, and is gone again"
            )
        return bool(missing)

    def _follow(self, row: Deployment) -> None:
        """Have updates follow the new reference from a deployment that is there."""
        if row.origin is not None and row.origin.reference != self._reference:
            changed = row.origin.with_reference(self._reference)
            statedirs.rewrite_origin(self._session.paths, row.id, changed)

    def _change_staged(self, row: Deployment) -> None:
        """Follow the new reference, and unlock what is staged if it is not only to be downloaded."""
        self._follow(row)
        if row.locked and not self._request.locked:
            bootcheck.hold_back(self._session, row.id, held=False)
            self._session.write_marker(Marker(row.id, finalization_locked=False))

    def _base(self) -> Deployment:
        """The deployment whose kernel arguments and ``/etc`` the new one starts from."""
        base = self._state.booted_deployment
        if base is None and self._state.booted is None:
            base = self._state.default_deployment
        if base is None or base.live is None:
            raise PreconditionFailed("the deployment that runs has no boot entry: nothing can be staged")
        return base

    def _check_boot_type(self, base: Deployment) -> None:
        """bootc refuses a host with both types, and so would its status."""
        kind = self._boot.resources.boot_type
        if base.boot_type is not None and base.boot_type is not kind:
            raise PreconditionFailed(
                f"the image boots by {kind}, this host by {base.boot_type}: that cannot be changed"
            )

    def _check_downgrade(self, base: Deployment) -> None:
        """Refuse an image older than the running one of the same name, unless that is wanted."""
        if self._request.allow_downgrade or base.image is None or base.origin is None:
            return
        followed = base.origin.reference
        if followed is None or not followed.names_same(self._reference):
            return
        old, new = base.image.timestamp, _created(self._image)
        if old and new and new < old:
            raise PreconditionFailed(
                f"the image is older than the one that runs ({self._image.version or 'no version'})"
            )

    def _check_etc(self, new: NewDeployment, base_tree: Directory) -> dict[str, Any]:
        """Try the merge of ``/etc`` as the shutdown will do it; raises ``EtcConflict``."""
        base_setup = SetupRoot.load(TreeFiles(base_tree, self._session.repository))
        with told("cannot read /etc"), directory(self._session.paths.etc) as current:
            plan = etcmerge.dry_run(
                subdirectory(base_tree, b"etc"),
                current,
                subdirectory(new.tree, b"etc"),
                booted_mode=base_setup.etc,
                mode=new.setup.etc,
                reporter=self._session.reporter,
            )
        plan.check()
        return {f"etc-{name}": count for name, count in plan.summary.items()}

    def _staged_files(self, new: NewDeployment, base: Deployment, base_tree: Directory) -> RawSet:
        """The menu that the shutdown activates: the new one, what runs now, pinned ones beyond."""
        live = live_menu(self._state)
        running = live.item(base.id)
        if running is None:
            raise BootLoaderError("the deployment that runs has no boot entry")
        is_menu = self._state.sets.is_menu
        items = [new.menu_item(self._options(new, base, base_tree), is_menu=is_menu), running]
        room = max(self._request.max_entries, BOOTC_ENTRIES) - len(items)
        pinned = [row.id for row in self._state.deployments if row.pinned]
        items += [item for item in live.items if item.id in pinned and item.id != base.id][:room]
        menu = Menu(tuple(items)).with_others_of(live)
        return menu.render(self._state.dirs.loader, is_menu=is_menu)

    def _options(self, new: NewDeployment, base: Deployment, base_tree: Directory) -> Cmdline:
        """The arguments of what runs, with the difference of the two images' own; local edits stay."""
        running = Cmdline.parse("" if base.live is None else base.live.options)
        booted, argument = self._state.booted, running.composefs()
        optional = booted.optional if booted is not None else argument is not None and argument.optional
        architecture = self._boot.architecture
        old = kargs.read_kargs(TreeFiles(base_tree, self._session.repository), architecture)
        wanted = kargs.apply(running, old, kargs.read_kargs(new.files, architecture))
        return wanted.with_composefs(new.id, optional=optional)

    def _transaction(self, files: RawSet) -> Transaction:
        return Transaction(
            Operation.STAGE,
            self._session.boot_id,
            self._session.now(),
            before="",
            after=files.digest,
            target=self.id,
            state_dir=True,
        )

    def _origin(self, digest: BootDigest) -> Origin:
        kind = self._boot.resources.boot_type
        return Origin.new(self._reference, kind, digest, self._request.manifest_digest)

    def _verify(self, files: RawSet) -> None:
        """Read back what was promised for the next boot."""
        state = self._session.state()
        staged = state.staged_deployment
        written = None if state.sets.staged is None else state.sets.staged.raw
        if staged is None or staged.id != self.id or written != files:
            raise BootLoaderError(f"deployment {self.id} was written, but is not found as the staged one")

    def _result(self, result: str, etc: dict[str, Any] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "result": str(result),
            "deployment": str(self.id),
            "manifest-digest": str(self._request.manifest_digest),
            "version": self._image.version,
            "image": self._reference.image_text,
            "download-only": self._request.locked,
        }
        return found if etc is None else found | etc


def _created(image: StoredImage) -> int:
    """When an image was made, in microseconds since the epoch; 0 if it does not say."""
    return 0 if image.config is None or not image.config.created else microseconds(image.config.created)
