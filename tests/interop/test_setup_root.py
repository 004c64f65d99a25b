"""What the initramfs does: the script mounts deployments on this kernel, in a mount namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostimage_testing.hosts import KINDS, Deployment, RecordedHost
from hostimage_testing.lives import upgraded
from hostimage_testing.tools import REPOSITORY_ROOT, require

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.timeout(300),
]
#: As fsverity(1) tells that there is none.
UNSUPPORTED = "echo \"ERROR: FS_IOC_MEASURE_VERITY failed on '$2': Operation not supported (95)\" >&2; exit 1"
SCRIPT = REPOSITORY_ROOT / "systemd/initramfs/setup-root"
#: What is looked at in the new root, before the namespace is gone with all its mounts. They are shared within
#: it, as systemd makes them in its initramfs; without systemd they are private.
LOOK = """
set -e
mount --bind "$SYSROOT" "$SYSROOT"
mount --make-rshared /
[ "$PROPAGATION" = shared ] || mount --make-rprivate /
"$@"
cd "$SYSROOT"
echo "root $(findmnt -no SOURCE,FSTYPE --target . | tail -n 1)"
echo "options $(findmnt -no OPTIONS --target . | tail -n 1)"
echo "etc $(findmnt -no SOURCE,FSTYPE --target etc | tail -n 1)"
echo "var $(findmnt -no SOURCE,FSTYPE --target var | tail -n 1)"
echo "release $(grep ^VERSION_ID= usr/lib/os-release)"
for part in . etc var sysroot; do
    if touch "$part/probe" 2>/dev/null; then echo "writable $part"; fi
done
echo "work $(ls -A "$WORK" 2>/dev/null)"
"""


class Initramfs:
    """The script over a host's physical root."""

    def __init__(self, host: RecordedHost, deployment: Deployment, scratch: Path) -> None:
        require("findmnt")
        self.id = deployment.id
        self.sysroot = host.root / "sysroot"
        self.state = host.state(deployment)
        self.cmdline = scratch / "cmdline"
        self.config = scratch / "setup-root-conf.toml"
        self.work = scratch / "work"
        self.programs = scratch / "programs"
        self.programs.mkdir()
        self.propagation = "shared"
        self.says(f"quiet rw composefs=?{self.id}")

    def says(self, cmdline: str) -> None:
        self.cmdline.write_text(cmdline + "\n")

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self) -> subprocess.CompletedProcess[str]:
        script = [str(SCRIPT), "--sysroot", self.sysroot, "--cmdline", self.cmdline]
        command: Sequence[str | Path] = [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", LOOK, "look"),
            *script,
            *("--config", self.config, "--work", self.work),
        ]
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={
                "PATH": path,
                "SYSROOT": str(self.sysroot),
                "WORK": str(self.work),
                "PROPAGATION": self.propagation,
            },
        )

    def mounted(self) -> dict[str, str]:
        done = self.run()
        assert (done.returncode, done.stderr) == (0, "")
        lines = [line.partition(" ") for line in done.stdout.splitlines()]
        seen = {key: value for key, _, value in lines if key != "writable"}
        seen["writable"] = " ".join(value for key, _, value in lines if key == "writable")
        return seen

    def refusal(self) -> str:
        done = self.run()
        assert done.returncode == 1, done.stdout
        assert not self.work.exists()
        (line,) = done.stderr.splitlines()
        return line.removeprefix("hostimaged-setup-root: ")


@pytest.fixture
def initramfs(tmp_path: Path, cfsctl: str) -> Initramfs:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    life = upgraded(host)
    # Verity is told by what the fsverity program says: this kernel has none.
    made = Initramfs(host, life.booted, tmp_path)
    made.program("fsverity", UNSUPPORTED)
    return made


@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_a_deployment_is_mounted(initramfs: Initramfs, propagation: str) -> None:
    initramfs.propagation = propagation
    seen = initramfs.mounted()
    assert seen["root"] == f"composefs:{initramfs.id} overlay"
    assert "ro" in seen["options"].split(",")
    assert "verity=require" not in seen["options"]
    assert seen["release"] == "VERSION_ID=2" or "2" in seen["release"]
    assert seen["writable"] == "etc var"
    assert seen["work"] == ""
    assert (initramfs.state / "etc/probe").exists()
    assert (initramfs.state / "var/probe").exists()
    assert not initramfs.work.exists()


def test_the_data_of_files_is_there(initramfs: Initramfs) -> None:
    """Files larger than what is inline come from the objects, by the overlay."""
    usr = initramfs.mounted()
    assert usr["root"].startswith("composefs:")


