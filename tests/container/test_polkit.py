"""polkit and logind decide: for people at the screen, away from it, on no seat, and by what they answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from hostimage_dbus.errors import EXIT_CODES, ErrorName
from hostimage_dbus.names import BUS_NAME, ROOT_PATH
from hostimage_testing.container import PROGRAMS, Container
from hostimage_testing.debian_root import ADMINISTRATOR, PASSWORD, USER
from hostimage_testing.person import Person, logged_in

OK = 0
DENIED = EXIT_CODES[ErrorName.ACCESS_DENIED]
ASKS = EXIT_CODES[ErrorName.AUTHORIZATION_REQUIRED]
INTERRUPTED = 130
OTHER = "oci:/srv/other:latest"
PROMPT = "Password: "
RIGHT, WRONG = f"{PASSWORD}\n", "guessed\n"
CTRL_C = "\x03"
#: Commands, and how they end for somebody who cannot be asked: in an active session, and in any other.
COMMANDS = {
    "check": (OK, ASKS),
    "pull": (OK, ASKS),
    "gc --dry-run": (OK, ASKS),
    f"check {OTHER}": (ASKS, ASKS),
    f"pull {OTHER}": (ASKS, ASKS),
    "pull --retry-failed": (ASKS, ASKS),
    "upgrade --allow-downgrade": (ASKS, ASKS),
    f"switch {OTHER}": (ASKS, ASKS),
    "rollback": (ASKS, ASKS),
    "gc": (ASKS, ASKS),
    "hold 1h": (ASKS, ASKS),
    "reload": (ASKS, ASKS),
}


@pytest.fixture(autouse=True)
def same_daemon(container: Container) -> Iterator[None]:
    """One daemon lives through each test, and nothing astonishes it."""
    container.run("hostimagectl", "status")
    process = container.show("hostimaged.service", "MainPID")
    since = container.cursor()
    yield
    logged = container.journal(since=since)
    print(logged, container.journal("polkit.service", since=since))  # shown where a test fails
    assert container.show("hostimaged.service", "MainPID") == process
    assert "Traceback" not in logged


@contextmanager
def place(container: Container, name: str) -> Iterator[Person]:
    """The user in a session that logind calls so."""
    with ExitStack() as stack:
        seat = "" if name == "seatless" else "seat0"
        person = stack.enter_context(logged_in(container, USER, seat))
        if name == "inactive":
            stack.enter_context(logged_in(container, ADMINISTRATOR)).activate()
        assert person.session_property("Active") == ("no" if name == "inactive" else "yes")
        assert person.session_property("Seat") == seat
        yield person


@pytest.mark.parametrize("where", ["active", "inactive", "seatless"])
def test_where_somebody_is_decides(container: Container, where: str) -> None:
    with place(container, where) as person:
        expected = {command: codes[where != "active"] for command, codes in COMMANDS.items()}
        found = {command: person.run("hostimagectl", *command.split()).code for command in COMMANDS}
        assert found == expected


def test_coming_to_the_foreground_counts_at_once(container: Container) -> None:
    with place(container, "inactive") as person:
        assert person.run("hostimagectl", "check").code == ASKS
        person.activate()
        assert person.run("hostimagectl", "check").code == OK


def test_an_update_from_files_of_the_user_asks(container: Container, user: Person) -> None:
    """Who can write the tracked image decides what is installed."""
    assert user.run("hostimagectl", "pull").code == OK
    index = container.root / "srv/os/index.json"
    os.chown(index, int(container.run("id", "--user", USER).out), -1)
    try:
        assert user.run("hostimagectl", "pull").code == ASKS
        assert user.run("hostimagectl", "check").code == OK
    finally:
        os.chown(index, 0, -1)


def test_a_rule_of_the_administrator(container: Container) -> None:
    """The shipped examples are taken as they are, and one of them as it says."""
    rules = container.root / "etc/polkit-1/rules.d/50-org.hostimage1.rules"
    example = container.root / "usr/share/doc/hostimaged/50-org.hostimage1.rules.example"
    text = example.read_text()
    part = text[text.index("//polkit.addRule") :]
    first = part[: part.index("//});") + len("//});")]
    rules.write_text("\n".join(line.removeprefix("//") for line in first.splitlines()))
    rules.chmod(0o644)
    container.run("groupadd", "--system", "--users", USER, "sysupdate")
    try:
        container.run("systemctl", "reload-or-restart", "polkit.service")
        with place(container, "seatless") as person:
            assert person.run("hostimagectl", "pull").code == OK
            assert person.run("hostimagectl", "pull", OTHER).code == ASKS
    finally:
        rules.unlink()
        container.run("groupdel", "sysupdate")
        container.run("systemctl", "reload-or-restart", "polkit.service")


def holds(container: Container) -> list[str]:
    call = ["busctl", "--json=short", "get-property", BUS_NAME, ROOT_PATH, f"{BUS_NAME}.Manager", "Holds"]
    names: list[str] = json.loads(container.run(*call).out)["data"]
    return names


@pytest.fixture
def released(container: Container) -> Iterator[None]:
    """No hold of a test is left."""
    yield
    container.run("hostimagectl", "release")


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("where", ["active", "inactive", "seatless"])
def test_the_right_password(container: Container, where: str) -> None:
    with place(container, where) as person:
        done = person.on_terminal("hostimagectl", "hold", "1h", answers=[(PROMPT, RIGHT)])
        assert done.code == OK, done.out
        assert f"Authenticating as: {ADMINISTRATOR}" in done.out
        assert "Authentication is required to configure operating system updates" in done.out
        assert PASSWORD not in done.out
        assert "manual" in holds(container)
        # What polkit keeps for a while it keeps for the process that was authorised.
        again = person.run("hostimagectl", "release")
        assert again.code == ASKS, again.err


def test_an_image_is_asked_for_each_time(user: Person) -> None:
    for _ in range(2):
        done = user.on_terminal("hostimagectl", "pull", OTHER, answers=[(PROMPT, RIGHT)], limit=60)
        assert done.code == OK, done.out
        assert f"Authentication is required to download the operating system image {OTHER}" in done.out
    assert user.run("hostimagectl", "pull", OTHER).code == ASKS


def test_a_wrong_password(container: Container, user: Person) -> None:
    done = user.on_terminal("hostimagectl", "hold", "1h", answers=[(PROMPT, WRONG)])
    assert done.code == DENIED
    assert "AUTHENTICATION FAILED" in done.out
    assert "hostimagectl: " in done.out
    assert "the authentication failed" in done.out
    assert holds(container) == []
    assert user.run("hostimagectl", "hold", "1h").code == ASKS


@pytest.mark.parametrize("how", ["interrupts", "hangs up"])
def test_somebody_who_leaves_the_prompt(container: Container, user: Person, how: str) -> None:
    """Interrupted with Ctrl-C, or the window closed: nothing was done, and nothing waits any more.

    polkitd 126 was once seen to answer nobody any more after this. What waits for it then is no fault of
    ours, so it is done again with another polkitd.
    """
    try:
        _leave_the_prompt(container, user, how)
    except (AssertionError, pytest.fail.Exception):
        if container.polkit_answers():
            raise
        print("polkitd is stuck:", container.threads("polkit.service"), container.journal("polkit.service"))
        container.run("systemctl", "restart", "polkit.service")
        _leave_the_prompt(container, user, how)


def _leave_the_prompt(container: Container, user: Person, how: str) -> None:
    answer = CTRL_C if how == "interrupts" else None
    since = container.cursor()
    done = user.on_terminal("hostimagectl", "hold", "1h", answers=[(PROMPT, answer)])
    assert done.code == (INTERRUPTED if how == "interrupts" else -1), done.out
    assert holds(container) == []
    # Each user may have four questions open: these would be the fifth and sixth, if any were left.
    for _ in range(5):
        user.on_terminal("hostimagectl", "hold", "1h", answers=[(PROMPT, answer)])
    done = user.on_terminal("hostimagectl", "hold", "1h", answers=[(PROMPT, WRONG)])
    assert done.code == DENIED, done.out
    assert "granted" not in container.journal(since=since)


def test_no_password_is_asked_for_where_that_is_not_wanted(user: Person) -> None:
    """The answer says what is missing, and no agent is started."""
    done = user.on_terminal("hostimagectl", "--no-ask-password", "pull", OTHER)
    assert done.code == ASKS
    assert "authentication is required" in done.out
    assert PROMPT not in done.out
    assert "AUTHENTICATING" not in done.out


class Desktop:
    """A session with a registered agent, as a desktop has; its dialogs are events."""

    def __init__(self, person: Person, container: Container) -> None:
        self.person = person
        uid = container.run("id", "--user", USER).out.strip()
        address = "unix:path=/run/dbus/system_bus_socket"
        person.spawn("agent", "python3", f"{PROGRAMS}/session_client.py", address, uid, person.session)
        assert person.hear("agent")["event"] == "connected"
        person.tell("agent", "register")
        assert person.hear("agent") == {"event": "registered", "ok": True}

    def call(self, *command: str) -> dict[str, object]:
        """Start a command of which polkit asks the agent; gives the dialog."""
        self.person.spawn("call", "hostimagectl", "--json", *command)
        dialog = self.person.hear("agent")
        assert dialog["event"] == "begin"
        return dialog


@pytest.fixture
def desktop(user: Person, container: Container) -> Desktop:
    return Desktop(user, container)


def test_a_dialog_says_what_for(container: Container, desktop: Desktop) -> None:
    dialog = desktop.call("pull", OTHER)
    assert dialog["action"] == f"{BUS_NAME}.switch-image"
    assert dialog["message"] == f"Authentication is required to download the operating system image {OTHER}"
    assert dialog["uids"] == [int(container.run("id", "--user", ADMINISTRATOR).out)]
    desktop.person.tell("agent", "dismiss")
    assert desktop.person.ended("call") == DENIED


def test_a_dialog_that_is_cancelled(container: Container, desktop: Desktop) -> None:
    since = container.cursor()
    desktop.call("hold", "1h")
    desktop.person.tell("agent", "dismiss")
    assert desktop.person.ended("call") == DENIED
    assert "verdict=dismissed" in container.journal(since=since)
    assert holds(container) == []


def test_a_dialog_goes_away_with_who_asked_for_it(desktop: Desktop) -> None:
    dialog = desktop.call("hold", "1h")
    desktop.person.end("call")
    assert desktop.person.hear("agent") == {"event": "cancelled", "cookie": dialog["cookie"]}


def test_a_dialog_goes_away_with_its_session(container: Container) -> None:
    """Somebody logs out while a dialog is open: that is no yes, and nothing waits any more."""
    since = container.cursor()
    with logged_in(container, USER) as person:
        Desktop(person, container).call("hold", "1h")
    assert holds(container) == []
    assert "granted" not in container.journal(since=since)


def test_a_dialog_that_nobody_answers_keeps_nobody_waiting(container: Container, desktop: Desktop) -> None:
    """While one person's dialog is open, others are served: another user, and that user elsewhere."""
    desktop.call("hold", "1h")
    assert container.service("nobody", "hostimagectl", "status").code == OK
    assert container.run("hostimagectl", "hold", "2h").code == OK
    assert container.run("hostimagectl", "release").code == OK
    assert desktop.person.run("hostimagectl", "check").code == OK
    desktop.person.end("call")
    assert desktop.person.hear("agent")["event"] == "cancelled"


def test_a_job_of_root_is_cancelled_from_the_screen_only(container: Container) -> None:
    """An endless pull: skopeo waits for somebody to write into a pipe."""
    pipe = container.root / "srv/endless.tar"
    if not pipe.exists():
        os.mkfifo(pipe)
    started = json.loads(
        container.run("hostimagectl", "--json", "pull", "--no-wait", f"oci-archive:/srv/{pipe.name}").out
    )
    number = str(started["job"]["id"])
    with place(container, "seatless") as person:
        assert person.run("hostimagectl", "cancel", number).code == ASKS
    with place(container, "active") as person:
        assert person.run("hostimagectl", "cancel", number).code == OK
    assert json.loads(container.run("hostimagectl", "--json", "jobs").out)["jobs"] == []
