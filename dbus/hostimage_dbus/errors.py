"""Error names of the API and the exit code of ``hostimagectl`` for each.

This table is the one source of error names: the daemon's error classes, the XML, the manual pages and the
client's exit codes are tested against it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

_OWN: Final = "org.hostimage1.Error."
_STANDARD: Final = "org.freedesktop.DBus.Error."


class ErrorName(StrEnum):
    """D-Bus error names that the daemon sends."""

    BUSY = _OWN + "Busy"
    NO_UPDATE = _OWN + "NoUpdate"
    NO_SUCH_DEPLOYMENT = _OWN + "NoSuchDeployment"
    NOTHING_STAGED = _OWN + "NothingStaged"
    NO_ROLLBACK = _OWN + "NoRollback"
    ALREADY_BOOTED = _OWN + "AlreadyBooted"
    PRECONDITION_FAILED = _OWN + "PreconditionFailed"
    INVALID_REFERENCE = _OWN + "InvalidReference"
    HELD = _OWN + "Held"
    CANCELLED = _OWN + "Cancelled"
    NETWORK = _OWN + "Network"
    REGISTRY_AUTH = _OWN + "RegistryAuth"
    IMAGE_NOT_FOUND = _OWN + "ImageNotFound"
    SIGNATURE_REJECTED = _OWN + "SignatureRejected"
    DIGEST_MISMATCH = _OWN + "DigestMismatch"
    VERITY_MISMATCH = _OWN + "VerityMismatch"
    CORRUPT_REPOSITORY = _OWN + "CorruptRepository"
    NO_SPACE = _OWN + "NoSpace"
    READ_ONLY = _OWN + "ReadOnly"
    BOOT_LOADER = _OWN + "BootLoader"
    UNSUPPORTED_IMAGE = _OWN + "UnsupportedImage"
    JOB_NOT_CANCELLABLE = _OWN + "JobNotCancellable"
    LOCK_TIMEOUT = _OWN + "LockTimeout"
    INTERNAL = _OWN + "Internal"
    ACCESS_DENIED = _STANDARD + "AccessDenied"
    AUTHORIZATION_REQUIRED = _STANDARD + "InteractiveAuthorizationRequired"
    INVALID_ARGS = _STANDARD + "InvalidArgs"
    UNKNOWN_OBJECT = _STANDARD + "UnknownObject"
    LIMITS_EXCEEDED = _STANDARD + "LimitsExceeded"
    TIMEOUT = _STANDARD + "Timeout"
    NOT_SUPPORTED = _STANDARD + "NotSupported"


EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_SERVICE: Final = 3

#: Exit code of ``hostimagectl`` when a call or a job ends with this error; any other error exits with
#: ``EXIT_FAILURE``, wrong usage with ``EXIT_USAGE``, a daemon or bus that cannot be reached with
#: ``EXIT_NO_SERVICE``. Codes are part of the interface and never reused.
EXIT_CODES: Final[dict[ErrorName, int]] = {
    ErrorName.INTERNAL: EXIT_FAILURE,
    ErrorName.INVALID_ARGS: EXIT_USAGE,
    ErrorName.ACCESS_DENIED: 4,
    ErrorName.AUTHORIZATION_REQUIRED: 5,
    ErrorName.UNKNOWN_OBJECT: 6,
    ErrorName.LIMITS_EXCEEDED: 7,
    ErrorName.TIMEOUT: 8,
    ErrorName.NOT_SUPPORTED: 9,
    ErrorName.BUSY: 10,
    ErrorName.NO_UPDATE: 11,
    ErrorName.NO_SUCH_DEPLOYMENT: 12,
    ErrorName.NOTHING_STAGED: 13,
    ErrorName.NO_ROLLBACK: 14,
    ErrorName.ALREADY_BOOTED: 15,
    ErrorName.PRECONDITION_FAILED: 16,
    ErrorName.INVALID_REFERENCE: 17,
    ErrorName.HELD: 18,
    ErrorName.CANCELLED: 19,
    ErrorName.NETWORK: 20,
    ErrorName.REGISTRY_AUTH: 21,
    ErrorName.IMAGE_NOT_FOUND: 22,
    ErrorName.SIGNATURE_REJECTED: 23,
    ErrorName.DIGEST_MISMATCH: 24,
    ErrorName.VERITY_MISMATCH: 25,
    ErrorName.CORRUPT_REPOSITORY: 26,
    ErrorName.NO_SPACE: 27,
    ErrorName.READ_ONLY: 28,
    ErrorName.BOOT_LOADER: 29,
    ErrorName.UNSUPPORTED_IMAGE: 30,
    ErrorName.JOB_NOT_CANCELLABLE: 31,
    ErrorName.LOCK_TIMEOUT: 32,
}


def exit_code(error_name: str) -> int:
    """Exit code for a D-Bus error name, ``EXIT_FAILURE`` for one that is not ours."""
    try:
        return EXIT_CODES[ErrorName(error_name)]
    except ValueError:
        return EXIT_FAILURE
