"""The completion scripts: up to date, and what the shells make of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT, find
from hostimagectl.catalog import COMMANDS
from hostimagectl.completion import script
from hostimagectl.parser import parser

SCRIPTS = {
    "bash": REPOSITORY_ROOT / "client/completions/hostimagectl",
    "zsh": REPOSITORY_ROOT / "client/completions/_hostimagectl",
    "fish": REPOSITORY_ROOT / "client/completions/hostimagectl.fish",
}
NAMES = {command.name for command in COMMANDS}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_committed_script_is_what_the_parser_gives(shell: str) -> None:
    """If not: hostimagectl completion SHELL >FILE."""
    assert SCRIPTS[shell].read_text() == script(parser(), shell)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_can_parse_it(shell: str) -> None:
    program = find(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n", SCRIPTS[shell]], check=True, timeout=30)


@pytest.fixture
def complete(tmp_path: Path) -> object:
    """What bash offers for a line that the cursor stands at the end of."""
    fake = tmp_path / "hostimagectl"
    fake.write_text('#!/bin/sh\n[ "$*" = "--quiet jobs" ] && printf "12\\n17\\n"\n')
    fake.chmod(0o755)

    def offers(line: str) -> list[str]:
        code = (
            'source "$1"; COMP_LINE=$2; COMP_POINT=${#COMP_LINE}\n'
            # As readline does it: words end at white space, ':' and '='.
            'read -ra COMP_WORDS <<<"$COMP_LINE"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n'
            '_hostimagectl hostimagectl "" ""; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", code, "bash", SCRIPTS["bash"], line],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        assert done.stderr == ""
        return done.stdout.split()

    return offers


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hostimagectl roll", {"rollback"}),
        ("hostimagectl --json sta", {"status", "stage"}),
        ("hostimagectl --js", {"--json"}),
        ("hostimagectl pull --exp", {"--expect-digest"}),
        ("hostimagectl pull --expect-digest ", set()),
        ("hostimagectl upgrade --apply ", {"none", "reboot", "soft-reboot"}),
        ("hostimagectl upgrade --apply=so", {"soft-reboot"}),
        ("hostimagectl pull oci-", {"oci-archive:"}),
        ("hostimagectl pull docker:", {"//"}),
        ("hostimagectl pull --expect-digest sha256:0 docker-", {"docker-archive:"}),
        ("hostimagectl pull oci:/x ", set()),
        ("hostimagectl cancel ", {"12", "17"}),
        ("hostimagectl cancel --no-wait 1", {"12", "17"}),
        ("hostimagectl diff booted st", {"staged"}),
        ("hostimagectl set-unified ", {"on", "off"}),
        ("hostimagectl completion ", {"bash", "zsh", "fish"}),
        ("hostimagectl log-level d", {"debug"}),
        ("hostimagectl frobnicate ", set()),
        ("hostimagectl frobnicate --", set()),
        ('hostimagectl pull "$(touch /tmp/x)" *', set()),
    ],
)
def test_bash(complete: object, line: str, expected: set[str]) -> None:
    assert callable(complete)
    assert set(complete(line)) == expected


def test_bash_offers_every_command_and_option(complete: object) -> None:
    assert callable(complete)
    assert set(complete("hostimagectl ")) == NAMES
    offered = set(complete("hostimagectl upgrade --"))
    assert {"--background", "--no-wait", "--json", "--from-downloaded"} <= offered
    assert "--dry-run" not in offered
