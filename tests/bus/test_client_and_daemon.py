"""hostimagectl and hostimaged together, both as processes of their own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hostimage_dbus.errors import EXIT_CODES, EXIT_USAGE, ErrorName
from hostimage_dbus.names import JOB_INTERFACE, job_path
from hostimage_testing.bus import Bus, Client, Daemon, steps_until
from hostimage_testing.hostimagectl import Hostimagectl, Screen, run

DIGEST = "sha256:" + "a" * 64
RESULT = {
    "manifest-digest": DIGEST,
    "source-digest": DIGEST,
    "tag": "x",
    "version": "1",
    "changed": True,
    "image-ids": ["a"],
}


async def test_pull_from_start_to_end(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    image = daemon.script(
        "image",
        {"phase": "resolving"},
        {"totals": [1000, 200]},
        {"phase": "pulling"},
        {"advance": 800},
        {"phase": "finalizing"},
        {"result": RESULT},
    )
    client = await run(bus, "pull", image, "--json")
    assert client.code == 0
    document = json.loads(client.out)
    assert document["result"] == RESULT
    assert document["error"] is None
    job = document["job"]
    assert (job["id"], job["kind"], job["target"], job["state"]) == (1, "pull", image, "done")
    assert (job["bytesDone"], job["bytesTotal"], job["bytesCached"], job["progress"]) == (800, 1000, 200, 1.0)
    assert 0 < job["created"] <= job["started"] <= job["finished"]


async def test_a_relative_path_is_that_of_the_client(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    image = Path(daemon.script("image", {"result": RESULT}).removeprefix("dir:"))
    client = await Hostimagectl.start(bus, "pull", "-q", f"dir:{image.name}", cwd=image.parent)
    assert await client.end() == 0
    assert client.out == DIGEST + "\n"


@pytest.mark.parametrize("name", ["ImageNotFound", "RegistryAuth", "NoSpace", "SignatureRejected"])
async def test_each_failure_has_its_exit_code_and_message(daemon: Daemon, bus: Bus, name: str) -> None:
    await daemon.start()
    client = await run(bus, "pull", daemon.script("image", {"fail": [name, "because"]}))
    assert client.code == EXIT_CODES[ErrorName("org.hostimage1.Error." + name)]
    assert client.out == ""
    message = [line for line in client.err.splitlines() if line.startswith("hostimagectl: ")]
    assert len(message) == 1
    assert "because" in message[0]


@pytest.mark.parametrize("image", ["fedora", "docker:x", "oci:/a/../b", "frob:x", "oci:/x\x1b"])
async def test_a_wrong_reference(daemon: Daemon, bus: Bus, image: str) -> None:
    await daemon.start()
    client = await run(bus, "pull", image)
    assert client.code == EXIT_CODES[ErrorName.INVALID_REFERENCE]
    assert "hint: an image is written transport:name" in client.err
    assert "\x1b" not in client.err


async def test_no_tracked_image(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    assert (await run(bus, "pull")).code == EXIT_USAGE


async def test_ctrl_c_at_a_terminal(daemon: Daemon, bus: Bus, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    image = daemon.script("image", {"phase": "pulling"}, *steps_until(tmp_path / "never"))
    with Screen() as screen:
        ctl = await Hostimagectl.start(bus, "pull", image, stderr=screen.slave)
        await screen.shows("pulling")
        ctl.process.send_signal(signal.SIGINT)
        assert await ctl.end() == EXIT_CODES[ErrorName.CANCELLED]
        await screen.shows("cancelling job 1", "hostimagectl: job 1 was cancelled")
    assert (await client.removed(job_path(1)))[3] == "cancelled"


async def test_leaving_does_not_stop_the_job(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    ctl = await Hostimagectl.start(
        bus, "pull", daemon.script("image", {"phase": "pulling"}, *steps_until(go))
    )
    await client.changed(job_path(1), JOB_INTERFACE, "Phase", "pulling")
    ctl.process.kill()
    await ctl.end()
    go.touch()
    assert (await client.removed(job_path(1)))[3] == "done"


async def test_jobs_and_cancel(daemon: Daemon, bus: Bus, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    image = daemon.script("image", {"phase": "pulling"}, *steps_until(tmp_path / "never"))
    other = daemon.script("other", *steps_until(tmp_path / "never"))
    first, second = await client.pull(image), await client.pull(other)
    await client.changed(first, JOB_INTERFACE, "Phase", "pulling")
    listed = await run(bus, "jobs", "--json")
    assert [(job["id"], job["state"]) for job in json.loads(listed.out)["jobs"]] == [
        (1, "running"),
        (2, "queued"),
    ]
    assert (await run(bus, "jobs", "-q")).out == "1\n2\n"
    busy = await run(bus, "pull", "--no-queue", "--no-join", image)
    assert busy.code == EXIT_CODES[ErrorName.BUSY]
    assert "hint: see 'hostimagectl jobs'" in busy.err

    done = await run(bus, "cancel", "2")
    assert (done.code, done.out) == (0, "job 2 was cancelled\n")
    done = await run(bus, "cancel", "1", "--no-wait")
    assert (done.code, done.out) == (0, "job 1 is being cancelled\n")
    await client.removed(first)
    assert (await client.removed(second))[3] == "cancelled"
    late = await run(bus, "cancel", "1")
    assert late.code == EXIT_CODES[ErrorName.JOB_NOT_CANCELLABLE]
    assert (await run(bus, "cancel", "77")).code == EXIT_CODES[ErrorName.UNKNOWN_OBJECT]


async def test_an_equal_pull_is_joined_and_left(
    daemon: Daemon, bus: Bus, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    image = daemon.script("image", {"phase": "pulling"}, *steps_until(go))
    path = await client.pull(image)
    await client.changed(path, JOB_INTERFACE, "Phase", "pulling")
    ctl = await Hostimagectl.start(bus, "pull", image)
    await ctl.says("job 1 does this already; following it")
    assert (await run(bus, "pull", image, "--no-wait", "-q")).out == "1\n"
    go.touch()
    assert await ctl.end() == 0
    assert (await client.removed(path))[3] == "done"


async def test_service_commands(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    for command, out in (
        (["log-level", "debug"], "debug\n"),
        (["log-level"], "debug\n"),
        (["policy"], "none\n"),
        (["reload"], "the settings are read again\n"),
        (["hold", "2h", "--reason", "a demo", "-q"], ""),
        (["release", "-q"], ""),
    ):
        client = await run(bus, *command)
        assert (client.code, client.out) == (0, out), client.err
    assert (await run(bus, "show", "booted")).code == EXIT_CODES[ErrorName.NO_SUCH_DEPLOYMENT]


async def test_images_and_status(daemon: Daemon, bus: Bus, client: Client) -> None:
    findings = daemon.root / "sysroot/findings.json"
    findings.parent.mkdir(parents=True)
    row = {"manifest-digest": DIGEST, "reference": "oci:/x", "size": 5 << 20, "pulled": 1_700_000_000}
    repository = {"algorithm": "fsverity-sha512-12", "formats": ["v1"], "secure": False, "used": 1 << 30}
    problem = {"id": "image", "severity": "warning", "text": "something is odd"}
    findings.write_text(json.dumps({"repository": repository, "images": [row], "problems": [problem]}))
    await daemon.start()
    await client.removed(await client.pull(daemon.script("bad", {"fail": ["NoSpace", "the disk is full"]})))

    images = json.loads((await run(bus, "images", "--json")).out)["images"]
    assert len(images) == 1
    assert {key: images[0][key] for key in row} == row
    assert (images[0]["tag"], images[0]["deployed"]) == (None, False)
    assert (await run(bus, "images", "-q")).out == DIGEST + "\n"

    document = json.loads((await run(bus, "status", "--json")).out)
    assert document == await client.status()
    assert (await run(bus, "status", "-q")).out == "idle\n"
    text = (await run(bus, "status")).out
    for part in ("idle", "1.0 GiB used", "oci:/x", "something is odd", "the disk is full", "failed"):
        assert part in text


async def test_the_daemon_crashes_and_comes_back(daemon: Daemon, bus: Bus, tmp_path: Path) -> None:
    await daemon.start()
    image = daemon.script("image", {"phase": "pulling"}, *steps_until(tmp_path / "never"))
    ctl = await Hostimagectl.start(bus, "pull", image)
    await ctl.says("pulling")
    await daemon.kill()
    await ctl.says("hostimaged went away")
    await daemon.start()
    assert await ctl.end() == EXIT_CODES[ErrorName.INTERNAL]
    assert "hostimagectl: the daemon ended while the job was not done\n" in ctl.err


async def test_the_worker_crashes(daemon: Daemon, bus: Bus) -> None:
    await daemon.start()
    client = await run(bus, "pull", daemon.script("image", {"phase": "pulling"}, {"kill": 9}))
    assert client.code == EXIT_CODES[ErrorName.INTERNAL]
    assert "hostimagectl: " in client.err
