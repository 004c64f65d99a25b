"""The demo: the whole job end to end, on a private bus and a scratch root, without root privileges.

Starts a message bus and the daemon for itself, builds a sample OS image, and drives the daemon with
``hostimagectl`` as a user would, showing each command and its output, and checking what came of it. Ends with
a summary of what was done; everything it made is removed, unless ``--keep`` says otherwise. Exit code 0 if
all went as it should.

usage: run.py [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A socket's path may have 107 bytes, and ours end in /hostimaged-demo-XXXXXXXX/notify.
_LONGEST_DIRECTORY: Final = 75
_START_TIMEOUT: Final = 20.0
_STOP_TIMEOUT: Final = 10.0
_COMMAND_TIMEOUT: Final = 120.0
_NOT_FOUND: Final = 22
_PACKAGES: Final = ("hostimaged", "hostimagectl", "hostimage_dbus", "zstandard")
_BOOT_ID: Final = "0d5a3b6e-5f0e-4a53-9d0e-7f6b3a1c2d4e"

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


class DemoFailed(Exception):
    """Something did not go as it should."""


@dataclass
class Report:
    """What the summary tells."""

    commands: int = 0
    checks: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class Scratch:
    """The scratch root: a host made of plain files, and everything else that the demo makes."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(parent) > _LONGEST_DIRECTORY:
            parent = "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="hostimaged-demo-", dir=parent))
        self.root = self.path / "root"
        self.image = self.path / "image"
        self.log = self.path / "hostimaged.log"
        self._write("etc/hostimaged.toml", 'verity = "opportunistic"\n')
        self._write("etc/containers/policy.json", '{"default": [{"type": "insecureAcceptAnything"}]}\n')
        self._write("etc/containers/registries.conf", "")
        self._write("proc/sys/kernel/random/boot_id", _BOOT_ID + "\n")
        (self.root / "sysroot").mkdir()

    @property
    def repository(self) -> Path:
        """The composefs repository that the first pull makes."""
        return self.root / "sysroot/composefs"

    def size(self) -> int:
        """Bytes on disk of the repository."""
        return sum(path.lstat().st_blocks * 512 for path in self.repository.rglob("*"))

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> int:
    """Run the demo and give the exit code."""
    parser = argparse.ArgumentParser(
        description="Show hostimaged at work on a private bus and a scratch root."
    )
    parser.add_argument("--keep", action="store_true", help="keep the scratch directory and say where it is")
    arguments = parser.parse_args()
    check_requirements()
    signal.signal(signal.SIGTERM, _terminated)
    report = Report()
    scratch = Scratch()
    try:
        with ExitStack() as stack:
            demo = Demo(scratch, report, stack)
            demo.run()
    except DemoFailed as error:
        print(f"\nThe demo FAILED: {error}", flush=True)
        _show_log(scratch.log)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was interrupted.", flush=True)
        return 130
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch.path)
    summary(report, scratch, kept=arguments.keep)
    return 0


def check_requirements() -> None:
    """Name everything that is missing, and leave."""
    missing = [f"the program {name}" for name in ("dbus-daemon",) if shutil.which(name) is None]
    missing += [f"the Python package {name}" for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}; 'make demo' installs what it can.")


