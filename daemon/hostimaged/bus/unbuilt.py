"""What the interface has and no operation does yet: the one table of it, which shrinks to nothing.

Such calls are checked and authorised like all others, so that a frontend can be written against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostimaged.bus.authorization import Member
from hostimaged.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimaged.bus.requests import Request

#: Members, and what is missing.
MEMBERS: Final[Mapping[Member, str]] = {
    Member.SET_UNIFIED: "unified storage",
}
#: Options, where they are true, of members that are built.
OPTIONS: Final[Mapping[str, str]] = {"unified": "unified storage"}


def refuse_unbuilt(request: Request) -> None:
    """Raise ``NotSupported`` for what nobody can do yet."""
    missing = MEMBERS.get(request.member)
    if missing is not None:
        raise _not_supported(str(request.member), missing)
    for option, missing in OPTIONS.items():
        if request.options.get(option):
            raise _not_supported(f"option {option}", missing)


def _not_supported(what: str, missing: str) -> NotSupported:
    return NotSupported(f"{what} is not supported by this version, which has no {missing}")
