"""A job from the call to its end, as a client sees it."""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.names import JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH
from hostimage_testing.bus import Client, Daemon, connected, error_of, steps_until

DIGEST = "sha256:" + "a" * 64
SCHEMA = json.loads(resources.files("hostimage_dbus").joinpath("status.schema.json").read_text())


async def test_pull_reports_progress_and_result(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    go = tmp_path / "go"
    result = {"manifest-digest": DIGEST, "changed": True, "image-ids": ["a", "b"], "size": 7}
    image = daemon.script(
        "image",
        {"phase": "resolving"},
        {"totals": [1000, 200]},
        {"phase": "pulling"},
        {"advance": 400},
        {"message": "half way"},
        *steps_until(
            go, result={"manifest-digest": DIGEST, "changed": True, "image-ids": ["a", "b"], "size": 7}
        ),
    )
    path = await client.pull(image, client_id="tester")
    await client.changed(path, JOB_INTERFACE, "Message", "half way")
    running = await client.job(path)
    assert running["State"] == "running"
    assert running["Kind"] == "pull"
    assert running["Target"] == image
    assert running["Initiator"]["client-id"] == "tester"
    assert (running["BytesDone"], running["BytesTotal"], running["BytesCached"]) == (400, 1000, 200)
    assert running["Progress"] == pytest.approx(0.54)
    assert running["Phase"] == "pulling"
    assert running["Cancellable"] is True
    assert (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["State"] == "pulling"
    go.touch()
    assert await client.removed(path) == [1, path, "pull", "done", "", ""]
    done = await client.job(path)
    assert done["State"] == "done"
    assert done["Progress"] == 1.0
    assert done["Cancellable"] is False
    assert done["Created"] <= done["Started"] <= done["Finished"]
    assert done["Result"] == result
    progress = client.changes(path, JOB_INTERFACE, "Progress")
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


async def test_every_transition_is_told_once_and_removal_comes_last(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("image", {"phase": "resolving"}, {"result": {}}))
    await client.removed(path)
    assert client.changes(path, JOB_INTERFACE, "State") == ["running", "done"]
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "State") == ["pulling", "idle"]
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "ActiveJob") == [path, "/"]
    assert client.changes(ROOT_PATH, MANAGER_INTERFACE, "QueuedJobs") == [[path], []]
    order = [(s.member, s.path) for s in client.signals if s.path.startswith(ROOT_PATH)]
    assert order.index(("InterfacesAdded", ROOT_PATH)) < order.index(("JobNew", ROOT_PATH))
    assert order[-3:] == [
        ("PropertiesChanged", ROOT_PATH),
        ("PropertiesChanged", path),
        ("JobRemoved", ROOT_PATH),
    ]


async def test_second_pull_waits_its_turn(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    go = tmp_path / "go"
    first = await client.pull(daemon.script("one", *steps_until(go)))
    second = await client.pull(daemon.script("two", {"result": {}}))
    await client.changed(first, JOB_INTERFACE, "State", "running")
    rows = await client.manager("ListJobs")
    assert [list(row) for row in rows] == [[1, "pull", "running", first], [2, "pull", "queued", second]]
    busy = await error_of(client.pull(daemon.script("three", {"result": {}}), queue=False))
    assert busy.name == ErrorName.BUSY
    go.touch()
    await client.removed(second)
    assert [s.body[1] for s in client.named("JobRemoved")] == [first, second]


async def test_waiting_jobs_of_a_user_are_limited(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "go"))
    active = await client.pull(image)
    await client.changed(active, JOB_INTERFACE, "State", "running")
    for _ in range(8):
        await client.pull(image, no_join=True)
    assert (await error_of(client.pull(image, no_join=True))).name == ErrorName.LIMITS_EXCEEDED


