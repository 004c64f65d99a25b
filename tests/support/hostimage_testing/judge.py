"""What composefs-rs's own tool says of a repository."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from hostimage_testing.tools import run

PULL_TAG = "localhost/hostimaged-pull-"


@dataclass(frozen=True)
class Judge:
    """``cfsctl`` on the repository at ``repository`` (without fs-verity, which test machines lack)."""

    program: str
    repository: Path

    def __call__(self, *args: str, version: int | None = None) -> str:
        """Standard output of ``cfsctl ARGS``; fails the test when it fails."""
        session = [] if version is None else ["--erofs-version", str(version)]
        return run(self.program, "--repo", self.repository, "--insecure", *session, *args).out

    def check(self, *, images: int | None = None) -> None:
        """Assert that fsck and the image fsck find nothing wrong (and see ``images`` tags)."""
        assert self("fsck").rstrip().endswith("status: ok")
        report = self("oci", "fsck")
        assert report.rstrip().endswith(("ok", "status: ok")), report
        if images is not None:
            assert f"oci images: {images}/{images} ok" in report, report

    def image_id(self, name: str, version: int) -> str:
        """Hex image id that cfsctl computes from the layers stored for the tag ``name``."""
        return self("oci", "compute-id", name, version=version).strip()

    def cat(self, stream: str) -> bytes:
        """What the stream ``stream`` stands for, put together by cfsctl."""
        command = [self.program, "--repo", self.repository, "--insecure", "cat", stream]
        return subprocess.run(command, check=True, capture_output=True).stdout
