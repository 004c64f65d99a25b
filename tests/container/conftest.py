"""One installed root for all tests here, booted once with each bus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimage_testing import tars
from hostimage_testing.container import BUSES, Container, booted, prepare
from hostimage_testing.debian_root import USER
from hostimage_testing.layout import Layout
from hostimage_testing.person import Person, logged_in

#: The tracked image, in files that only root can write, and one that nobody tracks.
TRACKED, OTHER = "oci:/srv/os:latest", "oci:/srv/other:latest"
_SETTINGS = f'verity = "opportunistic"\ntracked-image = "{TRACKED}"\n'
_POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}\n'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder; a boot, and dialogs with their delays, take their time."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.container)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian root with the project installed, settings, and images to pull."""
    directory = tmp_path_factory.mktemp("container")
    cache = os.environ.get("HOSTIMAGE_TEST_CACHE")
    root = prepare(directory, Path(cache) / "container" if cache else directory)
    (root / "etc/hostimaged.toml").write_text(_SETTINGS)
    (root / "etc/containers").mkdir(exist_ok=True)
    (root / "etc/containers/policy.json").write_text(_POLICY)
    for name in ("os", "other"):
        layout = Layout(root / "srv" / name)
        content = tars.directory(b"usr") + tars.file(b"usr/name", name.encode() * 1000, mode=0o644)
        layout.image("latest", [layout.layer(content + tars.END)])
    yield root
    shutil.rmtree(directory)


@pytest.fixture(scope="session", params=BUSES)
def container(request: pytest.FixtureRequest, root: Path) -> Iterator[Container]:
    """The root, booted; without a repository at first."""
    shutil.rmtree(root / "sysroot", ignore_errors=True)
    (root / "sysroot").mkdir(mode=0o755)
    with booted(root, request.param) as container:
        yield container


@pytest.fixture(autouse=True)
def polkit(container: Container) -> None:
    """A polkitd that answers: one that is stuck would fail all tests from there on."""
    if not container.polkit_answers():
        print("polkitd was stuck:", container.threads("polkit.service"), container.journal("polkit.service"))
        container.run("systemctl", "restart", "polkit.service")


@pytest.fixture
def user(container: Container) -> Iterator[Person]:
    """Somebody who sits at the computer and knows no password."""
    with logged_in(container, USER) as person:
        yield person
