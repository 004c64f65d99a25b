"""Deployments as people read them: the table, and what a reboot will do."""

from __future__ import annotations

from typing import Any

import pytest

from hostimagectl import deployments

NEW, RUNNING, OLD, OTHER = (letter * 128 for letter in "abcd")


def row(identifier: str, *states: str, version: str = "", **more: Any) -> dict[str, Any]:
    return {"id": identifier, "version": version} | dict.fromkeys(states, True) | more


STAGED = row(NEW, "staged", version="3")
LOCKED = row(NEW, "staged", "locked", version="3")
BOOTED = row(RUNNING, "booted", version="2")
ROLLBACK = row(OLD, "is-rollback", version="1")


@pytest.mark.parametrize(
    ("following", "rows", "sentence"),
    [
        (RUNNING, [BOOTED, ROLLBACK], "starts version 2 (bbbbbbbbbbbb) again"),
        (NEW, [STAGED, BOOTED, ROLLBACK], "starts version 3 (aaaaaaaaaaaa), which is staged"),
        (OLD, [ROLLBACK, BOOTED], "goes back to version 1 (cccccccccccc)"),
        (OTHER, [row(OTHER), BOOTED], "starts deployment dddddddddddd"),
        ("", [BOOTED], "nobody knows what it starts"),
        (
            RUNNING,
            [LOCKED, BOOTED],
            (
                "starts version 2 (bbbbbbbbbbbb) again; version 3 (aaaaaaaaaaaa) is only downloaded "
                "('hostimagectl upgrade --from-downloaded' releases it)"
            ),
        ),
        (RUNNING, [], ""),
    ],
)
def test_what_a_reboot_will_do(following: str, rows: list[dict[str, Any]], sentence: str) -> None:
    assert deployments.reboot({"next": following}, rows) == sentence


def test_a_daemon_that_does_not_tell() -> None:
    assert deployments.reboot({}, [BOOTED]) == ""
    assert deployments.notes({}) == []


def test_what_is_unusual() -> None:
    host = {"soft-rebooted": True, "transient-root": True, "read-only": True, "usr-overlay": "readWrite"}
    assert len(deployments.notes(host)) == 4
    assert deployments.notes(dict.fromkeys(host, False) | {"usr-overlay": ""}) == []


def test_the_table(make_console: Any) -> None:
    console = make_console()
    problem = {"id": "kernel", "severity": "error", "text": "its kernel is missing\x1b"}
    rows = [
        row(
            OLD,
            "is-rollback",
            "pinned",
            version="42",
            timestamp=1_735_689_600_000_000,
            **{"image-digest": "sha256:" + "9" * 64, "image": "docker://x", "verity": "broken"},
            **{"size-exclusive": 3 << 20},
            problems=[problem, "nonsense"],
        ),
        row(NEW, "staged", "locked", timestamp=1 << 62, problems=7),
    ]
    deployments.table(rows, console)
    heading, first, second, told = (" ".join(line.split()) for line in console.out.splitlines())
    assert heading == "DEPLOYMENT STATE VERSION MADE FREES DIGEST IMAGE"
    assert (
        first == "cccccccccccc rollback, pinned, damaged 42 2025-01-01 3.0 MiB sha256:999999999999 docker://x"
    )
    assert second == "aaaaaaaaaaaa staged, download only - - - - -"
    assert told == "error of cccccccccccc: its kernel is missing\\x1b"


def test_bound_images_are_below_the_table(make_console: Any) -> None:
    console = make_console()
    bound = [
        {"image": "quay.io/a:1", "present": True},
        {"image": "quay.io/b:1", "present": False},
        {"image": "quay.io/c:1", "present": None},
        "nonsense",
    ]
    deployments.table([row(RUNNING, "booted", **{"bound-images": bound})], console)
    lines = [line.strip() for line in console.out.splitlines()[2:]]
    assert lines == [
        "bound to bbbbbbbbbbbb: quay.io/a:1 (present)",
        "bound to bbbbbbbbbbbb: quay.io/b:1 (missing)",
        "bound to bbbbbbbbbbbb: quay.io/c:1 (unknown)",
    ]
