"""Bringing a repository of old to the present form: a step of its own, written down, that ends after a crash.

bootc up to 1.15 made repositories without ``meta.json``, whose images lack what collectors and pulls take for
granted now. Everything that is there is kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from hostimaged.composefs.repository import Repository
from hostimaged.host import journal
from hostimaged.host.journal import Operation, Transaction
from hostimaged.oci.upgrade import upgrade_images

if TYPE_CHECKING:
    from hostimaged.progress import Reporter
    from hostimaged.system.paths import HostPaths

#: Named points of ``Reporter.at``, in the order of work.
FAULT_POINTS: Final = ("upgrade.journal", "upgrade.metadata", "upgrade.images", "upgrade.done")


def upgrade(paths: HostPaths, reporter: Reporter, *, lock_timeout: float) -> dict[str, Any]:
    """Give a repository its ``meta.json``, and complete its images, which are counted; also after a crash.

    The caller holds the job lock. Raises as ``Repository.upgrade`` and ``upgrade_images`` do; then what was
    there is as it was, or complete.
    """
    if journal.read(paths.transaction) is None:
        journal.write(
            paths.transaction,
            Transaction(Operation.UPGRADE, "", max(int(time.time()), 0), before="", after=""),
        )
    reporter.at("upgrade.journal")
    repository, _ = Repository.upgrade(
        paths.repository, lock_timeout=lock_timeout, check=lambda: reporter.at("host.locking")
    )
    with repository:
        reporter.at("upgrade.metadata")
        upgraded = upgrade_images(repository, reporter)
        repository.sync()
    reporter.at("upgrade.images")
    journal.remove(paths.transaction)
    reporter.at("upgrade.done")
    for digest, text in sorted(upgraded.problems.items()):
        reporter.message(f"{digest}: {text}")
    return {"images-upgraded": upgraded.upgraded, "images-damaged": len(upgraded.problems)}
