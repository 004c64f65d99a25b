"""What is different between two deployments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hostimage_testing.hosts import OPTIONS, Kind, Loader, RecordedHost
from hostimage_testing.os_images import Recipe
from hostimage_testing.recorded import paths_of
from hostimaged.composefs.repository import Repository
from hostimaged.errors import Cancelled, ImageNotFound, NoSuchDeployment, PreconditionFailed
from hostimaged.host import diff as module
from hostimaged.host.diff import MAX_RESULT, Both, diff, render
from hostimaged.host.read import read_host
from hostimaged.ids import DeploymentId
from hostimaged.progress import Silent

pytestmark = pytest.mark.interop

MakeHost = Callable[..., RecordedHost]
STATUS = "Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: {}\n\n{}"
EXTRA = "Package: new\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n"


def compared(host: RecordedHost, old: str, new: str, reporter: Silent | None = None) -> dict[str, Any]:
    paths = paths_of(host)
    with Repository.open_unlocked(paths.repository) as repository:
        both = Both.read(read_host(paths, repository), DeploymentId(old), DeploymentId(new))
        return diff(repository, both, reporter or Silent())


def two(host: RecordedHost, old: Recipe, new: Recipe) -> tuple[str, str]:
    first = host.deploy(host.image(old), options=(*OPTIONS, "only=old"))
    second = host.deploy(host.image(new), options=(*OPTIONS, "only=new", "quiet"))
    host.live(second, first)
    host.booted(second)
    return first.id, second.id


def test_files_packages_arguments_and_labels(make: MakeHost) -> None:
    host = make()
    old = {
        "var/lib/dpkg/status": STATUS.format("5.1", ""),
        "usr/bin/x": "1" * 100,
        "usr/old/a": "a",
        "opt/z": "z",
    }
    new = {
        "var/lib/dpkg/status": STATUS.format("5.2", EXTRA),
        "usr/bin/x": "2" * 100,
        "opt/z/deep/b": "b" * 7,
    }
    first, second = two(
        host,
        Recipe("1", files={name: text.encode() for name, text in old.items()}),
        Recipe("2", files={name: text.encode() for name, text in new.items()}),
    )
    found = compared(host, first, second)
    assert found["from"]["id"] == first
    assert (found["from"]["version"], found["to"]["version"]) == ("1", "2")
    assert found["to"]["image-digest"].startswith("sha256:")
    rows = {path: kind for kind, path in found["files"]["list"]}
    assert rows["/usr/bin/x"] == "changed"
    assert rows["/usr/old/"] == "removed"
    assert rows["/opt/z/"] == "added"
    assert ["removed", "/opt/z"] in found["files"]["list"]
    assert "/usr/old/a" not in rows
    assert found["files"]["added-bytes"] == 7
    assert found["files"]["removed-bytes"] == 2
    # /opt/z, /usr/old and a; /opt/z, deep/b.
    assert (found["files"]["removed"], found["files"]["added"]) == (3, 2)
    assert found["packages"]["list"] == [
        ["changed", "bash:amd64", "5.1", "5.2"],
        ["added", "new:all", "", "1"],
    ]
    assert found["kernel-arguments"] == {"added": ["only=new", "quiet"], "removed": ["only=old"]}
    assert ["changed", "org.opencontainers.image.version", "1", "2"] in found["labels"]["list"]
    assert (found["problems"], found["truncated"]) == ([], False)
    back = compared(host, second, first)
    assert back["files"]["added"] == found["files"]["removed"]
    assert back["kernel-arguments"]["added"] == ["only=old"]


def test_arguments_within_ukis(make: MakeHost) -> None:
    host = make(Kind(Loader.SYSTEMD, uki=True))
    first, second = two(host, Recipe("1", uki_cmdline="rw a"), Recipe("2", uki_cmdline="rw b"))
    assert compared(host, first, second)["kernel-arguments"] == {"added": ["b"], "removed": ["a"]}


def test_what_cannot_be_compared_is_said(make: MakeHost) -> None:
    host = make(Kind(Loader.SYSTEMD, uki=True))
    broken = {"usr/share/rpm/rpmdb.sqlite": b"junk" * 100}
    first, second = two(host, Recipe("1", files=broken), Recipe("2"))
    host.origin(first).unlink()
    for path in host.uki_dir.glob(f"*{first}*"):
        path.unlink()
    found = compared(host, first, second)
    assert len(found["problems"]) == 3
    assert found["files"]["list"]


def test_a_large_result_is_cut_and_says_so(make: MakeHost) -> None:
    host = make()
    many = {f"usr/lib/{number:04d}{'é' * 40}": b"x" for number in range(8000)}
    first, second = two(host, Recipe("1"), Recipe("2", files=many))
    found = compared(host, first, second)
    assert found["truncated"]
    assert found["files"]["added"] >= 8000
    assert 0 < len(found["files"]["list"]) < 8000
    assert len(render(found).encode()) < MAX_RESULT


def test_parts_together_stay_within_the_bound() -> None:
    room = module._FILES + module._PACKAGES + module._ARGUMENTS + module._LABELS
    assert room + 32 * 1024 <= MAX_RESULT


def test_errors(make: MakeHost) -> None:
    host = make()
    first, second = two(host, Recipe("1"), Recipe("2"))
    with pytest.raises(PreconditionFailed):
        compared(host, first, first)
    with pytest.raises(NoSuchDeployment):
        compared(host, first, "e" * 128)

    class Stop(Silent):
        def at(self, point: str) -> None:
            raise Cancelled

    with pytest.raises(Cancelled):
        compared(host, first, second, Stop())
    (host.repository / "images" / first).unlink()
    with pytest.raises(ImageNotFound):
        compared(host, first, second)