class Demo:
    """The steps; processes are ended by ``stack``."""

    def __init__(self, scratch: Scratch, report: Report, stack: ExitStack) -> None:
        self._scratch = scratch
        self._report = report
        self._stack = stack
        self._environment = dict(os.environ)

    def run(self) -> None:
        """Every step in turn; raises ``DemoFailed``."""
        from sample_image import build

        heading("A sample OS image, two versions of it, in an OCI image layout")
        first = build(self._scratch.image, version="1")
        second = build(self._scratch.image, version="2")
        for layer in first.layers:
            print(
                f"  layer {layer.title:<10} {layer.compression:<5} {layer.size / 2**20:6.1f} MiB", flush=True
            )

        heading("A private bus, and the daemon on a scratch root")
        self._start_bus()
        self._start_daemon()

        heading("Pull the image: fetched, verified, stored, turned into a composefs image")
        self._ctl("pull", first.reference)
        rows = self._images()
        self._check("the image is listed with its digest", _row(rows, first.manifest_digest) is not None)
        self._check("its version is known", _value(rows, first.manifest_digest, "version") == "1")

        heading("What the repository holds now")
        self._ctl("images")
        self._ctl("status")

        heading("Pull again: nothing to do")
        self._ctl("pull", first.reference)
        again = self._json("pull", first.reference)
        self._check("a third pull, asked for JSON, changed nothing", again["result"]["changed"] is False)
        self._check("and read no layer", again["job"]["bytesDone"] < 100_000)

        heading("The next version shares all layers but one")
        update = self._json("pull", "--expect-digest", second.manifest_digest, second.reference, show=True)
        job = update["job"]
        shared = sum(layer.size for layer in first.layers[:-1])
        self._check("the shared layers were not read again", job["bytesCached"] >= shared)
        self._check("the update is the one that was expected", len(self._images()) == 2)

        heading("What goes wrong says so, and has its own exit code")
        self._ctl("pull", f"oci:{self._scratch.image}:no-such-version", code=_NOT_FOUND)

        heading("The end")
        status = self._json("status")
        self._check("no problems, nothing left running", status["problems"] == [] and status["jobs"] == [])
        self._check_with_cfsctl()

    def _start_bus(self) -> None:
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

    def _start_daemon(self) -> None:
        """Start hostimaged and wait until it says, as to systemd, that it is ready."""
        path = self._scratch.path / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            argv = [sys.executable, "-m", "hostimaged", "--root", str(self._scratch.root)]
            daemon = self._spawn("hostimaged", argv, NOTIFY_SOCKET=str(path))
            notify.settimeout(0.2)
            deadline = time.monotonic() + _START_TIMEOUT
            while time.monotonic() < deadline:
                if daemon.poll() is not None:
                    raise DemoFailed(f"hostimaged ended with exit code {daemon.returncode}")
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
        raise DemoFailed("hostimaged was not ready in time")

    def _spawn(
        self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process that lives as long as the demo."""
        _print_command(argv)
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

    def _ctl(self, *arguments: str, code: int = 0) -> None:
        """Run a command as a user sees it."""
        _print_command(["hostimagectl", *arguments])
        self._finished(self._client(arguments), arguments, code)
        if code:
            print(f"  (exit code {code})", flush=True)

    def _json(self, *arguments: str, show: bool = False) -> dict[str, Any]:
        """The JSON result of a command; progress is shown if ``show``."""
        arguments = (*arguments, "--json") if show else (*arguments, "--json", "--quiet")
        if show:
            _print_command(["hostimagectl", *arguments])
        done = self._client(arguments, stdout=subprocess.PIPE)
        self._finished(done, arguments, 0)
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def _images(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._json("images")["images"]
        return rows

    def _client(
        self, arguments: Sequence[str], stdout: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        self._report.commands += 1
        try:
            return subprocess.run(
                [sys.executable, "-m", "hostimagectl", *arguments],
                check=False,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                text=True,
                timeout=_COMMAND_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"'hostimagectl {shlex.join(arguments)}' did not end in time") from None

    def _finished(
        self, done: subprocess.CompletedProcess[str], arguments: Sequence[str], expected: int
    ) -> None:
        if done.returncode != expected:
            command = f"hostimagectl {shlex.join(arguments)}"
            raise DemoFailed(f"'{command}' ended with exit code {done.returncode}, expected {expected}")

    def _check_with_cfsctl(self) -> None:
        """Where composefs-rs's own tool is installed, it judges the repository."""
        if shutil.which("cfsctl") is None:
            print("  (cfsctl, composefs-rs's own tool, is not installed: its check is left out)", flush=True)
            return
        argv = ["cfsctl", "--insecure", "--repo", str(self._scratch.repository), "fsck"]
        _print_command(argv)
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
        self._check("cfsctl accepts the repository", done.returncode == 0)

    def _check(self, what: str, truth: bool) -> None:
        if not truth:
            raise DemoFailed(f"not true: {what}")
        self._report.checks.append(what)
        print(f"  checked: {what}", flush=True)


def _row(rows: list[dict[str, Any]], digest: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["manifest-digest"] == digest), None)


def _value(rows: list[dict[str, Any]], digest: str, key: str) -> object:
    return (_row(rows, digest) or {}).get(key)


def summary(report: Report, scratch: Scratch, *, kept: bool) -> None:
    """Say what was done, made and removed."""
    seconds = time.monotonic() - report.started
    heading("Summary")
    print(f"  {report.commands} commands run, {len(report.checks)} results checked, {seconds:.0f} seconds.")
    print("  Started and ended: a private dbus-daemon, hostimaged and its workers.")
    if kept:
        print(f"  Kept: {scratch.path}")
        print(f"        the repository is {scratch.repository}, the daemon's log {scratch.log}")
    else:
        print(f"  Created and removed: {scratch.path} (image, scratch root, repository, logs).")
    print("  Nothing else was touched: no system bus, no system directory.", flush=True)


def heading(text: str) -> None:
    """A title above what follows."""
    print(f"\n=== {text}", flush=True)


def _print_command(argv: Sequence[str]) -> None:
    words = ["python" if word == sys.executable else word for word in argv]
    print(f"$ {shlex.join(words)}", flush=True)


def _show_log(log: Path) -> None:
    if log.exists() and log.stat().st_size:
        print("The end of the daemon's log:")
        for line in log.read_text(errors="replace").splitlines()[-30:]:
            print(f"  {line}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _terminated(number: int, frame: object) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
