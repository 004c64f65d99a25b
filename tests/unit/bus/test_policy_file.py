"""The shipped polkit policy says what the API promises, in the form polkit expects."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT, absent, require, run
from hostimaged.bus.authorization import Action

POLICY = REPOSITORY_ROOT / "dbus/org.hostimage1.policy"
EXAMPLES = REPOSITORY_ROOT / "dbus/50-org.hostimage1.rules.example"
DTD = Path("/usr/share/polkit-1/policyconfig-1.dtd")
IMPLY = "org.freedesktop.policykit.imply"
#: The table of the API: any, inactive, active.
TABLE = {
    Action.CHECK: ("auth_admin", "auth_admin", "yes"),
    Action.UPDATE: ("auth_admin", "auth_admin", "yes"),
    Action.CANCEL: ("auth_admin", "auth_admin", "yes"),
    Action.SWITCH_IMAGE: ("auth_admin", "auth_admin", "auth_admin"),
    Action.ROLLBACK: ("auth_admin", "auth_admin", "auth_admin_keep"),
    Action.CLEANUP: ("auth_admin", "auth_admin", "auth_admin_keep"),
    Action.CONFIGURE: ("auth_admin", "auth_admin", "auth_admin_keep"),
}


def actions() -> list[ET.Element]:
    return list(ET.parse(POLICY).iter("action"))


def test_defaults_are_those_of_the_table() -> None:
    found = [
        (action.attrib["id"], tuple((d.tag, d.text) for d in action.find("defaults") or ()))
        for action in actions()
    ]
    columns = ("allow_any", "allow_inactive", "allow_active")
    assert sorted(found) == sorted(
        (str(action), tuple(zip(columns, row, strict=True))) for action, row in TABLE.items()
    )


def test_texts_are_fit_for_dialogs() -> None:
    messages = [action.findtext("message", "") for action in actions()]
    descriptions = [action.findtext("description", "") for action in actions()]
    assert len(set(messages)) == len(set(descriptions)) == len(TABLE)
    for text in messages:
        assert re.fullmatch(r"Authentication is required to [a-z][a-z ,]+[a-z]", text), text
    for text in descriptions:
        assert re.fullmatch(r"[A-Z][a-z ,]+[a-z]", text), text


def test_what_implies_what() -> None:
    implied = {
        action.attrib["id"]: set((annotation.text or "").split())
        for action in actions()
        for annotation in action.iter("annotate")
        if annotation.attrib["key"] == IMPLY
    }
    assert implied == {
        Action.SWITCH_IMAGE: {Action.UPDATE, Action.CHECK},
        Action.UPDATE: {Action.CHECK},
        Action.CLEANUP: {Action.CHECK},
    }


def test_the_file_is_valid() -> None:
    xmllint = require("xmllint")
    if not DTD.exists():
        absent("polkit's DTD is not installed")
    run(xmllint, "--noout", "--nonet", "--dtdvalid", DTD, POLICY)


def test_the_examples_are_comments_and_name_every_action() -> None:
    text = EXAMPLES.read_text()
    assert all(line.startswith("//") or not line for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 120
    assert set(re.findall(r"org\.hostimage1\.[a-z-]+\b(?=  )", text)) == set(Action)


@pytest.mark.parametrize("file", [POLICY, EXAMPLES])
def test_files_are_plain_text(file: Path) -> None:
    assert file.read_bytes().isascii()
