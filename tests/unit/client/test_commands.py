"""What the commands print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.names import job_path
from hostimage_dbus.transport import BusError, Variant
from hostimagectl.catalog import find
from hostimagectl.command import JobCommand
from hostimagectl.commands import cancel, images, job, jobs, status
from hostimagectl.failure import Failure
from hostimagectl.image import absolute
from hostimagectl.job import Job, JobError
from hostimagectl.outcome import failure_of
from hostimagectl.parser import parser

PATH = job_path(1)
# Made here: it reads translations, which a test of asynchronous code must not.
PARSER = parser()
DIGEST = "sha256:" + "ab" * 32
SOURCE = "sha256:" + "cd" * 32
RESULT = {
    "manifest-digest": Variant("s", DIGEST),
    "source-digest": Variant("s", DIGEST),
    "config-digest": Variant("s", DIGEST),
    "tag": Variant("s", "localhost/hostimaged-pull-" + DIGEST),
    "version": Variant("s", "42.1"),
    "image-ids": Variant("as", ["11" * 64]),
    "changed": Variant("b", True),
}
JOB_KEYS = [
    "id",
    "path",
    "kind",
    "target",
    "state",
    "phase",
    "progress",
    "bytesDone",
    "bytesTotal",
    "bytesCached",
    "rate",
    "eta",
    "message",
    "cancellable",
    "holdReasons",
    "created",
    "started",
    "finished",
]


async def pull(daemon: Any, console: Any, *argv: str) -> int:
    command = find("pull")
    assert isinstance(command, JobCommand)
    return await job.start(daemon, command, PARSER.parse_args(["pull", *argv]), console)


def done(bus: Any, **properties: Any) -> Any:
    async def end() -> None:
        sizes = {"BytesTotal": 3 << 20, "BytesCached": 1 << 20, "BytesDone": 2 << 20}
        bus.end(PATH, "done", **({"Result": RESULT} | sizes | properties))

    return end


async def test_pull_tells_the_result(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus)
    console = make_console()
    assert await pull(daemon, console, "oci:/i") == 0
    assert console.out.splitlines() == [
        "pulled oci:/i: 2.0 MiB transferred, 1.0 MiB were there already",
        f"  Manifest: {DIGEST}",
        "  Version:  42.1",
        f"  Tag:      localhost/hostimaged-pull-{DIGEST}",
    ]


async def test_pull_tells_a_source_digest_that_differs(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus, Result=RESULT | {"source-digest": Variant("s", SOURCE)})
    console = make_console()
    await pull(daemon, console, "oci:/i")
    assert f"Source digest: {SOURCE}" in console.out


async def test_pull_tells_what_became_of_files_of_a_store(bus: Any, daemon: Any, make_console: Any) -> None:
    sizes = {"bytes-reflinked": 0, "bytes-linked": 5 << 20, "bytes-copied": 1 << 10}
    bus.on_pull = done(bus, Result=RESULT | {key: Variant("t", value) for key, value in sizes.items()})
    console = make_console()
    await pull(daemon, console, "containers-storage:localhost/i")
    assert console.out.splitlines()[-1] == "  From storage: 5.0 MiB linked, 1.0 KiB copied"


async def test_pull_says_when_there_was_nothing_to_do(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus, Result=RESULT | {"changed": Variant("b", False)})
    console = make_console()
    assert await pull(daemon, console, "oci:/i") == 0
    assert console.out.startswith("nothing to do, already there: oci:/i\n")


async def test_pull_json(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus)
    console = make_console(as_json=True)
    assert await pull(daemon, console, "oci:/i") == 0
    assert list(console.document) == ["job", "result", "error"]
    assert list(console.document["job"]) == JOB_KEYS
    assert console.document["job"]["state"] == "done"
    assert console.document["result"] == {name: value.value for name, value in RESULT.items()}
    assert console.document["error"] is None


async def test_pull_quiet_is_the_digest_alone(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus)
    console = make_console(quiet=True)
    assert await pull(daemon, console, "oci:/i") == 0
    assert (console.out, console.errors) == (DIGEST + "\n", "")


async def test_pull_options(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus)
    await pull(daemon, make_console(), "--no-queue", "--expect-digest", DIGEST)
    member, _, (image, options) = next(call for call in bus.calls if call[0] == "Pull")
    assert (member, image) == ("Pull", "")
    assert {name: (value.signature, value.value) for name, value in options.items()} == {
        "client-id": ("s", "hostimagectl"),
        "expect-digest": ("s", DIGEST),
        "queue": ("b", False),
    }


async def test_pull_sends_no_option_that_was_not_given(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_pull = done(bus)
    await pull(daemon, make_console(), "oci:/i")
    _, _, (_, options) = next(call for call in bus.calls if call[0] == "Pull")
    assert list(options) == ["client-id"]


@pytest.mark.parametrize(
    "name", [ErrorName.DIGEST_MISMATCH, ErrorName.NO_SPACE, ErrorName.SIGNATURE_REJECTED]
)
@pytest.mark.parametrize("as_json", [False, True])
async def test_pull_fails_with_the_exit_code_of_the_error(
    bus: Any, daemon: Any, make_console: Any, name: ErrorName, as_json: bool
) -> None:
    async def fail() -> None:
        bus.end(PATH, "failed", name, "because of \x1b[2J")

    bus.on_pull = fail
    console = make_console(as_json=as_json)
    assert await pull(daemon, console, "oci:/i") == EXIT_CODES[name]
    assert "hostimagectl: because of \\x1b[2J\n" in console.errors
    assert "\x1b" not in console.errors + console.out
    if as_json:
        assert console.document["result"] is None
        assert console.document["error"] == {"name": name, "message": "because of \x1b[2J"}
    else:
        assert console.out == ""


async def interrupted_pull(bus: Any, daemon: Any, console: Any, times: int = 1) -> int:
    task = asyncio.create_task(pull(daemon, console, "oci:/i"))
    await bus.called("GetAll")
    for number in range(times):
        signal.raise_signal(signal.SIGINT)
        await bus.called("Cancel", 1 if number == 0 else 0)
    return await task


async def test_pull_cancelled_by_the_user(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_cancel = lambda path: bus.end(path, "cancelled", ErrorName.CANCELLED, "cancelled")
    console = make_console()
    assert await interrupted_pull(bus, daemon, console) == EXIT_CODES[ErrorName.CANCELLED]
    assert "cancelling job 1" in console.errors
    assert console.errors.endswith("hostimagectl: job 1 was cancelled\n")


async def test_pull_that_finished_in_spite_of_the_user(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.on_cancel = lambda path: bus.end(path, "done", Result=RESULT)
    console = make_console()
    assert await interrupted_pull(bus, daemon, console) == 0
    assert "it finished before it could be cancelled" in console.errors
    assert DIGEST in console.out


async def test_pull_left_by_the_user(bus: Any, daemon: Any, make_console: Any) -> None:
    console = make_console()
    assert await interrupted_pull(bus, daemon, console, times=2) == 130
    assert "job 1 goes on ('hostimagectl cancel 1' stops it)" in console.errors
    assert console.out == ""


def test_a_job_that_ended_oddly_is_a_failure() -> None:
    failure = failure_of(Job(id=4, path="/x", state="failed"))
    assert failure is not None
    assert failure.message == "job 4 ended as failed"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("oci:image", "oci:{cwd}/image"),
        ("oci:image:tag", "oci:{cwd}/image:tag"),
        ("oci:../image:a/b", "oci:{parent}/image:a/b"),
        ("oci-archive:./a.tar:x", "oci-archive:{cwd}/a.tar:x"),
        ("docker-archive:a.tar", "docker-archive:{cwd}/a.tar"),
        ("dir:d/e", "dir:{cwd}/d/e"),
        ("dir:.", "dir:{cwd}"),
        ("oci:/abs/../x", "oci:/abs/../x"),
        ("oci:", "oci:"),
        ("oci::tag", "oci::tag"),
        ("docker://registry.example/os:1", "docker://registry.example/os:1"),
        ("containers-storage:localhost/os", "containers-storage:localhost/os"),
        ("image", "image"),
        ("OCI:image", "OCI:image"),
        ("", ""),
    ],
)
def test_relative_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, sent: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(given) == sent.format(cwd=tmp_path, parent=tmp_path.parent)


def test_a_directory_that_a_reference_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    assert absolute("oci:/elsewhere") == "oci:/elsewhere"
    with pytest.raises(Failure) as caught:
        absolute("oci:image")
    assert caught.value.code == EXIT_CODES[ErrorName.INVALID_ARGS]


def test_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(Failure, match="gone"):
        absolute("dir:image")


ROW = {
    "tag": Variant("s", "localhost/x"),
    "manifest-digest": Variant("s", DIGEST),
    "version": Variant("s", "1\x1b[0m"),
    "size": Variant("t", 5 << 20),
    "pulled": Variant("t", 1_700_000_000),
    "reference": Variant("s", "docker://registry.example/os:1"),
    "artifact": Variant("b", False),
    "deployed": Variant("b", True),
}


async def rows(bus: Any, daemon: Any, *given: dict[str, Variant]) -> list[dict[str, object]]:
    bus.images = list(given)
    found: list[dict[str, object]] = await daemon.images()
    return found


async def test_images_table(bus: Any, daemon: Any, make_console: Any) -> None:
    console = make_console()
    images.show(await rows(bus, daemon, ROW, {"problem": Variant("s", "manifest is damaged")}), console)
    heading, first, second, problem = console.out.splitlines()
    assert heading.split() == ["IMAGE", "VERSION", "SIZE", "PULLED", "DIGEST"]
    assert first.startswith("docker://registry.example/os:1 (deployed)  1\\x1b[0m  5.0 MiB  2023-11-")
    assert first.endswith("  sha256:abababababab")
    assert second.split() == ["-"] * 5
    assert problem == "problem of -: manifest is damaged"


async def test_a_problem_names_its_image_harmlessly(bus: Any, daemon: Any, make_console: Any) -> None:
    console = make_console()
    row = {"tag": Variant("s", "x\x1b]0;y"), "problem": Variant("s", "bad\x07")}
    images.show(await rows(bus, daemon, row), console)
    assert console.out.splitlines()[-1] == "problem of x\\x1b]0;y: bad\\x07"


async def test_images_json_has_every_key(bus: Any, daemon: Any, make_console: Any) -> None:
    console = make_console(as_json=True)
    images.show(await rows(bus, daemon, ROW, {}), console)
    first, second = console.document["images"]
    assert list(first) == list(second) == list(images.KEYS)
    assert (first["size"], first["deployed"], first["image-ids"]) == (5 << 20, True, None)
    assert set(second.values()) == {None}


async def test_images_quiet_lists_each_digest_once(bus: Any, daemon: Any, make_console: Any) -> None:
    console = make_console(quiet=True)
    images.show(await rows(bus, daemon, ROW, {}, ROW), console)
    assert console.out == DIGEST + "\n"


async def test_no_images(bus: Any, daemon: Any, make_console: Any) -> None:
    for options, out, errors in (
        ({}, "", "no images\n"),
        ({"quiet": True}, "", ""),
        ({"as_json": True}, '{\n  "images": []\n}\n', ""),
    ):
        console = make_console(**options)
        images.show(await rows(bus, daemon), console)
        assert (console.out, console.errors) == (out, errors)


async def test_jobs(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.add_job(
        State="running", Phase="pulling", Target="oci:/i", Progress=0.5, Started=1_700_000_000_000_000
    )
    bus.add_job(Target="oci:/j")
    found = await jobs.collect(daemon)
    console = make_console()
    jobs.show(found, console)
    heading, first, second = console.out.splitlines()
    assert heading.split() == ["ID", "KIND", "STATE", "TARGET", "SINCE", "PROGRESS"]
    assert first.split()[:4] == ["1", "pull", "pulling", "oci:/i"]
    assert first.endswith("50%")
    assert second.split() == ["2", "pull", "queued", "oci:/j", "-", "-"]

    console = make_console(as_json=True)
    jobs.show(found, console)
    assert [list(row) for row in console.document["jobs"]] == [JOB_KEYS, JOB_KEYS]
    assert console.document["jobs"][1]["progress"] is None

    console = make_console(quiet=True)
    jobs.show(found, console)
    assert console.out == "1\n2\n"


async def test_a_job_that_ends_while_it_is_listed_is_left_out(bus: Any, daemon: Any) -> None:
    bus.add_job()
    bus.errors["GetAll"] = BusError(ErrorName.UNKNOWN_OBJECT, "gone")
    assert await jobs.collect(daemon) == []


async def test_no_jobs(make_console: Any) -> None:
    console = make_console()
    jobs.show([], console)
    assert (console.out, console.errors) == ("", "no jobs\n")


@pytest.mark.parametrize(
    ("state", "code", "text"),
    [
        ("cancelled", 0, "job 1 was cancelled\n"),
        ("failed", 0, "job 1 failed: because\n"),
        ("done", EXIT_CODES[ErrorName.JOB_NOT_CANCELLABLE], ""),
    ],
)
async def test_cancel_tells_what_became_of_the_job(
    bus: Any, daemon: Any, make_console: Any, state: str, code: int, text: str
) -> None:
    bus.add_job(State="running")
    name = ErrorName.NETWORK if state == "failed" else ""
    bus.on_cancel = lambda path: bus.end(path, state, name, "because" if name else "")
    console = make_console()
    assert await cancel.cancel(daemon, 1, console, wait=True) == code
    assert console.out == text
    if code:
        assert "finished before it could be cancelled" in console.errors


async def test_cancel_waits(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.add_job(State="running")
    console = make_console(as_json=True)
    task = asyncio.create_task(cancel.cancel(daemon, 1, console, wait=True))
    await bus.called("GetAll")
    assert not task.done()
    bus.end(PATH, "cancelled", ErrorName.CANCELLED, "cancelled")
    assert await task == 0
    assert list(console.document) == ["job", "error"]
    assert (console.document["job"]["state"], console.document["error"]) == ("cancelled", None)


async def test_cancel_without_waiting(bus: Any, daemon: Any, make_console: Any) -> None:
    bus.add_job(State="running")
    console = make_console()
    assert await cancel.cancel(daemon, 1, console, wait=False) == 0
    assert console.out == "job 1 is being cancelled\n"


async def test_cancel_of_an_unknown_job(bus: Any, daemon: Any, make_console: Any) -> None:
    with pytest.raises(Failure) as caught:
        await cancel.cancel(daemon, 5, make_console(), wait=True)
    assert caught.value.code == EXIT_CODES[ErrorName.UNKNOWN_OBJECT]


def test_cancel_without_a_reason() -> None:
    assert cancel._reason(Job(id=1, path="/x")) == ""
    assert cancel._reason(Job(id=1, path="/x", error=JobError("a", "b\n"))) == ": b\\n"


STATUS: dict[str, Any] = {
    "schema": 1,
    "daemon": {"version": "0.1.0", "apiVersion": 1, "bootId": "x", "state": "pulling"},
    "repository": {"algorithm": "sha512", "formats": ["v1", "v2"], "secure": True, "used": 7 << 30},
    "trackedImage": "docker://registry.example/os:1",
    "images": [{"reference": "docker://registry.example/os:1", "manifest-digest": DIGEST}],
    "deployments": [],
    "jobs": [{"id": 3, "kind": "pull", "state": "running", "target": "oci:/i\x07"}],
    "results": [
        {
            "id": 2,
            "kind": "pull",
            "state": "failed",
            "target": "oci:/j",
            "finished": 1_700_000_000_000_000,
            "error": {"name": ErrorName.NETWORK, "message": "no route\x07"},
        }
    ],
    "problems": [{"id": "p", "severity": "warning", "text": "something is odd\x07"}],
}


def test_status_for_people(make_console: Any) -> None:
    console = make_console()
    status.show(STATUS, console)
    text = console.out
    for part in (
        "State:         pulling",
        "Tracked image: docker://registry.example/os:1",
        "sha512, v1+v2, fs-verity required, 7.0 GiB used",
        "hostimaged 0.1.0",
        DIGEST[:19],
        "oci:/i\\x07",
        "job 2: no route\\x07",
        "warning: something is odd\\x07",
    ):
        assert part in text
    assert "\x07" not in text


def test_status_tells_of_deployments_updates_and_holds(make_console: Any) -> None:
    console = make_console()
    more = {
        "deployments": [
            {"id": "cd" * 32, "booted": False, "staged": True},
            {"id": "ab" * 32, "booted": True, "pinned": True, "version": "42.1", "image": "docker://x\x1b"},
        ],
        "host": {"next": "cd" * 32, "soft-rebooted": True},
        "update": {"version": "42.2", "state": "available", "download-size": 3 << 20},
        "holds": [
            {"kind": "manual", "until": 1_700_000_000_000_000, "reason": "a fair\x07"},
            {"kind": "metered", "until": 0, "reason": ""},
        ],
    }
    status.show(STATUS | more, console)
    lines = [" ".join(line.split()) for line in console.out.splitlines()]
    assert "Update: 42.2 (available, 3.0 MiB to download)" in lines
    assert "abababababab booted, pinned 42.1 - - - docker://x\\x1b" in lines
    assert "cdcdcdcdcdcd staged - - - - -" in lines
    assert "Reboot: starts deployment cdcdcdcdcdcd, which is staged" in lines
    assert any(line.startswith("Note: the kernel was started for another") for line in lines)
    assert "Held: metered" in lines
    assert any(line.startswith("Held: manual until 2023-11-1") for line in lines)
    assert "\x07" not in console.out


def test_status_json_is_the_document(make_console: Any) -> None:
    console = make_console(as_json=True)
    status.show(STATUS, console)
    assert console.document == STATUS


def test_status_quiet_is_the_state(make_console: Any) -> None:
    console = make_console(quiet=True)
    status.show(STATUS, console)
    assert console.out == "pulling\n"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"daemon": [], "repository": None, "images": {}, "jobs": [1], "results": "x", "problems": [[]]},
        {"deployments": [{}], "update": {"x": 1}, "holds": [{}]},
        {"daemon": {"state": 1}, "repository": {"formats": [None, 1]}, "images": [{}], "results": [{}]},
    ],
)
def test_status_of_another_daemon_is_no_error(make_console: Any, document: dict[str, Any]) -> None:
    console = make_console()
    status.show(document, console)
    assert "State:" in console.out


@pytest.mark.parametrize("reply", ["not json", "[]", "[" * 100_000])
async def test_a_status_that_is_no_document(bus: Any, daemon: Any, reply: str) -> None:
    async def call(*_: Any, **__: Any) -> list[Any]:
        return [reply]

    bus.call = call
    with pytest.raises(Failure) as caught:
        await daemon.status()
    assert caught.value.name == ErrorName.INTERNAL


@pytest.mark.parametrize("method", ["images", "jobs", "status"])
@pytest.mark.parametrize("reply", [[], [1], [[1]], [[[1, 2]]]])
async def test_replies_that_break_the_interface(bus: Any, daemon: Any, method: str, reply: list[Any]) -> None:
    async def call(*_: Any, **__: Any) -> list[Any]:
        return reply

    bus.call = call
    with pytest.raises(Failure) as caught:
        await getattr(daemon, method)()
    assert "makes no sense" in caught.value.message
