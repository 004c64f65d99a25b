"""Every member with every option, for root, an authorised user, one who must authenticate first, and nobody.

The tables are the specification's, written down a second time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import load_shipped
from hostimage_dbus.names import (
    BUS_NAME,
    DEPLOYMENT_INTERFACE,
    MANAGER_INTERFACE,
    ROOT_PATH,
)
from hostimage_dbus.transport import BusError
from hostimage_testing.bus import PATIENCE, Bus, Client, Daemon, variants
from hostimage_testing.host import ACCEPT_ANYTHING
from hostimage_testing.polkit_double import Answer, PolkitDouble
from hostimage_testing.users import NEEDS_ROOT, user

# Each call that is let through starts a job, and there are hundreds.
pytestmark = [*NEEDS_ROOT, pytest.mark.timeout(300)]
OURS = "org.hostimage1."
REBOOT = "org.freedesktop.login1.reboot-multiple-sessions"
TRACKED = "docker://registry.example/os:latest"
DIGEST = {name: "sha256:" + name * 64 for name in "abcd"}
DEPLOYMENTS = [
    {"id": "1" * 128, "image-digest": DIGEST["a"], "booted": True},
    {
        "id": "2" * 128,
        "image-digest": DIGEST["b"],
        "is-rollback": True,
        "soft-reboot-capable": True,
        "order": 1,
    },
]
IMAGES = [
    {"tag": "new", "manifest-digest": DIGEST["c"], "reference": TRACKED, "pulled": 200},
    {"tag": "old", "manifest-digest": DIGEST["a"], "reference": TRACKED, "pulled": 100},
    {"tag": "foreign", "manifest-digest": DIGEST["d"]},
]
FIRST = f"{ROOT_PATH}/deployments/_{'1' * 32}"
SECOND = f"{ROOT_PATH}/deployments/_{'2' * 32}"


@dataclass(frozen=True)
class Case:
    """A call, and what the specification says of it; ``error`` is the name of one that it always gives."""

    member: str
    signature: str
    body: tuple[Any, ...]
    actions: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    interface: str = MANAGER_INTERFACE
    path: str = ROOT_PATH

    @property
    def result(self) -> str:
        """Error name, or "" for success."""
        if self.member == "SetKernelArguments" and self.options.get("apply") == "soft-reboot":
            return ErrorName.PRECONDITION_FAILED
        return self.error

    @property
    def title(self) -> str:
        shown = ",".join(f"{key}={value}"[:24] for key, value in self.options.items())
        return f"{self.member}({'/'.join(str(b)[:14] for b in self.body)}){shown}"

    async def call(self, client: Client, *, interactive: bool = False) -> str:
        """Error name, or "" for success."""
        body = [*self.body, variants(self.options)] if self.signature.endswith("a{sv}") else [*self.body]
        try:
            await client.connection.call(
                BUS_NAME,
                self.path,
                self.interface,
                self.member,
                self.signature,
                body,
                timeout=PATIENCE,
                interactive=interactive,
            )
        except BusError as error:
            return error.name
        return ""


JOB = {"client-id": "me", "queue": True, "no-join": False}
CHECK = JOB | {"background": True, "allow-metered": True, "allow-on-battery": True}
#: Options that change nothing about who may, those that need switch-image, those that need a reboot.
PULL = CHECK | {"expect-digest": DIGEST["a"], "sharing": "require"}
SWITCHING = {"allow-downgrade": True}
APPLY = {"apply": "reboot"}


def calls(member: str, signature: str, body: tuple[Any, ...], action: str, **more: Any) -> list[Case]:
    """A call without options, and one for each option that it takes."""
    plain = more.pop("options", JOB)
    raising = more.pop("raising", {})
    reboots = more.pop("reboots", {})
    cases = [Case(member, signature, body, (OURS + action,), **more)]
    cases += [Case(member, signature, body, (OURS + action,), {k: v}, **more) for k, v in plain.items()]
    cases += [
        Case(member, signature, body, (f"{OURS}switch-image",), {k: v}, **more) for k, v in raising.items()
    ]
    for value in ("reboot", "soft-reboot") if reboots else ():
        cases.append(Case(member, signature, body, (OURS + action, REBOOT), {"apply": value}, **more))
    if reboots:
        cases.append(Case(member, signature, body, (OURS + action,), {"apply": "none"}, **more))
    return cases


def unified(case: Case) -> Case:
    return Case(case.member, case.signature, case.body, case.actions, {"unified": True})


OTHER = "docker://registry.example/other"
DEP: dict[str, Any] = {"interface": DEPLOYMENT_INTERFACE, "path": FIRST}
RETRY = {"retry-failed": True}
CLIENT = {"client-id": "me"}
STAGE = JOB | {"expect-digest": DIGEST["c"], "download-only": True}
CASES = [
    *calls("Check", "sa{sv}", ("",), "check", options=CHECK),
    *calls("Check", "sa{sv}", (OTHER,), "switch-image", options=CHECK),
    *calls("Pull", "sa{sv}", ("",), "update", options=PULL, raising=RETRY),
    *calls("Pull", "sa{sv}", (OTHER,), "switch-image", options=PULL, raising=RETRY),
    *(unified(c) for c in calls("Pull", "sa{sv}", ("",), "update", options={})),
    *calls(
        "Upgrade", "a{sv}", (), "update",
        options=PULL | {"unified": True, "download-only": True, "from-downloaded": True},
        raising=RETRY | SWITCHING, reboots=APPLY,
    ),
    *calls("Stage", "sa{sv}", (DIGEST["c"],), "update", options=STAGE, raising=SWITCHING, reboots=APPLY),
    *calls("Stage", "sa{sv}", (TRACKED,), "update", options=JOB),
    *calls("Stage", "sa{sv}", ("old",), "switch-image", options=JOB, raising=SWITCHING, reboots=APPLY),
    # What updates would follow is not known.
    Case("Stage", "sa{sv}", ("foreign",), (), error=ErrorName.INVALID_ARGS),
    *calls(
        "Switch", "sa{sv}", (OTHER,), "switch-image",
        options=PULL | {"unified": True, "download-only": True}, raising=RETRY | SWITCHING, reboots=APPLY,
    ),
    *calls("Rollback", "a{sv}", (), "rollback", reboots=APPLY),
    *calls("Unstage", "a{sv}", (), "rollback"),
    *calls("CancelRollback", "a{sv}", (), "rollback"),
    *calls("CollectGarbage", "a{sv}", (), "cleanup", options=JOB | {"background": True}),
    Case("CollectGarbage", "a{sv}", (), (f"{OURS}check",), {"dry-run": True}),
    Case("CollectGarbage", "a{sv}", (), (f"{OURS}cleanup",), {"dry-run": False}),
    *calls("VerifyRepository", "a{sv}", (), "cleanup", options=JOB | {"background": True}),
    *calls("Repair", "a{sv}", (), "cleanup", options=JOB | {"dry-run": True}),
    *calls("Explain", "sa{sv}", ("x",), "check"),
    *calls("SetKernelArguments", "asasa{sv}", (["a=b"], []), "switch-image", reboots=APPLY),
    *calls("SetUnified", "ba{sv}", (True,), "configure"),
    *calls("SetUpdatePolicy", "sa{sv}", ("stage",), "configure", options=CLIENT),
    *calls("HoldUpdates", "tsa{sv}", (0, "why"), "configure", options=CLIENT),
    Case("Reload", "", (), (f"{OURS}configure",)),
    *calls("SetPinned", "ba{sv}", (True,), "configure", **DEP),
    *calls("Delete", "a{sv}", (), "cleanup", **DEP),
    *calls("MakeDefault", "a{sv}", (), "rollback", reboots=APPLY, **DEP),
    *calls("Diff", "oa{sv}", (SECOND,), "check", **DEP),
    # Open to everybody.
    *(
        Case(member, signature, body, (), options)
        for member, signature, body in [
            ("GetStatus", "sa{sv}", ("native",)),
            ("GetDeployment", "sa{sv}", ("booted",)),
            ("ListImages", "a{sv}", ()),
        ]
        for options in ({}, CLIENT)
    ),
    Case("GetStatus", "sa{sv}", ("bootc-v1",), ()),
    Case("ListJobs", "", (), ()),
]  # fmt: skip


def test_the_table_has_every_member() -> None:
    shipped = load_shipped()
    members = {
        (name, member)
        for name in (MANAGER_INTERFACE, DEPLOYMENT_INTERFACE)
        for member in shipped[name].methods
    }
    assert {(case.interface, case.member) for case in CASES} == members


@pytest_asyncio.fixture
async def host(daemon: Daemon, client: Client) -> AsyncIterator[Daemon]:
    """A host with two deployments and a tracked image from an authenticated registry."""
    containers = daemon.root / "etc/containers"
    containers.mkdir(parents=True)
    (containers / "policy.json").write_text(ACCEPT_ANYTHING)
    daemon.settings(f'tracked-image = "{TRACKED}"\n')
    daemon.findings(deployments=DEPLOYMENTS, images=IMAGES)
    await daemon.start()
    await client.until(lambda: len(client.named("InterfacesAdded")) >= 2)
    yield daemon


async def drain(client: Client) -> None:
    """Wait until no job waits, so that a user's limit is not reached."""
    jobs = [row[3] for row in await client.manager("ListJobs")]
    for path in jobs:
        await client.removed(path)


