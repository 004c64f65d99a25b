"""What the Manager tells: its properties and the status document, from settings, jobs, scans, checks, holds.

Nothing here works or waits; every value is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import API_VERSION, NO_OBJECT, JobState, Phase
from hostimage_dbus.transport import Encoded
from hostimaged import __version__
from hostimaged.bus.authorization import Member
from hostimaged.bus.findings import Problem
from hostimaged.bus.requests import tracked_reference
from hostimaged.bus.status import to_variants
from hostimaged.errors import HostimageError, InvalidReference, PreconditionFailed
from hostimaged.host.updatepolicy import UpdatePolicy
from hostimaged.jobs.kinds import KINDS
from hostimaged.oci.reference import ImageReference
from hostimaged.oci.storage.naming import name_in_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hostimaged.bus.bootfailure import BootFailure
    from hostimaged.bus.deployments import DeploymentObjects
    from hostimaged.bus.findings import Findings, ImageRow
    from hostimaged.bus.holds import Holds
    from hostimaged.bus.policy import Policy
    from hostimaged.bus.requests import Request
    from hostimaged.bus.status import StatusCache
    from hostimaged.bus.updates import Updates
    from hostimaged.bus.verified import Verified
    from hostimaged.config import Settings, SettingsProblem
    from hostimaged.jobs.history import History, JobRecord
    from hostimaged.jobs.queue import JobQueue


#: Calls that change what boots next, and may be made in the background.
_STAGING: Final = (Member.UPGRADE, Member.SWITCH)
_NO_FINALIZER: Final = Problem(
    id="finalizer",
    severity="error",
    text="hostimaged-finalize.service does not run: the shutdown activates nothing that is staged; "
    "systemctl enable --now hostimaged-finalize.service",
)
#: Jobs that decide what the next boot starts.
_FOR_THE_NEXT_BOOT: Final = ("upgrade", "switch", "stage", "rollback")


class Model:
    """The state of the service; implements ``hostimaged.bus.requests.World``."""

    def __init__(
        self,
        *,
        queue: JobQueue,
        status: StatusCache,
        history: History,
        holds: Holds,
        updates: Updates,
        policy: Policy,
        boot_failure: BootFailure | None,
        verified: Verified,
        deployments: DeploymentObjects,
        boot_id: str,
        settings: Settings,
        settings_problems: Sequence[SettingsProblem],
    ) -> None:
        self._queue = queue
        self._status = status
        self._history = history
        self._holds = holds
        self._updates = updates
        self._policy = policy
        self._boot_failure = boot_failure
        self._verified = verified
        self._deployments = deployments
        self._boot_id = boot_id
        self._answer: Encoded | None = None
        self._unwatched = ""
        self._finalizer_missing = False
        self._timer_due = 0
        self.take_settings(settings, settings_problems)

    def take_settings(self, settings: Settings, problems: Sequence[SettingsProblem]) -> None:
        """The settings were read."""
        self.settings = settings
        self._own_problems = list(_problems(settings, problems, self._history))
        self.changed()

    def set_unwatched(self, why: str) -> None:
        """Changes by other programs are noticed late, and why; "": they are noticed at once."""
        self._unwatched = why

    def set_finalizer_missing(self, missing: bool) -> None:
        """Whether the unit does not run that activates at the shutdown what is staged."""
        self._finalizer_missing = missing

    def set_timer(self, due: int) -> None:
        """When the timer of updates is due, microseconds since the epoch; 0: never."""
        self._timer_due = due

    def changed(self) -> None:
        """Something in the status document changed."""
        self._answer = None

    # hostimaged.bus.requests.World

    @property
    def tracked_image(self) -> str:
        """The image that updates follow: what is staged, else what runs came from it; else the settings'."""
        rows = self._status.findings.deployments
        staged = next((row.image for row in rows if row.staged), "")
        return staged or next((row.image for row in rows if row.booted), "") or self.settings.tracked_image

    @property
    def images(self) -> Sequence[ImageRow]:
        """The images in the repository."""
        return self._status.findings.images

    @property
    def deployed(self) -> dict[str, str]:
        """Names of the images of deployments, by manifest digest."""
        return {row.image_digest: row.image for row in self._status.findings.deployments if row.image_digest}

    def deployment_at(self, path: str) -> str:
        """Id of the deployment at an object path, "" if there is none."""
        return self._deployments.id_at(path)

    @property
    def reboot_required(self) -> bool:
        """Whether a reboot would start something else than what runs."""
        findings = self._status.findings
        staged = any(row.staged and not row.locked for row in findings.deployments)
        return staged or findings.rollback_queued

    @property
    def unified(self) -> bool:
        """Whether images go through the store of the host: what is followed, runs or is staged is there."""
        rows = [row.image for row in self._status.findings.deployments if row.booted or row.staged]
        return self.settings.unified or any(map(self._is_stored, [self.tracked_image, *rows]))

    def unifies(self, request: Request) -> bool:
        """Whether what is asked for goes through the store: as the caller says, else as the host has it."""
        return bool(request.options.get("unified", self.unified or self._is_stored(request.reference)))

    def _is_stored(self, image: str) -> bool:
        try:
            return (
                bool(image)
                and name_in_store(ImageReference.parse(image)) in self._status.findings.stored_names
            )
        except HostimageError:
            return False

    def check_unified(self, request: Request) -> None:
        """Raise ``PreconditionFailed`` if unified storage is to end, and the settings say otherwise."""
        if request.member is Member.SET_UNIFIED and self.settings.unified and not request.arguments[0]:
            raise PreconditionFailed("the settings of this host say unified = true")

    def check_soft_reboot(self, request: Request) -> None:
        """Raise ``PreconditionFailed`` if the deployment that is meant is known not to be reached by one.

        Nothing is done then. Of one that is yet to be made nothing is known.
        """
        if request.member is Member.SET_KERNEL_ARGUMENTS:
            raise PreconditionFailed("a soft reboot leaves the kernel its arguments")
        for row in self._status.findings.deployments:
            meant = row.id == request.deployment or (request.member is Member.ROLLBACK and row.is_rollback)
            if meant and not (row.soft_reboot_capable or row.booted):
                reason = f"deployment {row.id} cannot be reached by a soft reboot: {row.soft_reboot_obstacle}"
                raise PreconditionFailed(reason)

    def check_background(self, request: Request) -> None:
        """Raise ``PreconditionFailed`` if what nobody waits for would take the place of a queued rollback."""
        options = request.options
        if not options.get("background", False) or options.get("download-only", False):
            return
        if request.member in _STAGING and self._status.findings.rollback_ordered:
            raise PreconditionFailed(
                "a rollback is queued: an update in the background does not take its place"
            )

    # what is told

    @property
    def tracked(self) -> str:
        """The tracked image in its normal form, "" if none."""
        return tracked_reference(self.tracked_image)

    def constant(self) -> dict[str, Any]:
        """Properties that never change."""
        return {"Version": __version__, "ApiVersion": API_VERSION, "BootId": self._boot_id}

    def changing(self) -> dict[str, Any]:
        """All other properties as they are now."""
        active = self._queue.active
        findings = self._status.findings
        return {
            "State": self._state(),
            "ActiveJob": active.path if active else NO_OBJECT,
            "QueuedJobs": [job.path for job in self._queue.waiting],
            "Booted": self._deployments.which("booted"),
            "Staged": self._deployments.which("staged"),
            "RollbackTarget": self._deployments.which("is_rollback"),
            "RebootRequired": self.reboot_required,
            "RollbackQueued": findings.rollback_queued,
            "TrackedImage": self.tracked_image,
            "Update": to_variants(self._update()),
            "LastCheck": list(self._updates.last_check(self.tracked)),
            "LastFailure": self._last_failure(),
            "UpdatePolicy": self._update_policy,
            # With that policy the timer asks nobody.
            "NextCheck": 0 if self._update_policy == UpdatePolicy.NONE else self._timer_due,
            "Holds": self._holds.reasons,
            "Problems": [[problem.id, problem.severity, problem.text] for problem in self._problems()],
            "Unified": self.unified,
            "RepositorySize": _sizes(findings),
        }

    def answer(self) -> Encoded:
        """The native status document, as GetStatus returns it."""
        if self._answer is None:
            document = self._status.document(
                daemon={"version": __version__, "bootId": self._boot_id, "state": self._state()},
                tracked_image=self.tracked_image,
                jobs=self._queue.jobs,
                results=self._history.results,
                problems=self._problems(),
                update=self._update(),
                holds=self._holds.documents,
                unified=self.unified,
            )
            self._answer = Encoded.of("s", [document])
        return self._answer

    @property
    def _update_policy(self) -> str:
        return str(self._policy.chosen or self.settings.update_policy)

    def _state(self) -> str:
        active = self._queue.active
        if active is not None:
            # An update pulls, then stages.
            return "staging" if active.phase is Phase.STAGING else KINDS[active.kind].state
        held = any(job.state is JobState.HELD for job in self._queue.waiting)
        return "held" if held else "idle"

    def _update(self) -> dict[str, Any]:
        return self._updates.current(self.tracked, self._status.findings)

    def _problems(self) -> list[Problem]:
        own = [*self._own_problems]
        if self._unwatched:
            own.append(_unwatched(self._unwatched))
        if self._finalizer_missing and any(row.booted for row in self._status.findings.deployments):
            own.append(_NO_FINALIZER)
        if self._policy.problem:
            own.append(Problem(id="policy", severity="warning", text=self._policy.problem))
        own += self._verified.problems
        if self._boot_failure is not None:
            own.append(Problem(id="boot", severity="error", text=self._boot_failure.message))
        return [*own, *self._status.findings.problems]

    def _last_failure(self) -> dict[str, Any]:
        results = self._history.results
        last = _last_failure(results)
        if last is None:
            boot = self._boot_failure
            # What is done for the next boot is the answer to how this one went.
            answered = any(job.state is JobState.DONE and job.kind in _FOR_THE_NEXT_BOOT for job in results)
            return {} if boot is None or answered else to_variants(boot.failure)
        return to_variants(
            {
                "job": last.id,
                "kind": last.kind,
                "target": last.target,
                "error": last.error,
                "message": last.message,
                "time": last.finished,
            }
        )


def _unwatched(why: str) -> Problem:
    text = f"what other programs change is noticed late: {why}"
    return Problem(id="watch", severity="warning", text=text)


def _sizes(findings: Findings) -> list[int]:
    """Bytes that are used, and that could be reclaimed; 0 where unknown."""
    row = findings.repository
    return [0, 0] if row is None else [row.used or 0, row.reclaimable or 0]


def _problems(settings: Settings, found: Sequence[SettingsProblem], history: History) -> list[Problem]:
    problems = [Problem(id="settings", severity="warning", text=f"{p.file}: {p.text}") for p in found]
    if settings.tracked_image:
        try:
            ImageReference.parse(settings.tracked_image)
        except InvalidReference as error:
            text = f"tracked-image: {error.message}"
            problems.append(Problem(id="settings", severity="error", text=text))
    if history.problem:
        problems.append(Problem(id="jobs", severity="warning", text=history.problem))
    return problems


def _last_failure(results: Sequence[JobRecord]) -> JobRecord | None:
    """The last failure that no success of its kind followed, among the results that are remembered."""
    last: JobRecord | None = None
    for record in results:
        if record.state is JobState.FAILED:
            last = record
        elif record.state is JobState.DONE and last is not None and last.kind == record.kind:
            last = None
    return last
