"""Settings: precedence, and mistakes that cost one setting only."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostimaged.config import Settings, load
from hostimaged.system.paths import HostPaths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("etc/hostimaged.d", "usr/lib/hostimaged.d"):
        (tmp_path / directory).mkdir(parents=True)
    return tmp_path


def settings(root: Path) -> tuple[Settings, list[str]]:
    found, problems = load(HostPaths.scratch(root).settings)
    return found, [f"{Path(p.file).name}: {p.text}" for p in problems]


def test_defaults(tmp_path: Path) -> None:
    found, problems = settings(tmp_path)
    assert problems == []
    assert (found.tracked_image, found.verity, found.lock_timeout, found.log_level) == (
        "",
        "require",
        60.0,
        "info",
    )


def test_all_settings(root: Path) -> None:
    (root / "etc/hostimaged.toml").write_text(
        'tracked-image = "docker://r/os"\nverity = "opportunistic"\nlock-timeout = 5\nlog-level = "debug"\n'
    )
    found, problems = settings(root)
    assert problems == []
    assert (found.tracked_image, found.verity, found.lock_timeout, found.log_level) == (
        "docker://r/os",
        "opportunistic",
        5.0,
        "debug",
    )


def test_drop_ins_win_in_order_of_their_names(root: Path) -> None:
    (root / "etc/hostimaged.toml").write_text('tracked-image = "a:main"\nlock-timeout = 1\n')
    (root / "usr/lib/hostimaged.d/50-vendor.toml").write_text(
        'tracked-image = "a:vendor"\nlog-level = "error"\n'
    )
    (root / "etc/hostimaged.d/10-admin.toml").write_text(
        'tracked-image = "a:admin"\nverity = "opportunistic"\n'
    )
    (root / "etc/hostimaged.d/readme.txt").write_text("no setting")
    found, problems = settings(root)
    assert problems == []
    assert (found.tracked_image, found.lock_timeout) == ("a:vendor", 1.0)
    assert (found.log_level, found.verity) == ("error", "opportunistic")


def test_a_drop_in_of_the_administrator_hides_the_vendors(root: Path) -> None:
    (root / "usr/lib/hostimaged.d/50-a.toml").write_text('tracked-image = "a:vendor"\nlog-level = "error"\n')
    (root / "etc/hostimaged.d/50-a.toml").write_text('log-level = "debug"\n')
    found, _ = settings(root)
    assert (found.tracked_image, found.log_level) == ("", "debug")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("unknown = 1\n", "unknown: unknown setting"),
        ("tracked_image = 'x'\n", "tracked_image: unknown setting"),
        ('verity = "off"\n', "verity: Input should be 'require' or 'opportunistic'"),
        ("lock-timeout = -1\n", "lock-timeout: "),
        ("lock-timeout = inf\n", "lock-timeout: "),
        ("tracked-image = 5\n", "tracked-image: "),
        ('tracked-image = "' + "x" * 5000 + '"\n', "tracked-image: "),
        ("tracked-image = [\n", ""),
        ("\xff", ""),
        ("x = 1\n" * 20000, ""),
        ("a = " + "[" * 10000, ""),
    ],
)
def test_a_mistake_costs_one_setting(root: Path, content: str, problem: str) -> None:
    (root / "etc/hostimaged.toml").write_bytes(content.encode("latin-1"))
    (root / "etc/hostimaged.d/x.toml").write_text('log-level = "debug"\n')
    found, problems = settings(root)
    assert found.log_level == "debug"
    assert (found.tracked_image, found.verity, found.lock_timeout) == ("", "require", 60.0)
    assert len(problems) == 1
    assert problems[0].startswith(f"hostimaged.toml: {problem}")


def test_the_other_settings_of_the_file_count(root: Path) -> None:
    (root / "etc/hostimaged.toml").write_text('wrong = 1\ntracked-image = "a:b"\nverity = 3\n')
    found, problems = settings(root)
    assert found.tracked_image == "a:b"
    assert len(problems) == 2


def test_what_cannot_be_read_is_told(root: Path) -> None:
    (root / "etc/hostimaged.toml").mkdir()
    found, problems = settings(root)
    assert found == Settings()
    assert problems == ["hostimaged.toml: cannot be read: Is a directory"]
