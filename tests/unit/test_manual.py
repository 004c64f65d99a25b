"""The manual pages: what they document is what there is, no more and no less."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import hostimage_dbus
from hostimage_dbus.errors import EXIT_CODES, EXIT_USAGE, ErrorName
from hostimage_dbus.introspection import load_shipped
from hostimage_testing.tools import REPOSITORY_ROOT, find
from hostimagectl.catalog import COMMANDS
from hostimagectl.parser import parser
from hostimaged import __version__
from hostimaged.config import Settings

PAGES = {
    "hostimagectl.1": REPOSITORY_ROOT / "client/man/hostimagectl.1",
    "org.hostimage1.5": REPOSITORY_ROOT / "dbus/man/org.hostimage1.5",
    "hostimaged.8": REPOSITORY_ROOT / "daemon/man/hostimaged.8",
    "hostimaged.toml.5": REPOSITORY_ROOT / "daemon/man/hostimaged.toml.5",
}
INTERFACES = Path(hostimage_dbus.__file__).parent / "interfaces"
OURS = (
    ("org.hostimage1.Manager", "/org/hostimage1"),
    ("org.hostimage1.Deployment", "/org/hostimage1/deployments/_ID"),
    ("org.hostimage1.Job", "/org/hostimage1/jobs/_N"),
    ("org.freedesktop.LogControl1", "/org/freedesktop/LogControl1"),
)


def source(page: str) -> str:
    return PAGES[page].read_text()


def plain(text: str) -> str:
    """The text of man(7) source without fonts and escapes."""
    text = re.sub(r"\\f[BIRP]", "", text)
    return text.replace("\\-", "-").replace("\\(dq", '"').replace("\\(aq", "'").replace("\\&", "")


def section(page: str, title: str) -> str:
    """The source of the section called ``title``."""
    parts = re.split(r'^\.SH "?([^"\n]+)"?\n', source(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def tags(text: str) -> list[str]:
    """What stands as the tags of the paragraphs in ``text``."""
    found = re.findall(r"^\.TP\n(.*)\n", text, flags=re.MULTILINE)
    return [plain(re.sub(r" +", " ", re.sub(r'^\.[BIR]+ |"', "", line))) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_source_is_without_faults(page: str) -> None:
    checks = [
        ["mandoc", "-Tlint", "-Wwarning", str(PAGES[page])],
        ["man", "--warnings", "--local-file", str(PAGES[page])],
    ]
    available = [argv for argv in checks if find(argv[0])]
    if not available:
        pytest.skip("neither man nor mandoc is installed")
    for argv in available:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        faults = done.stdout if argv[0] == "mandoc" else ""
        assert (done.returncode, faults + done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES)
def test_the_heading_has_name_section_and_version(page: str) -> None:
    name, _, number = page.rpartition(".")
    assert source(page).startswith(f".TH {name.upper()} {number} ")
    assert f'"hostimaged {__version__}"' in source(page).splitlines()[0]


@pytest.mark.parametrize("page", PAGES)
def test_pages_refer_to_pages_that_exist(page: str) -> None:
    """Of our own names; those of others are not ours to keep."""
    referred = set(re.findall(r"^\.BR (\S+) \((\d)\)", source(page), flags=re.MULTILINE))
    ours = {name for name in (f"{name}.{number}" for name, number in referred) if "hostimage" in name}
    assert ours
    assert ours <= set(PAGES)


def arguments(element: ET.Element, *, directions: bool) -> list[str]:
    return [
        (f"{arg.get('direction'):<3} " if directions else "") + f"{arg.get('type')} {arg.get('name')}"
        for arg in element.findall("arg")
    ]


def declaration(element: ET.Element, *, directions: bool) -> str:
    head = f"      {element.get('name')}("
    return head + (",\n" + " " * len(head)).join(arguments(element, directions=directions)) + ");"


def pseudo_idl(name: str, path: str) -> str:
    """The interface as the page shows it, from the shipped XML."""
    interface = ET.parse(INTERFACES / f"{name}.xml").getroot().find("interface")
    assert interface is not None
    lines = [f"node {path} {{", f"  interface {name} {{"]
    for heading, tag in (("methods", "method"), ("signals", "signal")):
        found = interface.findall(tag)
        if found:
            lines.append(f"    {heading}:")
            lines += [declaration(element, directions=tag == "method") for element in found]
    lines.append("    properties:")
    for member in interface.findall("property"):
        annotation = member.find("annotation")
        emits = "true" if annotation is None else annotation.get("value")
        if emits != "true":
            lines.append(f'      @EmitsChangedSignal("{emits}")')
        access = "readonly" if member.get("access") == "read" else "readwrite"
        lines.append(f"      {access} {member.get('type')} {member.get('name')};")
    return "\n".join([*lines, "  };", "};"])


@pytest.mark.parametrize(("name", "path"), OURS)
def test_the_interface_is_shown_as_it_is(name: str, path: str) -> None:
    assert f".nf\n{pseudo_idl(name, path)}\n.fi\n" in source("org.hostimage1.5")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("org.hostimage1.Manager", "THE MANAGER OBJECT"),
        ("org.hostimage1.Deployment", "THE DEPLOYMENT OBJECT"),
        ("org.hostimage1.Job", "THE JOB OBJECT"),
        ("org.freedesktop.LogControl1", "THE LOG CONTROL OBJECT"),
    ],
)
def test_every_member_has_its_prose(name: str, title: str) -> None:
    interface = load_shipped()[name]
    text = section("org.hostimage1.5", title)
    assert tags(text) == [*interface.methods, *interface.signals, *interface.properties]
    root = ET.parse(INTERFACES / f"{name}.xml").getroot()
    for element in (*root.iter("method"), *root.iter("signal")):
        paragraph = re.split(rf"^\.TP\n\.B {element.get('name')}\n", text, flags=re.MULTILINE)[1]
        paragraph = re.split(r"^\.(?:TP|SS)", paragraph, flags=re.MULTILINE)[0]
        for argument in element.findall("arg"):
            if element.tag == "method":
                assert f"\\fI{argument.get('name')}\\fP" in paragraph, (element.get("name"), argument.attrib)


def test_every_option_is_explained() -> None:
    used = set(re.findall(r"([a-z-]+) \([bs]\)", plain(source("org.hostimage1.5"))))
    explained = {
        name
        for tag in tags(section("org.hostimage1.5", "OPTIONS"))
        for name in re.findall(r"[a-z-]{2,}", tag)
    }
    sent = {"client-id", "queue", "no-join"}
    for command in COMMANDS:
        sent |= {option.key for option in getattr(command, "options", ())}
    assert explained == sent
    assert sent <= used


def test_every_method_is_in_the_security_section() -> None:
    text = section("org.hostimage1.5", "SECURITY")
    methods = [member for name, _ in OURS for member in load_shipped()[name].methods]
    assert [tag for tag in tags(text) if tag in methods] == methods
    policy = ET.parse(REPOSITORY_ROOT / "dbus/org.hostimage1.policy").getroot()
    actions = {action.get("id") for action in policy.iter("action")}
    named = set(re.findall(r"org\.hostimage1\.[a-z]+(?:-[a-z]+)*", plain(text)))
    assert named == actions


def test_every_error_is_listed() -> None:
    assert tags(section("org.hostimage1.5", "ERRORS")) == [str(name).rpartition(".")[2] for name in ErrorName]


def test_the_history_knows_the_version() -> None:
    from hostimage_dbus.names import API_VERSION

    assert f".SS ApiVersion {API_VERSION}\n" in section("org.hostimage1.5", "HISTORY")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = parser()._actions
    found = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


COMMON = {"-h", "--help", "--json", "-q", "--quiet", "--no-ask-password", "--wait"}


def test_every_command_with_its_arguments() -> None:
    shown = {tag.split()[0]: tag for tag in tags(section("hostimagectl.1", "COMMANDS"))}
    assert list(shown) == list(subcommands())
    for name, command in subcommands().items():
        expected = [f"[{' '.join(a.option_strings)}" for a in command._actions if a.option_strings]
        expected = [text for text in expected if text[1:].split()[0] not in COMMON]
        values = [str(action.metavar) for action in command._actions if not action.option_strings]
        words = shown[name].split()[1:]
        assert [word.split("=")[0].rstrip("]") for word in words if word.startswith("[-")] == expected
        assert [word.strip("[]") for word in words if not word.startswith("[-")] == values


def test_every_option_of_the_client() -> None:
    common = set(re.findall(r"--?[a-z-]+", " ".join(tags(section("hostimagectl.1", "OPTIONS")))))
    assert common == {name for action in parser()._actions for name in action.option_strings}
    own = set(re.findall(r"--[a-z-]+", " ".join(tags(section("hostimagectl.1", "OPTIONS OF COMMANDS")))))
    used = {name for c in subcommands().values() for action in c._actions for name in action.option_strings}
    assert own == used - common


def test_every_exit_code_of_the_client() -> None:
    listed = tags(section("hostimagectl.1", "EXIT STATUS"))
    assert listed[:4] == ["0", "1", "2", "3"]
    assert listed[-1] == "130, 141, 143"
    expected = sorted((code, str(name).rpartition(".")[2]) for name, code in EXIT_CODES.items() if code > 3)
    found = re.findall(r"^\.B (\d+)\n(\w+): ", section("hostimagectl.1", "EXIT STATUS"), flags=re.MULTILINE)
    assert [(int(code), name) for code, name in found] == expected


def test_options_of_the_daemon() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hostimaged", "--help"], check=True, capture_output=True, text=True, timeout=60
    )
    options = set(re.findall(r"(?<![\w-])--?[a-z]+", done.stdout.partition("options:")[2]))
    shown = set(re.findall(r"(?<![\w-])--?[a-z]+", " ".join(tags(section("hostimaged.8", "OPTIONS")))))
    assert shown == options
    wrong = subprocess.run(
        [sys.executable, "-m", "hostimaged", "--x"], check=False, capture_output=True, timeout=60
    )
    assert wrong.returncode == EXIT_USAGE
    assert "2 for wrong usage" in section("hostimaged.8", "EXIT STATUS")


@pytest.mark.parametrize("command", ["finalize", "boot-check", "deploy"])
def test_options_of_the_commands_without_a_bus(command: str) -> None:
    argv = [sys.executable, "-m", "hostimaged", command]
    done = subprocess.run([*argv, "--help"], check=True, capture_output=True, text=True, timeout=60)
    listed = done.stdout.partition("options:")[2]
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", listed, flags=re.MULTILINE))
    parts = re.split(r'^\.SS "hostimaged ([^"]+)"\n', section("hostimaged.8", "COMMANDS"), flags=re.MULTILINE)
    documented = dict(zip(map(plain, parts[1::2]), parts[2::2], strict=True))[command]
    shown = set(re.findall(r"--[a-z-]+", " ".join(tags(documented))))
    assert shown == options
    wrong = subprocess.run([*argv, "--x"], check=False, capture_output=True, timeout=60)
    assert wrong.returncode == EXIT_USAGE


def test_every_setting_with_its_default() -> None:
    types = {str: "string", float: "number", int: "number", bool: "boolean"}
    expected = []
    for name, field in Settings.model_fields.items():
        kind = types.get(typing.cast("type", field.annotation), "string")
        expected.append(f"{name.replace('_', '-')} ({kind}, default {json.dumps(field.default)})")
    text = section("hostimaged.toml.5", "SETTINGS")
    assert tags(text) == expected
    for name, field in Settings.model_fields.items():
        paragraph = plain(text).split(f"{name.replace('_', '-')} ")[1].split("\n.TP")[0]
        for choice in typing.get_args(field.annotation):
            assert re.search(rf"\b{choice}\b", paragraph), (name, choice)
        for limit in field.metadata:
            for attribute in ("max_length", "ge", "le"):
                if hasattr(limit, attribute):
                    assert str(getattr(limit, attribute)) in paragraph


def test_the_example_is_valid() -> None:
    import tomllib

    example = re.findall(
        r"\.nf\n(.*?)\n\.fi", plain(section("hostimaged.toml.5", "EXAMPLES")), flags=re.DOTALL
    )[0]
    Settings.model_validate(tomllib.loads(example))


def test_commands_of_examples_can_be_parsed() -> None:
    import shlex

    for page in ("hostimagectl.1", "hostimaged.8"):
        for line in plain(source(page)).splitlines():
            if line.startswith("hostimagectl ") and " control " not in line:
                words = shlex.split(line.partition("|")[0])
                parser().parse_args(words[1:])