@pytest.mark.timeout(400)
async def test_root_needs_nobodys_leave(host: Daemon, client: Client) -> None:
    for case in CASES:
        assert await case.call(client) == case.result, case.title
        await drain(client)


@pytest.mark.timeout(400)
async def test_an_authorised_user(host: Daemon, bus: Bus, client: Client) -> None:
    async with PolkitDouble.connect(bus.address, Answer.YES) as polkit, user(bus) as active:
        for case in CASES:
            polkit.checks.clear()
            assert await case.call(active, interactive=True) == case.result, case.title
            assert tuple(check.action for check in polkit.checks) == case.actions, case.title
            for check in polkit.checks:
                assert check.caller == await client.owner(), case.title
                assert (check.subject_kind, check.subject) == (
                    "system-bus-name",
                    {"name": active.connection.unique_name},
                )
                assert check.flags == 1
            await drain(client)


async def test_one_who_would_have_to_authenticate(host: Daemon, bus: Bus) -> None:
    """Whoever is not at the screen, without leave to ask: an error that says so, for the first action."""
    async with PolkitDouble.connect(bus.address, Answer.CHALLENGE) as polkit, user(bus) as inactive:
        for case in CASES:
            polkit.checks.clear()
            expected = ErrorName.AUTHORIZATION_REQUIRED if case.actions else case.result
            assert await case.call(inactive) == expected, case.title
            assert [check.action for check in polkit.checks] == list(case.actions[:1]), case.title
            assert all(check.flags == 0 for check in polkit.checks)
        assert await _count_jobs(inactive) == 0


