"""The command line as a whole: parsing, exit codes, streams that break, start-up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, EXIT_FAILURE, EXIT_NO_SERVICE, EXIT_OK, EXIT_USAGE, ErrorName
from hostimage_dbus.names import job_path
from hostimage_dbus.transport import BusError
from hostimagectl import __version__, catalog, cli, service
from hostimagectl.service import Service

COMMANDS = [command.name for command in catalog.COMMANDS]


def ctl(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the client as its own process, without a bus unless the environment names one."""
    environment = (
        os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus"} | options.pop("env", {})
    )
    return subprocess.run(
        [sys.executable, "-m", "hostimagectl", *arguments],
        check=False,
        text=True,
        env=environment,
        timeout=60,
        stdin=subprocess.DEVNULL,
        **({"capture_output": True} | options),
    )


class Script:
    """What the fake daemon of ``run_main`` does: errors of calls by member, and how a pull ends."""

    def __init__(self) -> None:
        self.errors: dict[str, BusError] = {}
        self.end = ("done", "", "")


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, script: Script, make_bus: Any) -> Callable[..., int]:
    """Run the command line in this process against a fake daemon."""

    @asynccontextmanager
    async def connect(*, ask: bool = True) -> AsyncIterator[Service]:
        bus = make_bus()
        bus.errors = script.errors

        async def end() -> None:
            bus.end(job_path(1), *script.end)

        bus.on_pull = end
        yield Service(bus)

    monkeypatch.setattr(service, "connect", connect)
    return lambda *argv: cli.main(argv)


def test_version() -> None:
    done = ctl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hostimagectl {__version__}\n", "")