@pytest.mark.parametrize(
    ("cmdline", "found"),
    [
        ("composefs={id}", False),
        ("composefs=?{id}", True),
        ("composefs.digest=?v1-sha512-12:{id}", True),
        ("composefs.digest=v2-sha512-12:{id}", False),
        ("composefs.digest=?v1-sha256-12:00 composefs=?{id}", True),
        ("composefs=bad composefs.digest=?v1-sha512-12:{id}", True),
        ('title="a composefs=bad" composefs=?{id}', True),
        ("composefs=?{id} composefs=bad", True),
        ("systemd.volatile=no composefs=?{id}", True),
    ],
)
def test_the_deployment_is_that_of_the_command_line(initramfs: Initramfs, cmdline: str, found: bool) -> None:
    initramfs.says(cmdline.format(id=initramfs.id))
    if found:
        assert initramfs.mounted()["root"] == f"composefs:{initramfs.id} overlay"
    else:
        assert initramfs.refusal() == f"the image of deployment {initramfs.id} has no fs-verity digest"


@pytest.mark.parametrize(
    ("cmdline", "message"),
    [
        ("quiet", "the kernel's command line names no deployment"),
        ("composefs=", "the kernel's command line names no deployment"),
        ("composefs=abc", "composefs=abc is no id of a deployment"),
        (f"composefs={'g' * 128}", f"composefs={'g' * 128} is no id of a deployment"),
        (f"composefs=?{'a' * 128}", f"deployment {'a' * 128} has no state directory"),
        (f"composefs=?../{'a' * 125}", f"composefs=../{'a' * 125} is no id of a deployment"),
        ("composefs.digest=v1-sha512-12", "composefs.digest=v1-sha512-12 has no digest"),
        ("composefs.digest=v9-sha512-12:a", "composefs.digest=v9-sha512-12:a is of an unknown kind"),
        ("composefs=*", "composefs=* is no id of a deployment"),
    ],
)
def test_other_command_lines_are_refused(initramfs: Initramfs, cmdline: str, message: str) -> None:
    initramfs.says(cmdline)
    assert initramfs.refusal() == message


@pytest.mark.parametrize("optional", ["", "?"])
def test_a_digest_that_differs_is_fatal(initramfs: Initramfs, optional: str) -> None:
    initramfs.says(f"composefs={optional}{initramfs.id}")
    initramfs.program("fsverity", f'echo sha512:{"0" * 128} "$2"')
    assert "has the digest sha512:000" in initramfs.refusal()


@pytest.mark.parametrize("why", ["No data available (61)", "Operation not supported (95)"])
def test_only_that_there_is_none_is_tolerated(initramfs: Initramfs, why: str) -> None:
    initramfs.program("fsverity", f'echo "ERROR: FS_IOC_MEASURE_VERITY failed: {why}" >&2; exit 1')
    assert initramfs.mounted()["root"] == f"composefs:{initramfs.id} overlay"
    initramfs.says(f"composefs={initramfs.id}")
    assert initramfs.refusal() == f"the image of deployment {initramfs.id} has no fs-verity digest"


@pytest.mark.parametrize(
    ("program", "told"),
    [("echo 'ERROR: Input/output error (5)' >&2; exit 1", "Input/output error"), ("exit 127", "")],
)
def test_what_cannot_be_measured_is_not_taken_for_unprotected(
    initramfs: Initramfs, program: str, told: str
) -> None:
    initramfs.program("fsverity", program)
    refusal = initramfs.refusal()
    assert refusal.startswith("the fs-verity digest of the image of deployment")
    assert told in refusal


@pytest.mark.parametrize("optional", ["", "?"])
def test_with_verity_it_is_required_of_the_objects(initramfs: Initramfs, optional: str) -> None:
    """The ``?`` tolerates absence, it does not switch off."""
    initramfs.says(f"composefs={optional}{initramfs.id}")
    initramfs.program("fsverity", f'echo sha512:{initramfs.id} "$2"')
    log = initramfs.programs.parent / "mounts"
    mount = shutil.which("mount")
    # Without fs-verity in the kernel the overlay would give no data: what is asked for is looked at.
    initramfs.program(
        "mount", f'echo "$@" >> {log}\nshift_=$(echo "$@" | sed s/,verity=require//)\nexec {mount} $shift_'
    )
    assert initramfs.mounted()["root"] == f"composefs:{initramfs.id} overlay"
    (overlay,) = [line for line in log.read_text().splitlines() if f"composefs:{initramfs.id}" in line]
    assert ",verity=require " in overlay