async def test_nobody(host: Daemon, bus: Bus) -> None:
    async with user(bus) as nobody:
        for answer in (Answer.NO, None):
            if answer is None:
                await _all_denied(nobody)
                continue
            async with PolkitDouble.connect(bus.address, answer):
                await _all_denied(nobody)
        assert await _count_jobs(nobody) == 0


async def _all_denied(nobody: Client) -> None:
    for case in CASES:
        expected = ErrorName.ACCESS_DENIED if case.actions else case.result
        assert await case.call(nobody, interactive=True) == expected, case.title


async def test_reboot_is_asked_for_after_the_action(host: Daemon, bus: Bus) -> None:
    async with PolkitDouble.connect(bus.address, Answer.YES) as polkit, user(bus) as active:
        polkit.answers[REBOOT] = Answer.NO
        for case in CASES:
            if REBOOT in case.actions:
                assert await case.call(active) == ErrorName.ACCESS_DENIED, case.title


async def test_details_are_what_rules_can_decide_by(host: Daemon, bus: Bus) -> None:
    expected: list[tuple[str, str, tuple[Any, ...], dict[str, Any], dict[str, str]]] = [
        ("Pull", "sa{sv}", ("",), {}, {"operation": "pull", "image": TRACKED}),
        (
            "Pull",
            "sa{sv}",
            (OTHER,),
            {"expect-digest": DIGEST["a"]},
            {"operation": "pull", "image": f"{OTHER}:latest", "image-digest": DIGEST["a"]},
        ),
        ("Check", "sa{sv}", ("",), {}, {"operation": "check", "image": TRACKED}),
        (
            "Stage",
            "sa{sv}",
            ("old",),
            {},
            {"operation": "stage", "image": TRACKED, "image-digest": DIGEST["a"]},
        ),
        ("CollectGarbage", "a{sv}", (), {"dry-run": True}, {"operation": "collect"}),
        ("SetKernelArguments", "asasa{sv}", (["x"], []), {}, {"operation": "kargs"}),
    ]
    async with PolkitDouble.connect(bus.address, Answer.NO) as polkit, user(bus) as nobody:
        for member, signature, body, options, details in expected:
            await Case(member, signature, body, (), options).call(nobody)
            told = polkit.checks[-1].details
            assert {key: value for key, value in told.items() if key != "polkit.message"} == details
        await Case("Delete", "a{sv}", (), (), path=FIRST, interface=DEPLOYMENT_INTERFACE).call(nobody)
        assert polkit.checks[-1].details == {"operation": "delete", "deployment": "1" * 128}


