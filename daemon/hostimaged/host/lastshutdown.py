"""What finalizers, ours and bootc's, said at the last shutdown: from the journal of the boot before."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Final

from hostimaged.errors import HostimageError
from hostimaged.system.process import cleaned_environment, spawn, stop

_UNITS: Final = ("hostimaged-finalize.service", "bootc-finalize-staged.service")
#: Lines that are looked at, and seconds that the journal gets.
_LINES: Final = 50
_PATIENCE: Final = 30.0
#: Bytes that are read of what it says.
_MAX_OUTPUT: Final = 64 << 10
#: How a line begins that tells why something failed: ours, and bootc's.
_REASONS: Final = ("hostimaged: ", "error: ", "ERROR ")


def last_words() -> str:
    """The last reason that a finalizer gave in the boot before this one, else its last line, else "".

    A host without a journal of that boot says nothing. Never raises.
    """
    command = ["journalctl", "--boot=-1", "--output=cat", "--no-pager", "--quiet", f"--lines={_LINES}"]
    try:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as private:
            process = spawn(
                [*command, *(f"--unit={unit}" for unit in _UNITS)],
                environment=cleaned_environment(Path(private)),
                stdout=output,
            )
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                return ""
            finally:
                stop(process, 1)
            output.seek(0)
            lines = output.read(_MAX_OUTPUT).decode("utf-8", "replace").splitlines()
    except (HostimageError, OSError):
        return ""
    told = [line.strip() for line in lines if line.strip()]
    reasons = [line for line in told if line.startswith(_REASONS)]
    return next(iter((reasons or told)[-1:]), "").removeprefix("hostimaged: ")
