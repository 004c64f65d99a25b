"""Error names, classes, exit codes and documents say the same."""

from __future__ import annotations

import errno
import importlib
import pkgutil
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostimaged
from hostimage_dbus.errors import EXIT_CODES, EXIT_FAILURE, EXIT_NO_SERVICE, ErrorName, exit_code
from hostimaged import errors
from hostimaged.errors import HostimageError, from_os_error, printable

API_ERRORS = {
    "Busy",
    "NoUpdate",
    "NoSuchDeployment",
    "NothingStaged",
    "NoRollback",
    "AlreadyBooted",
    "PreconditionFailed",
    "InvalidReference",
    "Held",
    "Cancelled",
    "Network",
    "RegistryAuth",
    "ImageNotFound",
    "SignatureRejected",
    "DigestMismatch",
    "VerityMismatch",
    "CorruptRepository",
    "NoSpace",
    "ReadOnly",
    "BootLoader",
    "UnsupportedImage",
    "JobNotCancellable",
    "LockTimeout",
    "Internal",
}


def all_error_classes() -> set[type[HostimageError]]:
    for module in pkgutil.walk_packages(hostimaged.__path__, "hostimaged."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type[HostimageError]] = set()
    pending = [HostimageError]
    while pending:
        cls = pending.pop()
        found.add(cls)
        pending += cls.__subclasses__()
    return found


def test_names_are_those_of_the_api() -> None:
    own = {name.removeprefix("org.hostimage1.Error.") for name in ErrorName if "hostimage1" in name}
    assert own == API_ERRORS


def test_exit_codes_tell_errors_apart() -> None:
    assert EXIT_CODES.keys() == set(ErrorName)
    codes = list(EXIT_CODES.values())
    assert len(set(codes)) == len(codes)
    assert EXIT_NO_SERVICE not in codes
    assert all(0 < code < 64 for code in codes)
    assert exit_code("org.example.Unknown") == EXIT_FAILURE


def test_every_class_has_a_name_and_a_template_that_can_be_filled() -> None:
    for cls in all_error_classes():
        assert cls.name in ErrorName
        template = (cls.__doc__ or "").strip()
        assert template, f"{cls.__name__} has no message template"
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
        error = cls.__new__(cls)
        HostimageError.__init__(error, **dict.fromkeys(fields, "value"))
        assert "\n" not in error.message
        assert error.exit_code == EXIT_CODES[cls.name]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, errors.NoSpace),
        (errno.EDQUOT, errors.NoSpace),
        (errno.EROFS, errors.ReadOnly),
        (errno.EIO, errors.StorageError),
    ],
)
def test_os_errors_are_typed_and_name_no_path(code: int, expected: type[HostimageError]) -> None:
    error = from_os_error(OSError(code, "reason", "/private/path"), "writing an object")
    assert type(error) is expected
    assert error.message == "writing an object: reason"


@given(st.one_of(st.binary(), st.text()))
def test_messages_are_one_printable_bounded_line(value: bytes | str) -> None:
    text = printable(value)
    assert text.isprintable()
    text.encode()
    assert len(text) <= 10_000
    assert len(errors.InvalidArgs(value * 100).message) <= 1000