async def test_cancelled_waiting_job_leaves_the_queue_at_once(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    image = daemon.script("image", *steps_until(tmp_path / "go"))
    active, waiting = await client.pull(image), await client.pull(image, no_join=True)
    await client.cancel(waiting)
    assert (await client.removed(waiting))[3:] == ["cancelled", ErrorName.CANCELLED, "cancelled"]
    assert [row[3] for row in await client.manager("ListJobs")] == [active]


async def test_cancel_stops_a_running_job(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("image", {"phase": "pulling"}, *steps_until(tmp_path / "go")))
    await client.changed(path, JOB_INTERFACE, "Phase", "pulling")
    await asyncio.gather(client.cancel(path), client.cancel(path))
    assert (await client.removed(path))[3] == "cancelled"
    assert client.changes(path, JOB_INTERFACE, "State") == ["running", "cancelling", "cancelled"]
    late = await error_of(client.cancel(path))
    assert late.name == ErrorName.JOB_NOT_CANCELLABLE


async def test_failure_keeps_its_name_and_message(daemon: Daemon, client: Client) -> None:
    await daemon.start()
    path = await client.pull(daemon.script("image", {"fail": ["ImageNotFound", "no such image"]}))
    assert (await client.removed(path))[3:] == ["failed", ErrorName.IMAGE_NOT_FOUND, "no such image"]
    assert (await client.job(path))["Error"] == [ErrorName.IMAGE_NOT_FOUND, "no such image"]
    failure = (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["LastFailure"]
    assert failure["error"] == ErrorName.IMAGE_NOT_FOUND
    assert failure["job"] == 1
    await client.removed(await client.pull(daemon.script("good", {"result": {}})))
    assert (await client.properties(ROOT_PATH, MANAGER_INTERFACE))["LastFailure"] == {}


async def test_status_document_follows_its_schema(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    findings = daemon.root / "sysroot/findings.json"
    findings.parent.mkdir(parents=True)
    (daemon.root / "etc").mkdir()
    (daemon.root / "etc/hostimaged.toml").write_text('tracked-image = "docker://r.example/os"\nwrong = 1\n')
    findings.write_text(
        json.dumps(
            {
                "repository": {
                    "algorithm": "fsverity-sha512-12",
                    "formats": ["v1"],
                    "secure": True,
                    "used": 4096,
                },
                "images": [
                    {"manifest-digest": DIGEST, "tag": "x", "size": 5, "pulled": 6, "image-ids": ["i"]}
                ],
                "problems": [{"id": "image", "severity": "warning", "text": "odd"}],
            }
        )
    )
    await daemon.start()
    await client.until(lambda: client.named("PropertiesChanged", ROOT_PATH))
    jsonschema.validate(await client.status(), SCHEMA)
    go = tmp_path / "go"
    await client.pull(daemon.script("image", {"totals": [10, 0]}, {"advance": 5}, *steps_until(go)))
    failing = await client.pull(daemon.script("bad", {"fail": ["NoSpace", "full"]}))
    waiting = await client.status()
    jsonschema.validate(waiting, SCHEMA)
    assert [job["state"] for job in waiting["jobs"]][1:] == ["queued"]
    go.touch()
    await client.removed(failing)
    document = await client.status()
    jsonschema.validate(document, SCHEMA)
    assert document["trackedImage"] == "docker://r.example/os"
    assert document["repository"]["used"] == 4096
    assert document["images"][0]["manifest-digest"] == DIGEST
    assert [(p["id"], p["severity"]) for p in document["problems"]] == [
        ("settings", "warning"),
        ("image", "warning"),
    ]
    assert [(r["state"], r["error"] and r["error"]["name"]) for r in document["results"]] == [
        ("done", None),
        ("failed", ErrorName.NO_SPACE),
    ]
    (row,) = await client.manager("ListImages", "a{sv}", {})
    assert {key: value.value for key, value in row.items()} == document["images"][0]


async def test_finished_job_stays_readable_and_status_is_fresh_at_removal(
    daemon: Daemon, client: Client
) -> None:
    await daemon.start()
    (daemon.root / "sysroot").mkdir(exist_ok=True)
    found = {"repository": None, "images": [{"tag": "new"}], "problems": []}
    (daemon.root / "sysroot/findings.json").write_text(json.dumps(found))
    path = await client.pull(daemon.script("image", {"kill": 9}))
    await client.removed(path)
    assert [image["tag"] for image in (await client.status())["images"]] == ["new"]
    assert (await client.job(path))["State"] == "failed"


async def test_the_end_of_the_initiator_does_not_stop_the_job(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    await daemon.start()
    go = tmp_path / "go"
    async with connected(daemon.bus) as initiator:
        path = await initiator.pull(daemon.script("image", *steps_until(go)))
    go.touch()
    assert (await client.removed(path))[3] == "done"
