"""A read-only mount becomes writable for one process, and for nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.system import mounts, syscalls

pytestmark = pytest.mark.root

# Runs in a mount namespace of its own, and makes a read-only bind mount of its argument, with a flag to keep.
_SCRIPT = """
import errno, os, subprocess, sys
from pathlib import Path
from hostimaged.system import mounts, syscalls
path = Path(sys.argv[1])
inside = path / "below"
def refused():
    try:
        (path / "probe").touch()
    except OSError as error:
        return error.errno == errno.EROFS
    return False
syscalls.mount("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount(path, syscalls.MS_BIND, path)
syscalls.mount(path, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | os.ST_NODEV)
assert refused()
other = subprocess.Popen(
    [sys.executable, "-c", "import os, sys; input(); os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)",
     str(path / "other")],
    stdin=subprocess.PIPE, stderr=subprocess.PIPE)
mounts.make_writable(inside)
assert not refused()
assert os.statvfs(path).f_flag & os.ST_NODEV
mounts.make_writable(inside)
assert b"Read-only file system" in other.communicate(b"\\n")[1]
print("fine")
"""


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


# An automount whose program is this one; a look from outside its process group waits for it to be answered.
_AUTOMOUNT = """
import os, subprocess, sys
from pathlib import Path
from hostimaged.system import mountcalls, syscalls
syscalls.mount("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
path = Path(sys.argv[1])
asked, pipe = os.pipe()
options = {"fd": str(pipe), "pgrp": str(os.getpgrp()), "minproto": "5", "maxproto": "5", "direct": None}
mount = mountcalls.make_mount("autofs", source="test", options=options)
mountcalls.place_mount(mount, os.open(path, os.O_PATH))
look = "import sys; from pathlib import Path; from hostimaged.system import mounts; " + sys.argv[2]
process = subprocess.Popen([sys.executable, "-c", look, str(path)], start_new_session=True)
os.set_blocking(asked, False)
try:
    code = process.wait(float(sys.argv[3]))
except subprocess.TimeoutExpired:
    process.kill()
    code = "waits"
try:
    os.read(asked, 1000)
    print(code, "asked")
except BlockingIOError:
    print(code, "nothing")
mountcalls.detach(path)
"""


@needs_root
@pytest.mark.parametrize(
    ("look", "told", "patience"),
    [
        ("mounts.make_writable(Path(sys.argv[1]))", "0 nothing", 60.0),
        # What it would be otherwise.
        ("(Path(sys.argv[1]) / 'x').exists()", "waits asked", 2.0),
    ],
)
def test_an_automount_is_not_set_off(tmp_path: Path, look: str, told: str, patience: float) -> None:
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", _AUTOMOUNT, str(tmp_path), look, str(patience)],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY_ROOT}/daemon:{REPOSITORY_ROOT}/dbus"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    if "unshare failed" in done.stderr or "No such device" in done.stderr:
        pytest.skip("this machine allows no mount namespaces, or has no automounts")
    assert (done.stdout, done.stderr) == (f"{told}\n", "")


def run(script: str, path: Path) -> None:
    """Run a script with mounts of its own; it prints ``fine``."""
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script, str(path)],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY_ROOT}/daemon:{REPOSITORY_ROOT}/dbus"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("this machine allows no mount namespaces")
    assert (done.stdout, done.stderr) == ("fine\n", "")


@needs_root
@pytest.mark.parametrize("name", ["plain", "with space\\and\ttab"])
def test_only_this_process_may_write(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (path / "below").mkdir(parents=True)
    run(_SCRIPT, path)
    assert not (path / "other").exists()
    assert (path / "probe").exists()


def test_what_is_writable_or_missing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "syscalls", None)
    mounts.make_writable(tmp_path)
    mounts.make_writable(tmp_path / "missing")


def test_a_failing_call_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        syscalls.mount(tmp_path / "missing", syscalls.MS_REMOUNT)


# As above.
_MOUNTS = """
import os, select, subprocess, sys
from hostimaged.system import inotify, mounts, syscalls
path = sys.argv[1]
syscalls.mount("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
changes = mounts.MountChanges()
watches = inotify.Inotify()
def told():
    return bool(select.select([changes], [], [], 0)[0])
assert not told()
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
assert told()
changes.take()
assert not told()
fd = os.open(path, os.O_PATH)
number = watches.watch(fd)
os.close(fd)
# A watch keeps nothing busy, and ends with its file system.
subprocess.run(["umount", path], check=True)
assert told()
changes.take()
ends = [event.mask for event in watches.read() if event.watch == number]
assert ends[-2] & inotify.Mask.UNMOUNT and ends[-1] == inotify.Mask.IGNORED, ends
assert not told()
changes.close()
changes.close()
print("fine")
"""


@needs_root
def test_mounts_are_told_and_watches_keep_none_busy(tmp_path: Path) -> None:
    run(_MOUNTS, tmp_path)


# What is bound, or a file system of its own, in a mount namespace that nobody else sees.
_PLACES = """
import sys
from pathlib import Path
from hostimaged.system import mounts, syscalls
top = Path(sys.argv[1])
syscalls.mount("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount(top / "bound", syscalls.MS_BIND, top / "plain")
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", top / "own"], check=True)
print([mounts.is_elsewhere(top, name) for name in ("plain", "bound", "own", "link", "missing", "file")])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_directory_that_is_bound_or_linked_has_its_place_elsewhere(tmp_path: Path) -> None:
    for name in ("plain", "bound", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "file").touch()
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", _PLACES, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY_ROOT}/daemon:{REPOSITORY_ROOT}/dbus"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("this machine allows no mount namespaces")
    assert (done.stdout, done.stderr) == ("[False, True, False, True, False, False]\n", "")
