"""Host paths: a scratch host lies wholly below its root, and nobody else names absolute paths."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from hostimage_testing.tools import REPOSITORY_ROOT
from hostimaged.system.paths import HostPaths


def every_path(paths: HostPaths) -> list[Path]:
    found: list[Path] = []
    values = [getattr(paths, f.name) for f in dataclasses.fields(paths)]
    values += [getattr(paths.containers, f.name) for f in dataclasses.fields(paths.containers)]
    values += [getattr(paths, name) for name, kind in vars(HostPaths).items() if isinstance(kind, property)]
    for value in values:
        found += [p for p in (value if isinstance(value, tuple) else (value,)) if isinstance(p, Path)]
    return found


def test_scratch_lies_below_its_root(tmp_path: Path) -> None:
    paths = every_path(HostPaths.scratch(tmp_path))
    assert len(paths) > 20
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_live_host() -> None:
    live = HostPaths.live()
    assert live.repository == Path("/sysroot/composefs")
    assert live.run_dir == Path("/run/hostimaged")
    assert live.state == Path("/sysroot/state/hostimaged")
    assert live.settings[0] == Path("/etc/hostimaged.toml")
    assert not live.containers.explicit


def test_target_has_no_running_system(tmp_path: Path) -> None:
    target = HostPaths.target(tmp_path, tmp_path / "boot", None)
    assert (target.marker_dir, target.cmdline, target.boot_id, target.efivars) == (None,) * 4
    assert target.run_dir == tmp_path / "state/hostimaged/run"


#: Not places of the host: what images have, and what people are told.
PATHS_IN_IMAGES = [
    "bootimage.py: /usr/lib/os-release",
    "etcplan.py: /etc/",
    "kargs.py: /usr/lib/bootc/kargs.d",
    "selinux.py: /etc/selinux",
]


def test_only_the_paths_module_names_host_paths() -> None:
    """Absolute paths into the host, as string constants that are not docstrings."""
    offending = []
    for source in (REPOSITORY_ROOT / "daemon").rglob("*.py"):
        if source.name == "paths.py":
            continue
        tree = ast.parse(source.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        offending += [
            f"{source.name}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and ":" not in node.value  # a search path for programs
            and node.value.startswith(("/etc/", "/usr/", "/run/", "/sysroot", "/var/", "/boot", "/efi"))
        ]
    assert sorted(offending) == PATHS_IN_IMAGES
