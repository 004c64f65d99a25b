"""The option dictionaries of methods: which keys each method takes, their types, and lengths of strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hostimaged.errors import InvalidArgs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostimage_dbus.transport import Variant

#: Longest string of an option: digests have 71 characters, names are shorter.
MAX_STRING: Final = 128

_ALL: Final = {"client-id": "s"}
_JOB: Final = _ALL | {"queue": "b"}

#: D-Bus type of each option, per member. An option that is not in its member's row is refused.
OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "GetStatus": _ALL,
    "ListImages": _ALL,
    "Pull": _JOB | {"expect-digest": "s"},
    "Cancel": _ALL,
}


def parse_options(member: str, given: Mapping[str, Variant]) -> dict[str, Any]:
    """The values of ``given``, checked for ``member``; raises ``InvalidArgs`` naming the option."""
    known = OPTIONS[member]
    values: dict[str, Any] = {}
    for key, variant in given.items():
        shown = ascii(key[:MAX_STRING])
        if key not in known:
            raise InvalidArgs(f"{member} has no option {shown}")
        if variant.signature != known[key]:
            raise InvalidArgs(f"option {shown} is of type {known[key]}, not {variant.signature}")
        if isinstance(variant.value, str):
            _check_string(key, variant.value)
        values[key] = variant.value
    return values


def _check_string(key: str, value: str) -> None:
    if len(value) > MAX_STRING:
        raise InvalidArgs(f"option {key} is longer than {MAX_STRING} characters")
    if not value.isprintable():
        raise InvalidArgs(f"option {key} has control characters")
