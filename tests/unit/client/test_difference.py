"""What is different between two deployments, for people and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostimagectl import difference
from hostimagectl.job import Job
from hostimagectl.outcome import report

DOCUMENT: dict[str, Any] = {
    "from": {"id": "a" * 128, "version": "1", "image-digest": ""},
    "to": {"id": "b" * 128, "version": "", "image-digest": ""},
    "files": {
        "added": 2,
        "removed": 0,
        "changed": 1,
        "metadata": 1,
        "added-bytes": 2048,
        "removed-bytes": 0,
        "list": [["added", "/new/"], ["changed", "/etc/x\x1b"], ["metadata", "/bin/su"]],
    },
    "packages": {"list": [["changed", "bash", "5.1", "5.2"], ["added", "fish", "", "4"]]},
    "kernel-arguments": {"added": ["quiet"], "removed": ["debug"]},
    "labels": {"list": [["removed", "vendor", "x", ""]]},
    "problems": ["the rpm database cannot be read"],
    "truncated": True,
}
LINES = [
    "from version 1 (aaaaaaaaaaaa) to deployment bbbbbbbbbbbb",
    "kernel arguments:",
    "  - debug",
    "  + quiet",
    "labels:",
    "  - vendor: x -> -",
    "packages:",
    "  ~ bash: 5.1 -> 5.2",
    "  + fish: - -> 4",
    "files (2 added, 1 changed, 1 metadata, 2.0 KiB added):",
    "  + /new/",
    "  ~ /etc/x\\x1b",
    "  m /bin/su",
    "not compared: the rpm database cannot be read",
    "(there is more than fits into the answer)",
]


def job(text: str) -> Job:
    return Job(id=1, path="/x", kind="diff", state="done", result={"diff": text, "truncated": True})


def test_for_people(make_console: Any) -> None:
    console = make_console()
    assert report(job(json.dumps(DOCUMENT)), console, cancel_requested=False) == 0
    assert console.out.splitlines() == LINES


def test_as_json_the_document_is_part_of_the_result(make_console: Any) -> None:
    console = make_console(as_json=True)
    assert report(job(json.dumps(DOCUMENT)), console, cancel_requested=False) == 0
    assert console.document["result"] == {"diff": DOCUMENT, "truncated": True}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        "{}",
        '{"from": 1, "files": [], "packages": {"list": [1, [2], ["x"]]}, "problems": 5}',
        '{"files": {"added": -1, "list": [["odd", "/x"]]}, "labels": {"list": {}}}',
    ],
)
def test_what_makes_no_sense_is_no_error(make_console: Any, text: str) -> None:
    for as_json in (False, True):
        assert report(job(text), make_console(as_json=as_json), cancel_requested=False) == 0


def test_nothing_is_different() -> None:
    assert list(difference.lines({"from": DOCUMENT["from"], "to": DOCUMENT["to"]})) == [LINES[0]]
