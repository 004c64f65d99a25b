"""A recorded host whose own mounts are those of a mount namespace, and the roots that are prepared on it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hostimage_testing.hosts import Deployment, RecordedHost
from hostimage_testing.recorded import row_of
from hostimaged.host import commands, softreboot
from hostimaged.host.session import Session, open_session
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths


@dataclasses.dataclass
class Namespace:
    """The mount namespace of a process that waits; ``root`` is what it sees."""

    pid: int

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.pid}/root")

    def sees(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def mounts(self, path: Path) -> dict[str, tuple[str, str, str]]:
        """What is mounted at ``path`` and below: type, source, and rw or ro, by place."""
        found = {}
        for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point, options = before.split(" ")[4:6]
            kind, source = after.split(" ")[:2]
            if Path(point).is_relative_to(path):
                place = str(Path(point).relative_to(path))
                assert place not in found, f"two mounts at {place}"
                found[place] = (kind, source, options.split(",")[0])
        return found


@dataclasses.dataclass
class Machine:
    """A host whose own mounts are those of a namespace."""

    host: RecordedHost
    booted: Deployment
    other: Deployment
    namespace: Namespace

    @property
    def paths(self) -> HostPaths:
        process = Path(f"/proc/{self.namespace.pid}")
        return dataclasses.replace(
            HostPaths.scratch(self.host.root),
            host_mounts=process / "mountinfo",
            host_namespace=process / "ns/mnt",
        )

    @contextmanager
    def session(self) -> Iterator[Session]:
        with open_session(self.paths, Silent()) as opened:
            yield opened

    @property
    def target(self) -> Path:
        return self.host.root / "run/nextroot"

    @property
    def root(self) -> Path:
        """The next root, as the host sees it."""
        return self.namespace.sees(self.target)

    @property
    def mounts(self) -> dict[str, tuple[str, str, str]]:
        return self.namespace.mounts(self.target)

    @property
    def prepared(self) -> str | None:
        found = softreboot.prepared(self.paths)
        return None if found is None else str(found)

    def nothing_is_left(self) -> bool:
        """Neither a mount, in any namespace of ours, nor the directory that systemd would take for a root."""
        own = str(self.target) in Path("/proc/self/mountinfo").read_text()
        return not self.mounts and not own and not self.target.exists()

    def place(self, deployment: Deployment | None = None) -> None:
        with self.session() as opened:
            state = opened.state()
            softreboot.place(opened, state, row_of(state, deployment or self.other))

    def finalize(self, monkeypatch: pytest.MonkeyPatch) -> int:
        """Shut down, as the unit does it."""
        with monkeypatch.context() as patched:
            paths = self.paths
            patched.setattr(commands.HostPaths, "scratch", lambda _: paths)
            return commands.finalize_main(["--root", str(self.host.root)])


def kernel_messages(log: int) -> str:
    """What the kernel said since."""
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(os.read(log, 8192).decode("utf-8", "replace"))
    return "".join(found)
