"""The wheel puts every file at its place."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest

from hostimage_testing.tools import REPOSITORY_ROOT
from hostimage_testing.wheel import SHARED_DATA, build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a freshly built wheel."""
    built = build_wheel(tmp_path_factory.mktemp("wheel"))
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_system_files_are_where_bus_and_systemd_look(wheel: set[str]) -> None:
    prefix = ".data/data/"
    found = {name.split(prefix)[1] for name in wheel if prefix in name}
    assert found == SHARED_DATA


def test_packages_are_complete(wheel: set[str]) -> None:
    """Every module and data file of the three packages is in the wheel, and no test or source root is."""
    for source in ("daemon/hostimaged", "client/hostimagectl", "dbus/hostimage_dbus"):
        root = REPOSITORY_ROOT / source
        files = {
            str(Path(root.name) / path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".1"
        }
        assert files <= wheel
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if "." not in top} == {"hostimaged", "hostimagectl", "hostimage_dbus"}


def test_shared_data_sources_exist() -> None:
    project = tomllib.loads((REPOSITORY_ROOT / "pyproject.toml").read_text())
    for source in project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]:
        assert (REPOSITORY_ROOT / source).is_file(), source
