"""The marker of a staged deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostimaged.errors import DamagedState
from hostimaged.host.marker import MAX_SIZE, NAME, Marker, read_marker
from hostimaged.ids import DeploymentId

ID = DeploymentId("ab" * 64)


def test_the_bytes_are_canonical_json() -> None:
    assert Marker(ID).serialise().decode() == f'{{"depl_id":"{ID}","finalization_locked":false}}'
    locked = Marker(ID, finalization_locked=True)
    assert locked.serialise().decode() == f'{{"depl_id":"{ID}","finalization_locked":true}}'
    assert Marker.parse(locked.serialise()) == locked


@pytest.mark.parametrize("text", [f"{ID}", f"{ID}\n"])
def test_the_plain_form_of_old_is_read(text: str) -> None:
    assert Marker.parse(text.encode()) == Marker(ID)


def test_further_keys_do_not_matter() -> None:
    text = json.dumps({"new": [1], "finalization_locked": True, "depl_id": str(ID)}, indent=2)
    assert Marker.parse(text.encode()) == Marker(ID, finalization_locked=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{",
        b"[" * 10_000,
        b'{"depl_id": "ab", "finalization_locked": true}',
        f'{{"depl_id": "{ID}"}}'.encode(),
        f'{{"depl_id": "{ID}", "finalization_locked": 1}}'.encode(),
        str(ID).upper().encode(),
        b" " * (MAX_SIZE + 1),
    ],
)
def test_anything_else_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedState, match=NAME):
        Marker.parse(data)


def test_reading(tmp_path: Path) -> None:
    assert read_marker(None) is None
    assert read_marker(tmp_path / "missing") is None
    assert read_marker(tmp_path) is None
    (tmp_path / NAME).write_bytes(Marker(ID).serialise())
    assert read_marker(tmp_path) == Marker(ID)
    (tmp_path / NAME).write_bytes(b"{}")
    with pytest.raises(DamagedState):
        read_marker(tmp_path)
