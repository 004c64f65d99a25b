"""Error classes: one per cause.

Each carries its D-Bus error name and an optional hint; its docstring is the message template. A message may
name documented host paths, object names of the repository and the caller's own arguments, and nothing else:
it reaches unprivileged callers.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

from hostimage_dbus.errors import EXIT_CODES, ErrorName

_MESSAGE_LIMIT: Final = 1000


def printable(value: object) -> str:
    """``value`` as one bounded line of printable text, for values that come from outside.

    Control and format characters (bidirectional overrides among them), line separators, surrogates and
    unassigned code points are written as escapes.
    """
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    text = text[:_MESSAGE_LIMIT]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class HostimageError(Exception):
    """{detail}"""

    name: ClassVar[ErrorName] = ErrorName.INTERNAL
    hint: ClassVar[str] = ""

    def __init__(self, detail: object = "", **fields: object) -> None:
        values = {key: printable(value) for key, value in fields.items()} | {"detail": printable(detail)}
        template = (type(self).__doc__ or "{detail}").strip()
        super().__init__(template.format_map(values)[:_MESSAGE_LIMIT])

    @property
    def message(self) -> str:
        """The message for people: one line, no internals."""
        return str(self.args[0])

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ends with this error."""
        return EXIT_CODES[self.name]


class Internal(HostimageError):
    """internal error; the journal of hostimaged has the details"""


class InvalidArgs(HostimageError):
    """{detail}"""

    name = ErrorName.INVALID_ARGS


class AccessDenied(HostimageError):
    """{detail}"""

    name = ErrorName.ACCESS_DENIED


class AuthorizationRequired(HostimageError):
    """{detail}"""

    name = ErrorName.AUTHORIZATION_REQUIRED
    hint = "allow authentication, or try again where an authentication agent is running"


class UnknownObject(HostimageError):
    """{detail}"""

    name = ErrorName.UNKNOWN_OBJECT


class LimitsExceeded(HostimageError):
    """{detail}"""

    name = ErrorName.LIMITS_EXCEEDED


class NotSupported(HostimageError):
    """{detail}"""

    name = ErrorName.NOT_SUPPORTED


class Timeout(HostimageError):
    """{detail}"""

    name = ErrorName.TIMEOUT


class Busy(HostimageError):
    """{detail}"""

    name = ErrorName.BUSY


class Held(HostimageError):
    """{detail}"""

    name = ErrorName.HELD
    hint = "hostimagectl status tells what is held, and why"


class NoSuchDeployment(HostimageError):
    """{detail}"""

    name = ErrorName.NO_SUCH_DEPLOYMENT


class PreconditionFailed(HostimageError):
    """{detail}"""

    name = ErrorName.PRECONDITION_FAILED


class InvalidReference(HostimageError):
    """image reference {reference}: {detail}"""

    name = ErrorName.INVALID_REFERENCE
    hint = "an image is written transport:name, for example docker://registry.example/os:latest"


class Cancelled(HostimageError):
    """{detail}"""

    name = ErrorName.CANCELLED

    def __init__(self, detail: object = "cancelled", **fields: object) -> None:
        super().__init__(detail, **fields)


class NetworkError(HostimageError):
    """{detail}"""

    name = ErrorName.NETWORK


class Unavailable(NetworkError):
    """{detail}"""

    # A peer that cannot be reached now, fell silent, or asks to be left alone for a while. What is no more
    # than a NetworkError stays so: nobody has to be told that trying again helps where it does not.
    hint = "the registry or the way to it may be disturbed for the moment: try again later"


class RegistryAuth(HostimageError):
    """{detail}"""

    name = ErrorName.REGISTRY_AUTH


class ImageNotFound(HostimageError):
    """{detail}"""

    name = ErrorName.IMAGE_NOT_FOUND


class SignatureRejected(HostimageError):
    """{detail}"""

    name = ErrorName.SIGNATURE_REJECTED


class DigestMismatch(HostimageError):
    """{what}: expected {expected}, got {actual}"""

    name = ErrorName.DIGEST_MISMATCH


class VerityMismatch(HostimageError):
    """{detail}"""

    name = ErrorName.VERITY_MISMATCH


class CorruptRepository(HostimageError):
    """{detail}"""

    name = ErrorName.CORRUPT_REPOSITORY


class NoSpace(HostimageError):
    """{detail}"""

    name = ErrorName.NO_SPACE


class ReadOnly(HostimageError):
    """{detail}"""

    name = ErrorName.READ_ONLY


class UnsupportedImage(HostimageError):
    """{detail}"""

    name = ErrorName.UNSUPPORTED_IMAGE


class JobNotCancellable(HostimageError):
    """{detail}"""

    name = ErrorName.JOB_NOT_CANCELLABLE


class LockTimeout(HostimageError):
    """{what} is locked by {holder}"""

    name = ErrorName.LOCK_TIMEOUT


class StorageError(HostimageError):
    """{detail}"""


class ProgramMissing(HostimageError):
    """{program} is needed and not installed: {detail}"""

    name = ErrorName.NOT_SUPPORTED


_ERRNO: Final[dict[int, type[HostimageError]]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EROFS: ReadOnly,
}


def from_os_error(error: OSError, doing: str) -> HostimageError:
    """The typed error for a failed system call; ``doing`` says what failed, without private paths."""
    reason = error.strerror or "input/output error"
    return _ERRNO.get(error.errno or 0, StorageError)(f"{doing}: {reason}")