def test_the_version_is_that_of_the_package() -> None:
    import tomllib

    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == __version__


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([*filter(None, [command]), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "JSON" in text or command == "completion"
    assert max(map(len, text.splitlines())) <= 80


def test_help_of_the_program_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_every_command_has_its_module() -> None:
    found = {path.stem for path in (Path(cli.__file__).parent / "commands").glob("[a-z]*.py")}
    assert found == {command.module for command in catalog.COMMANDS}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["pull", "a", "b"],
        ["cancel"],
        ["cancel", "x"],
        ["cancel", "0"],
        ["cancel", "-1"],
        ["cancel", "٣"],
        ["cancel", str(2**64)],
        ["cancel", "9" * 5000],
        ["images", "--expect-digest", "x"],
        ["pull", "--expect", "x"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == EXIT_USAGE
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--json", "images"], ["images", "--json"]])
def test_output_options_may_stand_before_or_after_the_command(
    argv: list[str], run_main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*argv) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == {"images": []}


@pytest.mark.parametrize("name", list(ErrorName))
def test_exit_code_of_each_error_of_a_call(
    name: ErrorName, run_main: Any, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.errors["Pull"] = BusError(name, "because")
    assert run_main("pull", "oci:/i") == EXIT_CODES[name]
    captured = capsys.readouterr()
    assert captured.err.startswith("hostimagectl: because\n")
    assert captured.out == ""


@pytest.mark.parametrize("name", list(ErrorName))
def test_exit_code_of_each_error_of_a_job(name: ErrorName, run_main: Any, script: Script) -> None:
    script.end = ("failed", name, "because")
    assert run_main("pull", "--quiet", "oci:/i") == EXIT_CODES[name]


@pytest.mark.parametrize("command", [["pull", "oci:/i"], ["images"], ["status"], ["jobs"], ["cancel", "3"]])
def test_a_failure_in_json(command: list[str], run_main: Any, script: Script, capsys: Any) -> None:
    member = {"pull": "Pull", "images": "ListImages", "status": "GetStatus", "jobs": "ListJobs"}
    script.errors[member.get(command[0], "Cancel")] = BusError(ErrorName.ACCESS_DENIED, "no")
    assert run_main(*command, "--json") == EXIT_CODES[ErrorName.ACCESS_DENIED]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"name": ErrorName.ACCESS_DENIED, "message": "no"}}
    assert captured.err.startswith("hostimagectl: no\nhint: changing the host is for root")


def test_no_bus() -> None:
    done = ctl("images", "--json")
    assert done.returncode == EXIT_NO_SERVICE
    assert "error" in json.loads(done.stdout)
    assert done.stderr.startswith("hostimagectl: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["nonsense", "tcp:host=x", "unix:", "unix:path=", "", "unix:path=\x01"])
def test_odd_bus_addresses(address: str) -> None:
    done = ctl("images", env={"DBUS_SYSTEM_BUS_ADDRESS": address or ";"})
    assert done.returncode == EXIT_NO_SERVICE
    assert "Traceback" not in done.stderr


def test_a_bus_that_hangs_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen(1)
        process = subprocess.Popen(
            [sys.executable, "-m", "hostimagectl", "status"],
            env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/bus"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        peer, _ = listener.accept()
        peer.close()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (EXIT_NO_SERVICE, "")
    assert err.startswith("hostimagectl: the connection to the bus is lost")


def test_interrupted_before_there_is_a_job(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen(1)
        process = subprocess.Popen(
            [sys.executable, "-m", "hostimagectl", "pull", "oci:/i"],
            env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/bus"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        peer, _ = listener.accept()
        with peer:
            peer.recv(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = ctl("images", "--json", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.returncode == cli.EXIT_BROKEN_PIPE
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = ctl("images", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == EXIT_FAILURE
    assert done.stderr.endswith("hostimagectl: cannot write the result: No space left on device\n")


def test_closed_streams() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m hostimagectl images >&- 2>&-', sys.executable],
        check=False,
        env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus"},
        timeout=60,
    )
    assert done.returncode == EXIT_NO_SERVICE


def test_text_that_the_locale_cannot_show() -> None:
    code = "from hostimagectl.output import *; prepare_streams(); Console().line('日')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert done.stdout == b"\\u65e5\n"


def test_a_fault_of_ours_is_one_line(
    monkeypatch: pytest.MonkeyPatch, run_main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from hostimagectl.commands import images

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oops\x1b")

    monkeypatch.setattr(images, "show", broken)
    assert run_main("images") == EXIT_FAILURE
    assert capsys.readouterr().err == (
        "hostimagectl: internal error: ZeroDivisionError: oops\\x1b\nhint: please report this\n"
    )


def _modules_after(*argv: str) -> set[str]:
    code = (
        "import sys\n"
        "from hostimagectl.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus"},
        timeout=60,
    )
    return {name.split(".")[0] for name in done.stderr.splitlines()}


def test_help_imports_next_to_nothing() -> None:
    assert not _modules_after("--help") & {
        "asyncio",
        "dbus_next",
        "dbus_fast",
        "rich",
        "pydantic",
        "structlog",
    }


@pytest.mark.parametrize("argv", [["pull", "oci:/i"], ["images"], ["status"], ["jobs"], ["cancel", "1"]])
def test_commands_import_nothing_heavy(argv: list[str]) -> None:
    assert not _modules_after(*argv) & {"rich", "pydantic", "structlog", "zstandard", "hostimaged"}


@pytest.mark.slow
def test_start_is_as_fast_as_the_library_allows(tmp_path: Path) -> None:
    """At most 1.5 times the import of dbus-next, until the bus is asked for; best of three medians."""
    pytest.importorskip("dbus_next")
    environment = os.environ | {
        "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus",
        # Installed programs have their bytecode.
        "PYTHONPYCACHEPREFIX": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "",
    }

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment)
        return time.perf_counter() - start

    peer = "import dbus_next.aio"
    ours = "import sys; from hostimagectl.cli import main; sys.exit(main(['images']))"
    seconds(peer), seconds(ours)
    medians: list[float] = []
    for _ in range(3):
        medians.append(statistics.median(seconds(ours) / seconds(peer) for _ in range(7)))
        if medians[-1] <= 1.5:
            return
    pytest.fail(f"the client starts {min(medians):.2f} times as slowly as dbus-next is imported")


def test_asyncio_is_left_clean(run_main: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run_main("pull", "-q", "oci:/i") == EXIT_OK
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
