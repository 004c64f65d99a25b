"""The root of a container that can run: the machine's shell and what it needs, as a tar."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from hostimage_testing.tools import require, run

_LIBRARY = re.compile(r"(/\S+)")
_PROGRAMS = {"bin/sh": "sh", "bin/cat": "cat"}


def runnable_root(os_release: bytes) -> bytes:
    """A layer with /bin/sh, /bin/cat and /etc/os-release."""
    files: dict[str, bytes] = {"etc/os-release": os_release}
    for name, program in _PROGRAMS.items():
        path = require(program)
        files[name] = Path(path).read_bytes()
        for line in run(require("ldd"), path).out.splitlines():
            if found := _LIBRARY.search(line.partition("=>")[2] or line):
                files[found[1].lstrip("/")] = Path(found[1]).read_bytes()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        for name in sorted(parents | {"usr", "proc", "sys", "dev", "run", "tmp"}):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()
