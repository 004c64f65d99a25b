"""What can be reached by a soft reboot, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostimage_testing.hosts import OPTIONS, Deployment, Kind, Loader, RecordedHost
from hostimage_testing.os_images import Recipe
from hostimage_testing.recorded import paths_of, row_of, state_of
from hostimaged.errors import PreconditionFailed
from hostimaged.host.model import SoftReboot
from hostimaged.host.softcheck import policy_digest, require_systemd

pytestmark = pytest.mark.interop

MakeHost = Callable[..., RecordedHost]
CONFIG = b"# which\nSELINUX=enforcing\nSELINUXTYPE=targeted\n"
CONTEXTS = "selinux/targeted/contexts/files/file_contexts"


def policy(content: bytes, **more: bytes) -> dict[str, bytes]:
    """A policy that labels and is loaded; ``more`` are other versions of it."""
    return {
        "selinux/config": CONFIG,
        CONTEXTS: b"/.* system_u:object_r:any_t:s0\n",
        "selinux/targeted/policy/policy.33": content * 100,
        **{f"selinux/targeted/policy/{name}": data for name, data in more.items()},
    }


def selinux(host: RecordedHost) -> None:
    file = host.root / "sys/fs/selinux/enforce"
    file.parent.mkdir(parents=True)
    file.write_text("1")


def both(host: RecordedHost, old: Recipe, new: Recipe, **options: tuple[str, ...]) -> SoftReboot:
    """Whether the older one can be reached from the newer one; kernels are the same."""
    first = host.deploy(host.image(old), **options)  # type: ignore[arg-type]
    second: Deployment = host.deploy(host.image(new))
    host.live(second, first)
    host.booted(second)
    state = state_of(host)
    assert row_of(state, second).soft_reboot == SoftReboot(False, "it runs already")
    return row_of(state, first).soft_reboot


def test_the_same_kernel_and_arguments(make: MakeHost, kind: Kind) -> None:
    assert both(make(kind), Recipe("1"), Recipe("2")) == SoftReboot(True)


def test_other_arguments(make: MakeHost) -> None:
    found = both(make(), Recipe("1"), Recipe("2"), options=(*OPTIONS[:-1], "console=ttyS1"))
    assert found == SoftReboot(False, "its kernel arguments are others")


def test_other_arguments_within_a_uki(make: MakeHost) -> None:
    kind = Kind(Loader.SYSTEMD, uki=True)
    found = both(make(kind), Recipe("1", uki_cmdline="rw quiet"), Recipe("2", uki_cmdline="rw debug"))
    assert found == SoftReboot(False, "its kernel arguments are others")


def test_a_uki_that_is_gone(make: MakeHost) -> None:
    host = make(Kind(Loader.SYSTEMD, uki=True))
    first, second = (host.deploy(host.image(Recipe(version))) for version in "12")
    host.live(second, first)
    host.booted(second)
    host.artifact(first).unlink()
    found = row_of(state_of(host), first).soft_reboot
    assert not found.capable
    assert "UKI cannot be read" in found.reason


def test_the_policy_does_not_matter_without_selinux(make: MakeHost) -> None:
    assert both(make(), Recipe("1", etc=policy(b"one")), Recipe("2", etc=policy(b"two"))).capable


@pytest.mark.parametrize(
    ("old", "new", "capable"),
    [
        (policy(b"one"), policy(b"one"), True),
        (policy(b"one"), policy(b"two"), False),
        (policy(b"one", **{"policy.9": b"x" * 100}), policy(b"one", **{"policy.34~": b"y" * 100}), True),
        (policy(b"one", **{"policy.100": b"x" * 100}), policy(b"one"), False),
        ({}, {}, True),
        ({}, policy(b"one"), False),
        (policy(b"one"), {}, False),
    ],
    ids=["same", "another", "older-version", "newer-version", "none", "new-only", "old-only"],
)
def test_the_same_policy(make: MakeHost, old: dict[str, bytes], new: dict[str, bytes], capable: bool) -> None:
    host = make()
    selinux(host)
    found = both(host, Recipe("1", etc=old), Recipe("2", etc=new))
    assert found == SoftReboot(capable, "" if capable else "its SELinux policy is another")


def test_the_policy_that_runs_counts_not_that_of_its_image(make: MakeHost) -> None:
    host = make()
    selinux(host)
    assert both(host, Recipe("1", etc=policy(b"one")), Recipe("2", etc=policy(b"one"))).capable
    (host.root / "etc/selinux/targeted/policy/policy.33").write_bytes(b"built here" * 100)
    first = next(row for row in state_of(host).visible if not row.default)
    assert first.soft_reboot.reason == "its SELinux policy is another"


def test_a_type_that_leads_elsewhere_is_none() -> None:
    class Files:
        def read(self, path: str, limit: int, *, follow: bool = True) -> bytes | None:
            return b"SELINUXTYPE=../../x\n"

        def names(self, path: str) -> list[bytes]:
            raise AssertionError(path)

        def open(self, path: str) -> int | None:
            raise AssertionError(path)

    assert policy_digest(Files(), "etc/") == ""


def test_systemd_must_know_soft_reboots(make: MakeHost) -> None:
    host = make()
    with pytest.raises(PreconditionFailed, match="254"):
        require_systemd(paths_of(host).usr)
    target = host.root / "usr/lib/systemd/system/soft-reboot.target"
    target.parent.mkdir(parents=True)
    target.write_text("")
    require_systemd(paths_of(host).usr)
