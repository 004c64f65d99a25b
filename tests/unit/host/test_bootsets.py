"""The sets of boot entries as whole things, in both forms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostimaged.errors import BootLoaderError, NoSpace
from hostimaged.host import bootsets
from hostimaged.host.bootfs import TEMPORARY
from hostimaged.host.bootsets import BlsSets, BootSetStore, GrubSets, RawSet

ONE = {"a.conf": b"title a\n", "b.conf": b"title b\n"}
TWO = {"c.conf": b"title c\n"}


def _bls(path: Path) -> BootSetStore:
    return BlsSets(path)


def _grub(path: Path) -> BootSetStore:
    return GrubSets(path)


def _set(store: BootSetStore, files: dict[str, bytes]) -> RawSet:
    if isinstance(store, GrubSets):
        return RawSet.of({"user.cfg": b"".join(files.values())})
    return RawSet.of(files)


@pytest.fixture(params=[_bls, _grub])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BootSetStore:
    made: BootSetStore = request.param(tmp_path)
    return made


def test_the_first_set_becomes_the_live_one(store: BootSetStore) -> None:
    assert store.live() is None
    assert store.staged() is None
    one = _set(store, ONE)
    store.write_staged(one)
    assert store.staged() == one
    store.activate()
    assert (store.live(), store.staged()) == (one, None)


def test_activation_exchanges_the_sets(store: BootSetStore, tmp_path: Path) -> None:
    one, two = _set(store, ONE), _set(store, TWO)
    store.write_staged(one)
    store.activate()
    store.write_staged(two)
    store.activate()
    assert (store.live(), store.staged()) == (two, one)
    store.remove_staged()
    store.remove_staged()
    assert (store.live(), store.staged()) == (two, None)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_staged_set_is_replaced(store: BootSetStore, tmp_path: Path) -> None:
    store.write_staged(_set(store, ONE))
    store.write_staged(_set(store, TWO))
    assert store.staged() == _set(store, TWO)
    assert len(os.listdir(tmp_path)) == 1


def test_the_live_set_is_replaced_beside_a_staged_one(store: BootSetStore, tmp_path: Path) -> None:
    store.replace_live(_set(store, ONE))
    store.write_staged(_set(store, TWO))
    store.replace_live(_set(store, {"d.conf": b"title d\n"}))
    assert store.live() == _set(store, {"d.conf": b"title d\n"})
    assert store.staged() == _set(store, TWO)
    assert len(os.listdir(tmp_path)) == 2


def test_what_a_crash_left_goes(store: BootSetStore, tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}x").mkdir()
    (tmp_path / f"{TEMPORARY}x" / "half.conf").write_bytes(b"")
    (tmp_path / f"{TEMPORARY}y").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    store.remove_temporary()
    assert os.listdir(tmp_path) == ["kept"]


def test_a_failure_leaves_the_staged_set_and_nothing_else(
    store: BootSetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_staged(_set(store, ONE))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hostimaged.system.durable.write_all", fail)
    with pytest.raises(NoSpace, match="No space left"):
        store.write_staged(_set(store, TWO))
    assert store.staged() == _set(store, ONE)
    assert len(os.listdir(tmp_path)) == 1


def test_digests_tell_sets_apart() -> None:
    sets = [
        {},
        {"a": b""},
        {"a": b"b"},
        {"a": b"", "b": b""},
        {"ab": b""},
        {"a\udcff": b""},
        {"a": b"1 0\nb"},
    ]
    assert len({RawSet.of(files).digest for files in sets}) == len(sets)
    assert bootsets.digest(None) == ""


def test_other_things_among_the_entries_are_not_read(tmp_path: Path) -> None:
    entries = tmp_path / "entries"
    entries.mkdir()
    (entries / "a.conf").write_bytes(b"x")
    (entries / "directory.conf").mkdir()
    (entries / "link.conf").symlink_to("/etc/shadow")
    os.mkfifo(entries / "pipe.conf")
    assert BlsSets(tmp_path).live() == RawSet.of({"a.conf": b"x"})


def test_a_set_beyond_all_reason_is_refused(tmp_path: Path) -> None:
    entries = tmp_path / "entries"
    entries.mkdir()
    (entries / "a.conf").write_bytes(b"x" * (bootsets.MAX_FILE_SIZE + 1))
    with pytest.raises(BootLoaderError, match=r"a\.conf is larger"):
        BlsSets(tmp_path).live()
    (entries / "a.conf").unlink()
    for number in range(bootsets.MAX_FILES + 1):
        (entries / f"{number}.conf").touch()
    with pytest.raises(BootLoaderError, match="more than"):
        BlsSets(tmp_path).live()
