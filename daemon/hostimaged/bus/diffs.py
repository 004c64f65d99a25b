"""Results of comparisons of deployments, kept while nothing that they tell of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimage_dbus.names import JobState
from hostimaged.jobs.operations import Diff
from hostimaged.jobs.process import Outcome

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from hostimaged.bus.findings import DeploymentRow
    from hostimaged.jobs.job import Job
    from hostimaged.jobs.operations import Operation

#: Each has up to 1 MiB (``hostimaged.host.diff``); hosts have two or three deployments.
_KEPT: Final = 8


class DiffCache:
    """The last results, by the two deployments and all that may change about them.

    An id stands for files, packages and labels; kernel arguments are the host's.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, dict[str, Any]] = {}

    def find(self, operation: Operation, rows: Sequence[DeploymentRow]) -> Outcome | None:
        """What came of the same comparison before; None for other operations, and if it is not known."""
        result = self._results.get(_key(operation, rows))
        return None if result is None else Outcome(result=result)

    def take(self, job: Job, rows: Sequence[DeploymentRow]) -> None:
        """A job ended. What could not be compared is looked at again the next time."""
        key = _key(job.operation, rows)
        if key is None or job.state is not JobState.DONE or job.result.get("problems"):
            return
        self._results.pop(key, None)
        self._results[key] = job.result
        while len(self._results) > _KEPT:
            del self._results[next(iter(self._results))]


def _key(operation: Operation, rows: Sequence[DeploymentRow]) -> Hashable | None:
    if not isinstance(operation, Diff):
        return None
    known = {row.id: (row.id, row.image_digest, row.kernel_arguments, row.version) for row in rows}
    pair = (known.get(operation.deployment), known.get(operation.other))
    return None if None in pair else pair
