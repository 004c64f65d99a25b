"""What happens in watched directories is told, and nothing else."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.system import inotify
from hostimaged.system.inotify import Event, Inotify, Mask, parse_events
from hostimaged.system.syscalls import rename_exchange


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Inotify]:
    """An instance that watches ``tmp_path``."""
    with Inotify() as made:
        watch(made, tmp_path)
        yield made


def watch(instance: Inotify, path: Path) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return instance.watch(fd)
    finally:
        os.close(fd)


def told(instance: Inotify) -> list[tuple[Mask, str]]:
    """What was told until now, without which watch it was."""
    found = []
    while events := instance.read():
        found += [(event.mask, os.fsdecode(event.name)) for event in events]
    return found


def test_names_that_come_and_go_are_told(watched: Inotify, tmp_path: Path) -> None:
    assert watched.read() == []
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "link").rename(tmp_path / "other")
    (tmp_path / "other").unlink()
    assert told(watched) == [
        (Mask.CREATE | Mask.IS_DIRECTORY, "directory"),
        (Mask.CREATE, "link"),
        (Mask.MOVED_FROM, "link"),
        (Mask.MOVED_TO, "other"),
        (Mask.DELETE, "other"),
    ]


def test_a_file_written_in_place_is_told_and_one_read_is_not(watched: Inotify, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    told(watched)
    assert (tmp_path / "file").read_text() == "one"
    assert told(watched) == []
    (tmp_path / "file").write_text("two")
    assert told(watched) == [(Mask.CLOSE_WRITE, "file")]


def test_an_exchange_tells_of_both_names(watched: Inotify, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    told(watched)
    rename_exchange(tmp_path / "one", tmp_path / "two")
    names = [name for mask, name in told(watched) if mask & Mask.MOVED_TO]
    assert sorted(names) == ["one", "two"]


def test_the_directory_itself_is_told_of(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with Inotify() as instance:
        watch(instance, place)
        place.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rmdir()
        assert told(instance) == [(Mask.MOVE_SELF, ""), (Mask.DELETE_SELF, ""), (Mask.IGNORED, "")]


def test_a_directory_has_one_watch(watched: Inotify, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    below = watch(watched, tmp_path / "below")
    again = watch(watched, tmp_path)
    assert again != below
    told(watched)
    (tmp_path / "below/file").touch()
    assert {event.watch for event in watched.read()} == {below}
    assert watch(watched, tmp_path) == again


def test_a_watch_that_was_removed_tells_of_its_end_alone(watched: Inotify, tmp_path: Path) -> None:
    number = watch(watched, tmp_path)
    watched.remove(number)
    (tmp_path / "file").touch()
    assert told(watched) == [(Mask.IGNORED, "")]
    # It has ended.
    watched.remove(number)


def test_it_is_readable_when_there_is_something(watched: Inotify, tmp_path: Path) -> None:
    assert select.select([watched], [], [], 0)[0] == []
    (tmp_path / "file").touch()
    assert select.select([watched], [], [], 5)[0] == [watched]


def test_a_storm_is_taken_in_pieces_and_its_loss_is_told(watched: Inotify, tmp_path: Path) -> None:
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if kept > 100_000:
        pytest.skip("this machine keeps more events than a test should make")
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()
    # Two events each, and none equal to the one before.
    for _ in range(kept // 4 + 10):
        one.rename(two)
        two.rename(one)
    pieces = []
    while events := watched.read():
        pieces.append(events)
    header = 16
    assert max(len(piece) for piece in pieces) <= inotify.READ_SIZE // header
    assert len(pieces) > 1
    assert pieces[-1][-1] == Event(-1, Mask.OVERFLOW)


def test_what_is_not_open_cannot_be_watched() -> None:
    with Inotify() as instance, pytest.raises(OSError, match="No such file"):
        instance.watch(1 << 20)


def test_closing_twice_is_harmless() -> None:
    instance = Inotify()
    instance.close()
    instance.close()


def event(watch: int, mask: int, name: bytes) -> bytes:
    padded = name + b"\0" * (16 - len(name) % 16) if name else b""
    return struct.pack("=iIII", watch, mask, 0, len(padded)) + padded


def test_recorded_bytes_are_understood() -> None:
    data = event(1, 0x40000100, b"entries") + event(2, 0x8, b"x" * 15) + event(-1, 0x4000, b"")
    assert parse_events(data) == [
        Event(1, Mask.CREATE | Mask.IS_DIRECTORY, b"entries"),
        Event(2, Mask.CLOSE_WRITE, b"x" * 15),
        Event(-1, Mask.OVERFLOW),
    ]
    assert parse_events(b"") == []


@pytest.mark.parametrize("cut", [1, 15, 17, 31])
def test_half_an_event_is_an_error(cut: int) -> None:
    with pytest.raises(ValueError, match="half an event"):
        parse_events(event(1, 0x100, b"entries")[:cut])
