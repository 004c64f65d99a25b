"""Names on the bus and the vocabulary of the API."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

BUS_NAME: Final = "org.hostimage1"
ROOT_PATH: Final = "/org/hostimage1"
JOBS_PATH: Final = ROOT_PATH + "/jobs"
DEPLOYMENTS_PATH: Final = ROOT_PATH + "/deployments"
LOG_CONTROL_PATH: Final = "/org/freedesktop/LogControl1"
MANAGER_INTERFACE: Final = "org.hostimage1.Manager"
DEPLOYMENT_INTERFACE: Final = "org.hostimage1.Deployment"
JOB_INTERFACE: Final = "org.hostimage1.Job"
LOG_CONTROL_INTERFACE: Final = "org.freedesktop.LogControl1"
PROPERTIES_INTERFACE: Final = "org.freedesktop.DBus.Properties"
#: The path that stands for "none" where the type is an object path.
NO_OBJECT: Final = "/"
API_VERSION: Final = 1


class JobState(StrEnum):
    """States of a job, in the order a job passes through them."""

    QUEUED = "queued"
    HELD = "held"
    RUNNING = "running"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing happens to a job in this state any more."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class Phase(StrEnum):
    """What a running job is doing (property ``Phase`` of a job)."""

    RESOLVING = "resolving"
    PULLING = "pulling"
    IMPORTING = "importing"
    VERIFYING = "verifying"
    STAGING = "staging"
    FINALIZING = "finalizing"
    DELETING = "deleting"


def job_path(job_id: int) -> str:
    """Object path of job ``job_id``."""
    return f"{JOBS_PATH}/_{job_id}"


def deployment_path(deployment_id: str) -> str:
    """Object path of the deployment with this id (hex digits)."""
    return f"{DEPLOYMENTS_PATH}/_{deployment_id[:32]}"
