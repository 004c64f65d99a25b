"""Making room on a full disk: only what nothing keeps goes, and nothing in doubt."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import pytest

from hostimage_testing.collecting import DAY, age, collected, everything, objects
from hostimage_testing.judge import Judge
from hostimage_testing.lives import Life, staged
from hostimage_testing.os_images import Recipe
from hostimaged.composefs.repository import Repository
from hostimaged.errors import LockTimeout
from hostimaged.host.collect import make_room
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

pytestmark = pytest.mark.interop

Recorded = Callable[..., Life]


def made(life: Life) -> int:
    return make_room(
        HostPaths.scratch(life.host.root), now=int(time.time()), lock_timeout=0, reporter=Silent()
    )


def test_no_more_goes_than_a_collection_removes(recorded: Recorded, cfsctl: str) -> None:
    life = recorded(staged)
    host = life.host
    assert life.staged is not None
    # Kept by the plan alone, by a dead tag that has not gone yet, and by nothing.
    host.tag(life.booted.image).unlink()
    tagged = host.image(Recipe(version="61", files={"usr/share/61": b"61" * 99}))
    age(host.write_tag(tagged), 2 * DAY)
    lost = host.image(Recipe(version="62", files={"usr/share/62": b"62" * 99}))
    before = objects(host.repository)
    menu = [line.text for line in host.menu()]
    freed = made(life)
    after = objects(host.repository)
    assert freed == sum(before[name] for name in before.keys() - after.keys()) > 0
    assert not (host.repository / "images" / lost.id).exists()
    assert (host.repository / "images" / tagged.id).exists()
    for deployment in (life.booted, life.staged):
        assert (host.repository / "images" / deployment.id).exists()
    assert [line.text for line in host.menu()] == menu
    Judge(cfsctl, host.repository).check()
    assert made(life) == 0
    done = collected(host)
    assert done["result"] == "collected"
    assert not (host.repository / "images" / tagged.id).exists()


def _damage(life: Life) -> None:
    target = life.host.stream("config", life.booted.image.config_digest).resolve()
    target.write_bytes(target.read_bytes()[:-7] + b"garbage")


def _unmount(life: Life) -> None:
    shutil.rmtree(life.host.boot_dir / "loader")


def _guest(life: Life) -> None:
    life.host.write_tag(life.host.image(Recipe(version="78")), "localhost/hostimaged-guest-")


@pytest.mark.parametrize("doubt", [_damage, _unmount, _guest])
def test_in_doubt_nothing_goes(recorded: Recorded, doubt: Callable[[Life], None]) -> None:
    life = recorded(staged)
    life.host.image(Recipe(version="62", files={"usr/share/62": b"62" * 99}))
    doubt(life)
    before = everything(life.host.root)
    assert made(life) == 0
    assert everything(life.host.root) == before


def test_who_reads_the_repository_is_not_disturbed(recorded: Recorded) -> None:
    life = recorded(staged)
    life.host.image(Recipe(version="62"))
    before = everything(life.host.root)
    with Repository.open(life.host.repository), pytest.raises(LockTimeout):
        made(life)
    assert everything(life.host.root) == before
