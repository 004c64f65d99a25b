"""The programs of the demo: a private bus, the daemon, and the commands that a person would type."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from report import DemoFailed, Report, print_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from scratch import Scratch

_START_TIMEOUT: Final = 20.0
_STOP_TIMEOUT: Final = 10.0
_COMMAND_TIMEOUT: Final = 120.0

_BUS_CONFIGURATION: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


#: Mounts for podman, which go with it: nothing of the machine's containers, and the store ($0).
_MOUNTS: Final = """\
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm &&
mkdir /run/store && mount --bind "$0" /run/store && exec "$@"
"""


class Programs:
    """Runs programs for the scratch root; those that stay are ended by ``stack``."""

    def __init__(self, scratch: Scratch, report: Report, stack: ExitStack) -> None:
        self._scratch = scratch
        self._report = report
        self._stack = stack
        self._environment = dict(os.environ)
        self._daemon: subprocess.Popen[bytes] | None = None

    def start_bus(self) -> None:
        """A message bus of our own."""
        configuration = self._scratch.path / "bus.conf"
        configuration.write_text(_BUS_CONFIGURATION.format(socket=self._scratch.path / "bus"))
        reader, writer = os.pipe()
        try:
            argv = ["dbus-daemon", f"--config-file={configuration}", "--nofork", f"--print-address={writer}"]
            self._spawn("dbus-daemon", argv, pass_fds=(writer,))
            os.close(writer)
            writer = -1
            if not select.select([reader], [], [], _START_TIMEOUT)[0]:
                raise DemoFailed("dbus-daemon did not start in time")
            address = os.read(reader, 4096).decode().strip()
        finally:
            for descriptor in (reader, writer):
                if descriptor >= 0:
                    os.close(descriptor)
        if not address:
            raise DemoFailed("dbus-daemon did not start")
        self._environment["DBUS_SYSTEM_BUS_ADDRESS"] = address

    def start_daemon(self) -> None:
        """Start hostimaged and wait until it says, as to systemd, that it is ready."""
        path = self._scratch.path / "notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            argv = [sys.executable, "-m", "hostimaged", "--root", str(self._scratch.root)]
            self._daemon = self._spawn("hostimaged", argv, NOTIFY_SOCKET=str(path))
            notify.settimeout(0.2)
            deadline = time.monotonic() + _START_TIMEOUT
            while time.monotonic() < deadline:
                if self._daemon.poll() is not None:
                    raise DemoFailed(f"hostimaged ended with exit code {self._daemon.returncode}")
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
        raise DemoFailed("hostimaged was not ready in time")

    def stop_daemon(self) -> None:
        """End hostimaged, as systemd does at shutdown."""
        if self._daemon is not None:
            _stop(self._daemon)
            self._daemon = None

    def hostimaged(self, *arguments: str) -> None:
        """Run a command of ``hostimaged`` that needs no bus."""
        self._report.commands += 1
        print_command(["hostimaged", *arguments])
        self._run([sys.executable, "-m", "hostimaged", *arguments], 0)

    def ctl(self, *arguments: str, code: int = 0) -> None:
        """Run ``hostimagectl`` as a user sees it; ``code`` is the exit code that is right."""
        print_command(["hostimagectl", *arguments])
        self._client(arguments, code)
        if code:
            print(f"  (exit code {code})", flush=True)

    def json(self, *arguments: str, show: bool = False) -> dict[str, Any]:
        """The JSON result of a ``hostimagectl`` command; its progress is shown if ``show``."""
        arguments = (*arguments, "--json") if show else (*arguments, "--json", "--quiet")
        if show:
            print_command(["hostimagectl", *arguments])
        document: dict[str, Any] = json.loads(self._client(arguments, 0, stdout=subprocess.PIPE))
        return document

    def cfsctl_accepts(self) -> bool | None:
        """Whether composefs-rs's own tool finds the repository in order; None if it is not installed."""
        if shutil.which("cfsctl") is None:
            return None
        argv = ["cfsctl", "--insecure", "--repo", str(self._scratch.repository), "fsck"]
        print_command(argv)
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT,
        )
        if done.returncode:
            print(done.stdout + done.stderr, flush=True)
        return done.returncode == 0

    @staticmethod
    def can_run_containers() -> bool:
        """Whether there is all that ``container`` needs; the program in the sample image is for x86-64."""
        able = os.geteuid() == 0 and platform.machine() == "x86_64"
        return able and all(map(shutil.which, ("podman", "runc", "unshare")))

    def container(self, image: str, *command: str) -> str:
        """What ``command`` prints in a container of an image of the store of the host.

        podman has a store of its own here, in memory, and takes that of the host as an additional one.
        """
        arguments = [
            "podman", "--root", "/run/own", "--runroot", "/run/own-run", "--storage-driver", "overlay",
            "--storage-opt", "additionalimagestore=/run/store",
            "run", "--rm", "--pull=never", "--runtime", "runc", "--network", "none",
            "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", image, *command,
        ]  # fmt: skip
        print_command(arguments)
        store = self._scratch.repository / "bootc/storage"
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS, str(store), *arguments]
        return self._run(argv, 0, stdout=subprocess.PIPE)

    def _spawn(
        self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process that lives as long as the demo, unless it is stopped before."""
        print_command(argv)
        with self._scratch.log.open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                # Ctrl-C is for the demo, which ends its processes in order.
                start_new_session=True,
            )
        self._stack.callback(_stop, process)
        print(f"  {name} runs as process {process.pid}", flush=True)
        return process

    def _client(self, arguments: Sequence[str], code: int, stdout: int | None = None) -> str:
        self._report.commands += 1
        return self._run([sys.executable, "-m", "hostimagectl", *arguments], code, stdout)

    def _run(self, argv: Sequence[str], code: int, stdout: int | None = None) -> str:
        """Run a program to its end and give its output, if it was asked for."""
        typed = shlex.join(argv[2:])
        try:
            done = subprocess.run(
                argv,
                check=False,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                text=True,
                timeout=_COMMAND_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"'{typed}' did not end in time") from None
        if done.returncode != code:
            raise DemoFailed(f"'{typed}' ended with exit code {done.returncode}, expected {code}")
        return done.stdout or ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