@pytest.mark.parametrize(
    ("registries", "tracked", "action"),
    [
        ("", TRACKED, "update"),
        ('[[registry]]\nlocation = "registry.example"\ninsecure = true\n', TRACKED, "switch-image"),
        ("", "oci:/tmp/anybody/may/write", "switch-image"),
        ("", "containers-storage:localhost/os", "switch-image"),
    ],
)
async def test_updates_without_a_password_need_an_authenticated_source(
    host: Daemon, bus: Bus, client: Client, registries: str, tracked: str, action: str
) -> None:
    (host.root / "etc/containers/registries.conf").write_text(registries)
    host.settings(f'tracked-image = "{tracked}"\n')
    await client.manager("Reload")
    async with PolkitDouble.connect(bus.address, Answer.NO) as polkit, user(bus) as active:
        for member, signature, body in [("Upgrade", "a{sv}", ()), ("Pull", "sa{sv}", ("",))]:
            await Case(member, signature, body, ()).call(active)
            assert polkit.checks[-1].action == OURS + action


async def test_what_was_authorised_is_what_is_done(host: Daemon, bus: Bus, client: Client) -> None:
    """The tracked image changes while the dialog is open: the answer was for the other one."""
    async with PolkitDouble.connect(bus.address, Answer.HANG) as polkit, user(bus) as active:
        pulling = asyncio.ensure_future(active.manager("Pull", "sa{sv}", "", {}, interactive=True))
        await polkit.until(lambda p: p.hanging)
        host.settings('tracked-image = "docker://registry.example/another"\n')
        await client.manager("Reload")
        polkit.settle(Answer.YES)
        await polkit.until(lambda p: p.hanging)
        assert [c.details["image"] for c in polkit.checks] == [
            TRACKED,
            "docker://registry.example/another:latest",
        ]
        polkit.settle(Answer.NO)
        with pytest.raises(BusError) as refused:
            await pulling
        assert refused.value.name == ErrorName.ACCESS_DENIED
        assert await _count_jobs(active) == 0


async def _count_jobs(client: Client) -> int:
    document = json.loads(await client.manager("GetStatus", "sa{sv}", "native", {}))
    return len(document["jobs"]) + len(document["results"])
