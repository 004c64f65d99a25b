"""The update policy as the service tells and changes it: the file is written by a worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hostimaged.errors import HostimageError
from hostimaged.host import updatepolicy
from hostimaged.host.updatepolicy import UpdatePolicy
from hostimaged.jobs.operations import SetPolicy
from hostimaged.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostimaged.jobs.job import Failure
    from hostimaged.jobs.operations import Operation
    from hostimaged.jobs.process import Worker
    from hostimaged.system.paths import HostPaths

_logger = get_logger("hostimaged.bus")


class Policy:
    """How far updates go without being asked, as it was chosen; ``problem`` says why that is not known."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._changing = asyncio.Lock()
        self.chosen: UpdatePolicy | None = None
        self.problem = ""

    def load(self) -> None:
        """Read what was chosen before; blocks. A damaged file counts as missing, and is a problem."""
        try:
            self.chosen = updatepolicy.read(self._paths)
        except HostimageError as error:
            _logger.warning("policy.unreadable", error=error.message)
            self.problem = f"the update policy is not known: {error.message}"

    async def choose(self, policy: str, start_worker: Callable[[Operation], Worker]) -> Failure | None:
        """Have it written, and take it then; gives what went wrong."""
        async with self._changing:
            outcome = await start_worker(SetPolicy(policy=UpdatePolicy(policy))).run(lambda _event: None)
            if outcome.failure is None:
                self.chosen, self.problem = UpdatePolicy(policy), ""
                _logger.info("policy.set", policy=policy)
        return outcome.failure
