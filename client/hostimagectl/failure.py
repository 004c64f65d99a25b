"""Why a command ends without success, as one exception with message, hint and exit code."""

from __future__ import annotations

from typing import Final

from hostimage_dbus.errors import EXIT_NO_SERVICE, EXIT_USAGE, ErrorName, exit_code
from hostimagectl.output import HINTS

_STANDARD: Final = "org.freedesktop.DBus.Error."

#: Names that the bus (not the daemon) answers with when nobody serves the API.
_NO_SERVICE: Final = frozenset(
    _STANDARD + name
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "NoServer", "TimedOut")
)
_SPAWN: Final = _STANDARD + "Spawn."
_UNKNOWN_MEMBER: Final = frozenset(
    _STANDARD + name for name in ("UnknownMethod", "UnknownInterface", "UnknownProperty")
)
_HINT_UNREACHABLE: Final = "see 'systemctl status hostimaged'"


class Failure(Exception):
    """A command fails with ``message`` for people.

    ``name`` is the D-Bus error name, empty for what never was on the bus; ``code`` the exit code.
    """

    def __init__(self, message: str, *, code: int, name: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.name = name
        self.hint = hint

    @classmethod
    def of_error(cls, name: str, message: str) -> Failure:
        """For an error that a call or a job ended with."""
        if name in _NO_SERVICE or name.startswith(_SPAWN):
            return cls.no_service(f"hostimaged does not answer: {message}", name=name)
        hint = HINTS.get(name, "")
        if name in _UNKNOWN_MEMBER:
            hint = "the running hostimaged is of another version; restart it after an upgrade"
        return cls(message or name, code=exit_code(name), name=name, hint=hint)

    @classmethod
    def no_service(cls, message: str, *, name: str = "") -> Failure:
        """For a daemon or bus that cannot be reached any more."""
        return cls(message, code=EXIT_NO_SERVICE, name=name, hint=_HINT_UNREACHABLE)

    @classmethod
    def no_bus(cls, reason: str) -> Failure:
        """For a message bus that cannot be reached, or is lost."""
        return cls(reason, code=EXIT_NO_SERVICE, hint="is the D-Bus system bus running?")

    @classmethod
    def usage(cls, message: str, hint: str = "") -> Failure:
        """For arguments that make no sense."""
        return cls(message, code=EXIT_USAGE, name=ErrorName.INVALID_ARGS, hint=hint)

    @classmethod
    def bad_reply(cls, member: str) -> Failure:
        """For an answer that is not what the interface promises."""
        return cls.of_error(ErrorName.INTERNAL, f"hostimaged gave an answer to {member} that makes no sense")

    def as_dict(self) -> dict[str, str]:
        """``{"name": …, "message": …}``, as errors are shown in JSON."""
        return {"name": self.name, "message": self.message}


class Interrupted(Exception):
    """The user left; ``number`` is the signal that said so."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """Exit code as shells know it."""
        return 128 + self.number
