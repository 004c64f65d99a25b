"""Files that outlive the daemon, but not the boot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from hostimaged.jobs.boot_file import BootFile, OfBoot


class Note(OfBoot):
    text: str = Field(default="", alias="the-text")


def file(path: Path, boot_id: str = "one", limit: int = 1000, mode: int = 0o644) -> BootFile[Note]:
    return BootFile(path / "note.json", Note, boot_id, limit=limit, mode=mode)


def test_what_is_saved_is_loaded_in_the_same_boot(tmp_path: Path) -> None:
    assert file(tmp_path).load() is None
    note = Note(**{"the-text": "hello"})
    one = file(tmp_path, mode=0o600)
    one.save(one.encode(note))
    assert file(tmp_path).load() == note.model_copy(update={"boot_id": "one"})
    assert file(tmp_path, "two").load() is None
    path = tmp_path / "note.json"
    assert json.loads(path.read_text()) == {"version": 1, "boot_id": "one", "the-text": "hello"}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2, "boot_id": "one"}', b"\xff"])
def test_damage_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(ValidationError):
        file(tmp_path).load()


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    one = file(tmp_path)
    encoded = one.encode(Note(**{"the-text": "x" * 100}))
    one.save(encoded)
    assert file(tmp_path, limit=len(encoded)).load() is not None
    with pytest.raises(ValidationError):
        file(tmp_path, limit=len(encoded) - 10).load()