@pytest.mark.parametrize(
    ("config", "etc", "writable"),
    [
        ("", "bind", "etc var"),
        ("# nothing\n\n[etc] # a table\nunknown = 5\n", "bind", "etc var"),
        ('[etc]\nmount = "none"\n', "none", "var"),
        ('[etc]\nmount = "root"', "none", "var"),
        ('[etc]\nmount="overlay"\n', "overlay", "etc var"),
        ('[etc]\nmount = "transient"\n', "transient", "etc var"),
        ("[etc]\ntransient = true\n", "transient", "etc var"),
        ('[etc]\ntransient = true\nmount = "bind"\n', "bind", "etc var"),
        ('[var]\nmount = "none"\n', "bind", "etc"),
        ("[root]\ntransient = true\n", "bind", ". etc var"),
        ('[root]\ntransient = true\n[etc]\nmount = "none"\n', "none", ". etc var"),
    ],
)
def test_the_image_decides_what_is_kept(initramfs: Initramfs, config: str, etc: str, writable: str) -> None:
    initramfs.config.write_text(config)
    seen = initramfs.mounted()
    assert seen["writable"] == writable
    root = "transient:composefs=" if "[root]" in config else "composefs:"
    assert seen["root"] == f"{root}{initramfs.id} overlay"
    kept = initramfs.state / "etc/probe"
    match etc:
        case "bind":
            assert kept.exists()
        case "overlay":
            assert seen["etc"] == "overlay overlay"
            assert (initramfs.state / "etc/upper/probe").exists()
            assert (initramfs.state / "etc/upper").stat().st_mode & 0o7777 == 0o755
            assert (initramfs.state / "etc/work").stat().st_mode & 0o7777 == 0o700
        case "transient":
            assert seen["etc"] == "transient overlay"
            assert not kept.exists()
        case "none":
            assert not kept.exists()


@pytest.mark.parametrize("volatile", ["state", "overlay"])
def test_a_volatile_var_is_left_to_systemd(initramfs: Initramfs, volatile: str) -> None:
    initramfs.says(f"composefs=?{initramfs.id} systemd.volatile={volatile}")
    assert initramfs.mounted()["writable"] == "etc"
    for config in ("[var]\n", "[var]\nunknown = 5\n", "[var]\ntransient = false\n"):
        initramfs.config.write_text(config)
        assert initramfs.mounted()["writable"] == "etc", config
    for config in ('[var]\nmount = "bind"\n', "[var]\ntransient = true\n"):
        initramfs.config.write_text(config)
        assert initramfs.mounted()["writable"] == "etc var", config


def test_the_mode_of_an_upper_directory_is_kept(initramfs: Initramfs) -> None:
    initramfs.config.write_text("[etc]\nmount = 'overlay'\n")
    assert initramfs.mounted()["etc"].endswith("overlay")
    upper = initramfs.state / "etc/upper"
    assert [oct(path.stat().st_mode & 0o777) for path in (upper, upper.with_name("work"))] == [
        "0o755",
        "0o700",
    ]
    upper.chmod(0o750)
    initramfs.mounted()
    assert upper.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('[etc]\nmount = "sometimes"\n', "etc.mount is none, bind, overlay or transient"),
        ("[etc]\ntransient = 1\n", "etc.transient is true or false"),
        ('etc.mount = "none"\n', "cannot read the key etc.mount"),
        ('etc = { mount = "none" }\n', "write etc as a table [etc]"),
        ("[etc.more]\n", "cannot read the table [etc.more]"),
        ("nonsense\n", "cannot read: nonsense"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_fatal(
    initramfs: Initramfs, config: str, message: str
) -> None:
    initramfs.config.write_text(config)
    assert initramfs.refusal() == f"{initramfs.config}: {message}"


@pytest.mark.parametrize("part", ["etc", "var"])
def test_what_fails_leaves_nothing_mounted(initramfs: Initramfs, part: str) -> None:
    missing = initramfs.state / part
    missing.unlink() if missing.is_symlink() else shutil.rmtree(missing)
    before = Path("/proc/self/mountinfo").read_text()
    loops = set(Path("/sys/class/block").glob("loop*/loop"))
    assert initramfs.refusal() == f"state/deploy/{initramfs.id}/{part} is not there"
    assert Path("/proc/self/mountinfo").read_text() == before
    assert set(Path("/sys/class/block").glob("loop*/loop")) == loops


def test_an_image_that_is_gone_is_named(initramfs: Initramfs) -> None:
    (initramfs.sysroot / "composefs/images" / initramfs.id).unlink()
    assert initramfs.refusal() == f"the image of deployment {initramfs.id} is not there"
