"""What the initramfs does, on a kernel with fs-verity: the measured digest of the image must be the id."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hostimaged.composefs.erofs import build
from hostimaged.composefs.erofs.format import Format
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity
from hostimaged.composefs.tree import Directory, External, Leaf, Stat
from hostimaged.ids import ObjectId
from hostimaged.system import syscalls

SCRIPT = Path(__file__).parents[3] / "systemd/initramfs/setup-root"
CONTENT = b"of the operating system" * 1000
LOOK = """
mount --bind "$SYSROOT" "$SYSROOT" && mount --make-rshared / || exit 2
"$@" || exit 1
findmnt --noheadings --output SOURCE,FSTYPE,OPTIONS --target "$SYSROOT" | tail -n 1
sha512sum < "$SYSROOT/usr/file" && touch "$SYSROOT/etc/probe"
"""


class Deployed:
    """A physical root with one deployment, of an image with one file whose data is an object."""

    def __init__(self, root: Path) -> None:
        self.sysroot = root / "sysroot"
        self.scratch = root
        self.sysroot.mkdir()
        stat = Stat(0o755, 0, 0, 0, 0, {})
        made, _ = Repository.init(
            self.sysroot / "composefs", algorithm=Algorithm.SHA512, verity=Verity.REQUIRE
        )
        with made as repository:
            self.object = repository.store_object(CONTENT).id
            file = Leaf(Stat(0o644, 0, 0, 0, 0, {}), External(self.object, len(CONTENT)))
            parts = {name: Directory(stat, {}) for name in (b"etc", b"var", b"sysroot")}
            tree = Directory(stat, parts | {b"usr": Directory(stat, {b"file": file})})
            self.image = repository.write_image(bytes(build(tree, Format.V1, Algorithm.SHA512)), "os")
        self.state = self.sysroot / "state/deploy" / self.image.hex()
        (self.state / "etc").mkdir(parents=True)
        (self.state / "var").mkdir()

    def path(self, id_: ObjectId) -> Path:
        return self.sysroot / "composefs/objects" / id_.pathname

    def replace(self, id_: ObjectId, content: bytes, *, verity: bool) -> None:
        """Put other bytes in place of an object, as who has the disk can."""
        path = self.path(id_)
        path.unlink()
        path.write_bytes(content)
        if verity:
            fd = os.open(path, os.O_RDONLY)
            try:
                syscalls.enable_verity(fd, Algorithm.SHA512.kernel_id)
            finally:
                os.close(fd)

    def boot(self, optional: str = "") -> subprocess.CompletedProcess[str]:
        cmdline = self.scratch / "cmdline"
        cmdline.write_text(f"quiet composefs={optional}{self.image.hex()}\n")
        script = [SCRIPT, "--sysroot", self.sysroot, "--cmdline", cmdline, "--work", self.scratch / "work"]
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", LOOK, "look", *script],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"SYSROOT": str(self.sysroot)},
        )


@pytest.fixture
def deployed(tmp_path: Path) -> Deployed:
    assert shutil.which("fsverity")
    return Deployed(tmp_path)


@pytest.mark.parametrize("optional", ["", "?"])
def test_verity_is_required_of_every_object(deployed: Deployed, optional: str) -> None:
    done = deployed.boot(optional)
    assert done.returncode == 0, done.stderr
    source, kind, options = done.stdout.splitlines()[0].split()
    assert (source, kind) == (f"composefs:{deployed.image.hex()}", "overlay")
    assert {"ro", "verity=require"} <= set(options.split(","))
    assert (deployed.state / "etc/probe").exists()


@pytest.mark.parametrize("optional", ["", "?"])
def test_a_swapped_image_is_fatal(deployed: Deployed, optional: str) -> None:
    deployed.replace(deployed.image, deployed.path(deployed.image).read_bytes() + b"\0" * 4096, verity=True)
    done = deployed.boot(optional)
    assert done.returncode == 1
    assert "has the digest sha512:" in done.stderr


def test_an_image_without_verity_needs_the_question_mark(deployed: Deployed) -> None:
    deployed.replace(deployed.image, deployed.path(deployed.image).read_bytes(), verity=False)
    assert "has no fs-verity digest" in deployed.boot().stderr
    done = deployed.boot("?")
    assert done.returncode == 0, done.stderr
    assert "verity=require" not in done.stdout


@pytest.mark.parametrize("verity", [True, False])
def test_the_kernel_refuses_a_swapped_object(deployed: Deployed, verity: bool) -> None:
    deployed.replace(deployed.object, CONTENT.swapcase(), verity=verity)
    done = deployed.boot()
    assert done.returncode != 0
    assert "verity=require" in done.stdout
    assert not (deployed.state / "etc/probe").exists(), "the file could be read"
