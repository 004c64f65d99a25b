"""After a boot: what was promised for it is compared with what runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostimage_testing.hosts import KINDS, Kind, Loader, RecordedHost
from hostimage_testing.lives import Life, staged, upgraded
from hostimage_testing.operating import session
from hostimage_testing.os_images import Recipe
from hostimaged.errors import HostimageError
from hostimaged.host import bootcheck, failedboots, lastshutdown, reorder
from hostimaged.host.commands import boot_check_main
from hostimaged.host.finalize import finalize
from hostimaged.host.imgref import OriginReference
from hostimaged.host.stage import StageRequest, stage, unlock
from hostimaged.ids import ManifestDigest
from hostimaged.system.boot import read_boot_id
from hostimaged.system.paths import HostPaths

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]
REFERENCE = OriginReference.parse("ostree-unverified-image:docker://registry.example/os:stable")
JOURNAL = "/etc/os.conf is a file here and a directory there"


@pytest.fixture(params=KINDS, ids=str)
def host(request: pytest.FixtureRequest, tmp_path: Path, cfsctl: str) -> RecordedHost:
    return RecordedHost(tmp_path / "host", cfsctl, kind=request.param)


def check(host: RecordedHost, cause: Callable[[], str] = lambda: "") -> dict[str, Any]:
    paths = HostPaths.scratch(host.root)
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    return bootcheck.check(paths, read_boot_id(paths.boot_id), 1_767_225_600, cause)


def told(host: RecordedHost) -> dict[str, Any] | None:
    path = host.root / "run/hostimaged/boot.json"
    return json.loads(path.read_text()) if path.exists() else None


def finalized(host: RecordedHost) -> Life:
    life = staged(host)
    with session(host) as opened:
        assert finalize(opened)["result"] == "finalized"
    return life


def test_an_update_that_runs_is_as_expected(host: RecordedHost) -> None:
    life = finalized(host)
    expected = bootcheck.read_expected(HostPaths.scratch(host.root))
    assert expected is not None
    assert life.staged is not None
    assert str(expected.deployment) == life.staged.id
    # Before the reboot it says nothing yet, and stays.
    assert check(host) == {"result": "as-expected"}
    assert host.reboot() == life.staged.id
    assert check(host) == {"result": "as-expected"}
    assert told(host) is None
    # Whatever is chosen in the menu of later boots is not promised by anybody.
    host.booted(life.booted)
    assert check(host) == {"result": "as-expected"}


def test_an_update_that_does_not_run_is_told(host: RecordedHost) -> None:
    life = finalized(host)
    assert life.staged is not None
    host.reboot()
    host.booted(life.booted)
    found = check(host, lambda: "")
    assert (found["result"], found["deployment"]) == ("not-booted", life.staged.id)
    assert life.booted.id in found["message"]
    document = told(host)
    assert document is not None
    assert document["boot_id"] == (host.root / "proc/sys/kernel/random/boot_id").read_text().strip()
    assert (document["deployment"], document["message"]) == (life.staged.id, found["message"])
    assert check(host) == {"result": "as-expected"}, "it is told once"


def test_a_rollback_is_promised_too(host: RecordedHost) -> None:
    life = upgraded(host)
    with session(host) as opened:
        target = reorder.rollback(opened)["deployment"]
    assert host.reboot() == target
    host.booted(life.booted)
    assert check(host)["deployment"] == target


@pytest.mark.parametrize("said", ["", JOURNAL])
def test_what_was_not_activated_is_told_with_its_cause(host: RecordedHost, said: str) -> None:
    life = staged(host)
    assert life.staged is not None
    # A power cut, or a finalizer that failed: the marker is gone, the entries are there.
    assert host.reboot() == life.booted.id
    assert host.entries_staged.exists()
    found = check(host, lambda: said)
    assert (found["result"], found["deployment"]) == ("not-activated", life.staged.id)
    assert f"hostimagectl stage {life.staged.image.manifest_digest}" in found["message"]
    assert found["message"].endswith(said)


def test_where_the_image_is_not_known_the_newest_is_offered(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    assert host.reboot() == life.booted.id
    host.origin(life.staged).unlink()
    assert check(host)["message"].endswith("hostimagectl upgrade")


def test_an_activation_that_was_cut_short_is_as_expected(host: RecordedHost) -> None:
    """The old menu is still there under the name of the staged one."""
    life = staged(host)
    assert life.staged is not None

    class Cut:
        def __getattr__(self, name: str) -> Any:
            return lambda *_args, **_more: None

        def at(self, point: str) -> None:
            if point == "finalize.marker":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), session(host, Cut()) as opened:  # type: ignore[arg-type]
        finalize(opened)
    assert host.entries_staged.exists()
    assert host.reboot() == life.staged.id
    assert check(host) == {"result": "as-expected"}


def test_what_was_to_be_downloaded_only_is_as_expected(host: RecordedHost) -> None:
    life = staged(host, locked=True)
    with session(host) as opened:
        assert finalize(opened)["result"] == "download-only"
    assert host.reboot() == life.booted.id
    paths = HostPaths.scratch(host.root)
    assert check(host) == {"result": "as-expected"}
    assert told(host) is None
    assert not paths.held_back.exists(), "it is for one boot"
    assert check(host)["result"] == "not-activated"


def test_a_download_is_forgotten_without_an_orderly_shutdown_too(host: RecordedHost) -> None:
    life = upgraded(host)
    image = host.image(Recipe(version="3", kernel=b"kernel three "))
    request = StageRequest(ManifestDigest(image.manifest_digest), REFERENCE, locked=True)
    with session(host) as opened:
        assert stage(opened, request)["result"] == "staged"
    assert host.reboot() == life.booted.id
    assert check(host) == {"result": "as-expected"}
    # Unlocked it is promised.
    with session(host) as opened:
        assert stage(opened, request)["result"] == "staged"
        assert unlock(opened)["result"] == "staged"
    assert host.reboot() == life.booted.id
    assert check(host)["result"] == "not-activated"
    with session(host) as opened:
        assert stage(opened, request)["result"] == "staged"
        assert stage(opened, replace(request, locked=False))["result"] == "already-staged"
    assert host.reboot() == life.booted.id
    assert check(host)["result"] == "not-activated"


def test_another_tool_may_decide_otherwise(host: RecordedHost) -> None:
    """What we promised last is not what boots next: no failure, and no image is suspected."""
    life = upgraded(host)
    with session(host) as opened:
        reorder.rollback(opened)
        reorder.cancel_rollback(opened)
    assert life.rollback is not None
    expected = bootcheck.read_expected(HostPaths.scratch(host.root))
    assert expected is not None
    assert str(expected.deployment) == life.booted.id
    # As bootc rolls back, which knows nothing of the promise.
    promise = HostPaths.scratch(host.root).expected_boot
    written = promise.read_bytes()
    with session(host) as opened:
        reorder.rollback(opened)
    promise.write_bytes(written)
    assert host.reboot() == life.rollback.id
    assert check(host) == {"result": "as-expected"}
    assert failedboots.read(HostPaths.scratch(host.root)) == ()


def test_one_whose_tries_are_used_up_did_not_start(tmp_path: Path, cfsctl: str) -> None:
    """systemd-boot itself puts it last."""
    host = RecordedHost(tmp_path / "host", cfsctl, kind=Kind(Loader.SYSTEMD))
    life = finalized(host)
    assert life.staged is not None
    first = next(path for path in host.entries.iterdir() if life.staged.id in path.read_text())
    first.rename(first.with_name(first.name.removesuffix(".conf") + "+0-3.conf"))
    host.booted(life.booted)
    assert check(host)["deployment"] == life.staged.id


def test_getting_there_later_ends_the_complaint(host: RecordedHost) -> None:
    life = staged(host)
    assert life.staged is not None
    assert host.reboot() == life.booted.id
    assert check(host)["result"] == "not-activated"
    assert told(host) is not None
    host.live(life.staged, life.booted)
    host.discard_staged()
    host.booted(life.staged, soft_from=life.booted)
    assert check(host) == {"result": "as-expected"}
    assert told(host) is None


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"version": 1, "deployment": "x"}', "[" * 4000])
def test_a_damaged_promise_is_none(tmp_path: Path, cfsctl: str, content: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    upgraded(host)
    paths = HostPaths.scratch(host.root)
    paths.expected_boot.parent.mkdir(parents=True, exist_ok=True)
    paths.expected_boot.write_text(content)
    assert bootcheck.read_expected(paths) is None
    assert check(host) == {"result": "as-expected"}


def test_an_activation_does_not_fail_for_a_promise(tmp_path: Path, cfsctl: str) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    upgraded(host)
    paths = HostPaths.scratch(host.root)
    paths.expected_boot.mkdir(parents=True)
    with session(host) as opened:
        assert reorder.rollback(opened)["result"] == "queued"


def test_the_command(
    tmp_path: Path, cfsctl: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = RecordedHost(tmp_path / "host", cfsctl, kind=KINDS[0])
    life = staged(host)
    assert life.staged is not None
    host.reboot()
    programs = tmp_path / "bin"
    programs.mkdir()
    journal = programs / "journalctl"
    journal.write_text(f"#!/bin/sh\necho starting\necho 'hostimaged: {JOURNAL}'\necho 'it failed'\n")
    journal.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    assert boot_check_main(["--root", str(host.root)]) == 0
    out, err = capsys.readouterr()
    assert out == f"not-activated {life.staged.id}\n"
    assert JOURNAL in err
    document = told(host)
    assert document is not None
    assert JOURNAL in document["message"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo one; echo two", "two"),
        ("echo 'error: no space'; echo 'Deactivated.'", "error: no space"),
        ("exit 1", ""),
        ("head -c 1000000 /dev/zero; echo", "\0" * 65536),
        ("printf '\\377\\n'", "\ufffd"),
    ],
)
def test_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    journal = tmp_path / "journalctl"
    journal.write_text(f"#!/bin/sh\n{script}\n")
    journal.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert lastshutdown.last_words() == words


def test_without_a_journal_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any, **_more: Any) -> Any:
        raise HostimageError("not there")

    monkeypatch.setattr(lastshutdown, "spawn", missing)
    assert lastshutdown.last_words() == ""
