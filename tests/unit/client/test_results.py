"""What came of a job, in words for people."""

from __future__ import annotations

from typing import Any

import pytest

from hostimagectl import results
from hostimagectl.job import Job
from hostimaged.host.stage import Result

ID = "abc" * 42 + "ab"
SHORT = ID[:12]


def printed(make_console: Any, kind: str, *, job: dict[str, Any] | None = None, **result: Any) -> list[str]:
    console = make_console()
    told = {key.replace("_", "-"): value for key, value in result.items()}
    results.print_result(Job(id=1, path="/x", kind=kind, state="done", result=told, **(job or {})), console)
    lines: list[str] = console.out.splitlines()
    return lines


@pytest.mark.parametrize(
    ("kind", "word", "line"),
    [
        ("stage", "already-staged", f"nothing to do, staged already: deployment {SHORT}"),
        ("upgrade", "already-current", f"nothing to do, it is what runs: deployment {SHORT}"),
        (
            "upgrade",
            "same-as-rollback",
            f"nothing staged: deployment {SHORT} is there to go back to, which 'hostimagectl rollback' does",
        ),
        (
            "stage",
            "same-as-other",
            (
                f"nothing staged: deployment {SHORT} is deployed already, "
                f"'hostimagectl make-default {SHORT}' boots it"
            ),
        ),
        ("rollback", "queued", f"the next reboot goes back to deployment {SHORT}"),
        (
            "rollback",
            "already-queued",
            f"nothing to do, the next reboot already goes back to deployment {SHORT}",
        ),
        (
            "rollback",
            "cancelled",
            f"the rollback is taken back: the next reboot starts deployment {SHORT} again",
        ),
        ("rollback", "not-queued", "nothing to do, no rollback waits for the next reboot"),
        ("rollback", "default", f"the next reboot starts deployment {SHORT}"),
        ("rollback", "already-default", f"nothing to do, the next reboot already starts deployment {SHORT}"),
        ("delete", "deleted", f"deleted deployment {SHORT}"),
        ("unstage", "unstaged", f"nothing is staged any more; it was deployment {SHORT}"),
        ("pin", "pinned", f"pinned deployment {SHORT}: it is kept until it is unpinned"),
        ("pin", "unpinned", f"unpinned deployment {SHORT}: it is no longer kept for its own sake"),
        ("pin", "unchanged", f"nothing to do, it was so before: deployment {SHORT}"),
    ],
)
def test_a_line_for_each_word(make_console: Any, kind: str, word: str, line: str) -> None:
    assert printed(make_console, kind, result=word, deployment=ID) == [line]


def test_every_word_of_staging_is_known() -> None:
    assert {str(word) for word in Result} <= results._WORDS.keys()


def test_an_upgrade_tells_what_it_fetched_and_staged(make_console: Any) -> None:
    assert printed(
        make_console,
        "upgrade",
        job={"bytes_total": 4 << 20, "bytes_done": 1 << 20, "bytes_cached": 3 << 20},
        result="staged",
        deployment=ID,
        version="42",
        image="docker://x",
        manifest_digest="sha256:9",
        bytes_fetched=1 << 20,
        download_only=False,
        etc_added=1,
        etc_modified=2,
        etc_removed=0,
        layers_total=5,
    ) == [
        f"staged version 42 ({SHORT}): the next reboot starts it",
        "  Transfer:     1.0 MiB transferred, 3.0 MiB were there already",
        "  Image:        docker://x",
        "  Manifest:     sha256:9",
        "  Kept of /etc: 1 added, 2 modified",
    ]


@pytest.mark.parametrize("word", ["staged", "already-staged"])
def test_what_is_only_downloaded_waits(make_console: Any, word: str) -> None:
    (line,) = printed(make_console, "stage", result=word, deployment=ID, version="4", download_only=True)
    assert line == f"downloaded version 4 ({SHORT}): it waits for 'hostimagectl upgrade --from-downloaded'"


def test_kernel_arguments_are_shown(make_console: Any) -> None:
    lines = printed(make_console, "kargs", result="changed", deployment=ID, kernel_arguments="rw quiet\x1b")
    assert lines == [
        f"the kernel arguments of deployment {SHORT} are changed from the next boot on",
        "  Kernel arguments: rw quiet\\x1b",
    ]


def test_a_word_that_we_do_not_know_is_shown_as_it_is(make_console: Any) -> None:
    lines = printed(make_console, "delete", result="vanished", deployment=ID)
    assert lines[0] == "done"
    assert "  Result:     vanished" in lines


def test_a_soft_reboot_that_follows(make_console: Any) -> None:
    lines = printed(make_console, "upgrade", result="staged", deployment=ID, soft_reboot="prepared")
    assert [line.split() for line in lines[1:]] == [["Soft", "reboot:", "prepared"]]


def test_bound_images_are_named(make_console: Any) -> None:
    lines = printed(
        make_console,
        "upgrade",
        result="staged",
        deployment=ID,
        bound_images=["quay.io/a:1", "localhost/b"],
        bound_fetched=["quay.io/a:1"],
    )
    assert [line.split() for line in lines[1:]] == [
        ["Bound", "to:", "quay.io/a:1,", "localhost/b"],
        ["Fetched", "for", "it:", "quay.io/a:1"],
    ]


def test_what_leaves_the_store_is_told(make_console: Any) -> None:
    numbers = {"objects_removed": 2, "objects_bytes": 1000, "boot_bytes": 0}
    lines = printed(
        make_console,
        "collect",
        result="collected",
        store_images=["localhost/a:1 (0123456789ab)", "(fedcba987654)"],
        store_bytes=3 << 20,
        store_problem="(fedcba987654) could not be removed: podman kept them",
        **numbers,
    )
    assert lines[0].endswith("and container images of 3.0 MiB (2)")
    assert "  Container image: localhost/a:1 (0123456789ab)" in lines
    assert any("could not be removed: podman kept them" in line for line in lines)
    kept = printed(make_console, "collect", result="nothing", store_kept=["podman is needed"], **numbers)
    assert any("podman is needed" in line for line in kept)
