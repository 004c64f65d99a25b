"""A guest with firmware, a disk and a second disk with images, driven over its serial lines.

The first line is the console, kept in a file; on the second the guest runs a shell that takes commands
(``hostimage_testing.bootable``). A reboot ends the emulator, and the next start boots from the firmware on.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import select
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from hostimage_testing import offline
from hostimage_testing.bootable import SHELL_READY
from hostimage_testing.debian_root import USER
from hostimage_testing.monitor import screenshot
from hostimage_testing.tools import Finished, absent, require

#: Seconds: what takes one minute on two quiet processors.
BOOT_LIMIT = 600.0
STOP_LIMIT = 300.0
PATIENCE = 180.0
_FIRMWARE = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
#: What a kernel says that ran into a breakpoint by which it changes its own code. The emulator lets that
#: happen now and then, with two processors; hardware does not.
EMULATORS_CRASH = "Oops: int3"
#: What every guest has, however it starts.
EMULATOR = (
    *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536", "-display", "none"),
    *("-nodefaults", "-device", "virtio-rng-pci"),
)


def firmware() -> tuple[Path, Path]:
    """Code and variables of the firmware; skips the test where there is none."""
    for code, variables in _FIRMWARE:
        if Path(code).exists() and Path(variables).exists():
            return Path(code), Path(variables)
    absent("OVMF is not installed")
    raise AssertionError


def command(directory: Path, disk: str, images: Path, network: Sequence[str] = ()) -> list[str]:
    """What starts a guest with firmware, whose variables are kept below ``directory``; see ``Machine``.

    Its serial lines are not in it: the images want two. The end of its parent is its own: nothing of a test
    run that was killed stays.
    """
    code, variables = firmware()
    own = shutil.copy(variables, directory / "variables.fd")
    return [
        "setpriv", "--pdeathsig", "KILL", require("qemu-system-x86_64"), *EMULATOR,
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
        "-drive", f"if=pflash,format=raw,unit=1,file={own}",
        "-drive", f"{disk},if=virtio",
        "-drive", f"file={images},format=raw,if=virtio,readonly=on",
        *network,
    ]  # fmt: skip


class Machine:
    """One guest, whose files are below ``directory``; started by ``start``, off at first.

    ``disk`` is what the emulator is told of the disk that is written to (``Installed.overlay``, ``power``),
    ``network`` of the network, if there is one (``guest_registry``). A context manager that pulls the plug at
    the end, and after a failure collects what tells of it first.
    """

    def __init__(self, directory: Path, disk: str, images: Path, network: Sequence[str] = ()) -> None:
        self.directory = directory
        self._socket, self._control = directory / "shell", directory / "control"
        self.console = directory / "console"
        self.console.touch()
        #: What was run inside, each with its end, its time and what it said.
        self.transcript = directory / "transcript"
        self.transcript.touch()
        self._argv = [
            *command(directory, disk, images, network), "-no-reboot",
            "-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=shell,path={self._socket},server=on,wait=off", "-serial", "chardev:shell",
            "-device", "VGA", "-qmp", f"unix:{self._control},server=on,wait=off",
        ]  # fmt: skip
        file = re.match(r"file=([^,]+),", disk)
        #: The journal is read from here when no commands are taken any more.
        self.disk_file = Path(file[1]) if file else None
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._heard = b""
        self._marks = itertools.count()
        self._boot_at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.collect(error)
        self.pull_the_plug()

    def start(self) -> float:
        """Boot, and wait until commands are taken; gives the seconds it took."""
        try:
            return self._boot()
        except pytest.fail.Exception:
            if EMULATORS_CRASH not in self.console_of_boot():
                raise
            print("the emulator made the kernel crash: booted again")
            self.pull_the_plug()
            return self._boot()

    def _boot(self) -> float:
        assert self._process is None, "it runs"
        self._socket.unlink(missing_ok=True)
        self._boot_at = self.console.stat().st_size
        begin = time.monotonic()
        self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL)
        while True:
            self._line = socket.socket(socket.AF_UNIX)
            try:
                self._line.connect(str(self._socket))
                break
            except OSError:
                self._line.close()
                if self._process.poll() is not None or time.monotonic() > begin + PATIENCE:
                    pytest.fail("the emulator does not start")
                time.sleep(0.1)
        self._heard = b""
        self._until(re.escape(SHELL_READY).encode() + rb"\r?\n", BOOT_LIMIT)
        return time.monotonic() - begin

    def pull_the_plug(self) -> None:
        """Stop at once; what the guest has not flushed is lost only where ``disk`` is served so."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reboot(self) -> float:
        """Shut down in order and boot again; gives the seconds of the boot."""
        self.shut_down("reboot")
        return self.start()

    def soft_reboot(self, command: str) -> float:
        """Run a line of shell that restarts all but the kernel; gives the seconds until commands are taken.

        What it prints is in the console's file at most: the shell that it runs in goes down with the rest.
        """
        begin = time.monotonic()
        self._say(f"( {command}\n) </dev/null >/dev/console 2>&1")
        self._until(re.escape(SHELL_READY).encode() + rb"\r?\n", BOOT_LIMIT, command)
        return time.monotonic() - begin

    def shut_down(self, how: str = "poweroff") -> None:
        """Shut down in order, and wait for the end."""
        self._say(f"systemctl --no-block {how}")
        self.wait_until_off()

    def wait_until_off(self) -> None:
        """Wait for the end of a shutdown that has begun."""
        assert self._process is not None
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the guest does not shut down:\n{self.console_of_boot()[-4000:]}")
        self.pull_the_plug()

    def run(self, *argv: str, check: bool = True, limit: float = PATIENCE) -> Finished:
        """Run a program inside as root to its end; both kinds of output are in ``out``."""
        return self.shell(shlex.join(argv), check=check, limit=limit)

    def begin(self, command: str) -> None:
        """Start a line of shell whose end is not waited for; nothing else is taken until it ends.

        What it says comes by ``hear``.
        """
        self._say(f"( {command}\n) </dev/null 2>&1")

    def hear(self, pattern: str, limit: float = PATIENCE) -> str:
        """Wait until what was begun has said something; gives what came before."""
        return self._until(pattern.encode(), limit, pattern)[0].decode(errors="replace")

    def shell(self, command: str, *, check: bool = True, limit: float = PATIENCE) -> Finished:
        """As ``run``, for a line of shell."""
        mark = f"end-of-command-{next(self._marks)}"
        # In two parts, so that it is found in the answer alone wherever the line is echoed.
        self._say(f"( {command}\n) </dev/null 2>&1; printf '\\n%s%s %d\\n' '{mark[:6]}' '{mark[6:]}' $?")
        begin = time.monotonic()
        answer = self._until(rb"\r?\n" + mark.encode() + rb" (\d+)\r?\n", limit, command)
        text = answer[0].decode(errors="replace").replace("\r\n", "\n")
        code = int(answer[1])
        with self.transcript.open("a") as file:
            file.write(f"# {code} after {time.monotonic() - begin:.1f} s: {command}\n{text}\n")
        if check and code != 0:
            pytest.fail(f"{command} exited {code}:\n{text}\n{self.journal()}")
        return Finished(code, text, "")

    def as_user(self, *argv: str, check: bool = True, limit: float = PATIENCE) -> Finished:
        """Run a program inside in a session of the user who sits at the computer.

        Its virtual terminal is the one in front, without which logind takes no session there for active.
        """
        environment = ["-EXDG_SESSION_CLASS=user", "-EXDG_SEAT=seat0", "-EXDG_VTNR=1", "-ELC_ALL=C.UTF-8"]
        unit = ["--quiet", "--pipe", "--wait", "--collect", f"--uid={USER}", "-pPAMName=login"]
        start = ["systemd-run", *unit, *environment, "--"]
        return self.run(*start, *argv, check=check, limit=limit)

    def as_nobody(self, *argv: str, check: bool = True, limit: float = PATIENCE) -> Finished:
        """Run a program inside as the user, but in no session."""
        become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--"]
        return self.run(*become, *argv, check=check, limit=limit)

    def journal(self, *arguments: str) -> str:
        """The end of the journal of this boot, or what ``arguments`` choose of it."""
        chosen = arguments or ("--boot", "--lines=80")
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *chosen, check=False).out

    def collect(self, error: BaseException) -> None:
        """Keep screen, console, journal and what was run in a directory that ``error`` names from then on.

        A guest that takes no commands any more is switched off for that.
        """
        place = self.directory / "failure"
        if place.exists():
            return
        place.mkdir()
        for file in (self.console, self.transcript):
            shutil.copy(file, place)
        with contextlib.suppress(OSError):
            screenshot(self._control, place / "screen.png")
        (place / "journal").write_text(self._whole_journal())
        error.add_note(f"screen, console, journal and transcript of the guest are in {place}")

    def _whole_journal(self) -> str:
        if self._line is not None:
            with contextlib.suppress(pytest.fail.Exception, OSError):
                return self.shell("journalctl --no-pager --output=short-precise", limit=PATIENCE).out
        self.pull_the_plug()
        try:
            return "" if self.disk_file is None else offline.journal(self.disk_file, self.directory)
        except (pytest.fail.Exception, ValueError, KeyError) as error:
            return f"it cannot be read from the disk: {error}\n"

    def console_of_boot(self) -> str:
        """What the console has shown since the last start."""
        return self.console.read_bytes()[self._boot_at :].decode(errors="replace")

    def _say(self, line: str) -> None:
        assert self._line is not None, "it does not run"
        self._line.sendall(line.encode() + b"\n")

    def _until(self, pattern: bytes, limit: float, what: str = "the boot") -> tuple[bytes, bytes]:
        """What is heard before ``pattern``, and its first group if it has one."""
        assert self._line is not None
        end = time.monotonic() + limit
        compiled = re.compile(pattern)
        while (found := compiled.search(self._heard)) is None:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._line], [], [], left)[0]:
                pytest.fail(f"{what} did not end in {limit:.0f} s:\n{self._last_words()}")
            data = self._line.recv(1 << 16)
            if not data:
                pytest.fail(f"the guest ended during {what}:\n{self._last_words()}")
            self._heard += data
        before, self._heard = self._heard[: found.start()], self._heard[found.end() :]
        return before, found[1] if compiled.groups else b""

    def _last_words(self) -> str:
        heard = self._heard[-2000:].decode(errors="replace")
        return f"{heard}\n--- console\n{self.console_of_boot()[-6000:]}"
