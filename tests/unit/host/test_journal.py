"""The journal of a transaction: what is written is read, and nothing else is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimaged.host import journal
from hostimaged.host.journal import JournalError, Operation, Transaction
from hostimaged.ids import DeploymentId

ID = DeploymentId("ab" * 64)
OTHER = DeploymentId("cd" * 64)

_transactions = st.builds(
    Transaction,
    operation=st.sampled_from(Operation),
    boot_id=st.text("0123456789abcdef-", max_size=36),
    time=st.integers(0, 1 << 40),
    before=st.sampled_from(["", "0" * 64]),
    after=st.sampled_from(["", "1" * 64]),
    target=st.sampled_from([None, ID]),
    state_dir=st.booleans(),
    discard=st.sampled_from([(), (OTHER,), (ID, OTHER)]),
)


@given(_transactions)
def test_what_is_written_is_read(transaction: Transaction) -> None:
    assert journal.parse(transaction.serialise()) == transaction


def test_the_file_is_private_and_is_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "state" / "transaction.json"
    assert journal.read(path) is None
    transaction = Transaction(Operation.STAGE, "boot", 1, "", "0" * 64, target=ID, state_dir=True)
    journal.write(path, transaction)
    assert path.stat().st_mode & 0o777 == 0o600
    assert journal.read(path) == transaction
    journal.remove(path)
    journal.remove(path)
    assert journal.read(path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"operation": "explode"},
        {"target": "../../etc"},
        {"time": -1},
        {"time": True},
        {"state_dir": 1},
        {"discard": "x"},
        {"discard": [1]},
        {"discard": [str(ID)] * 1000},
        {"boot_id": "x" * 10_000},
        {"before": None},
    ],
)
def test_a_damaged_journal_names_itself(tmp_path: Path, change: dict[str, object]) -> None:
    good = json.loads(Transaction(Operation.STAGE, "b", 1, "", "").serialise())
    path = tmp_path / "transaction.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises(JournalError, match=r"transaction\.json"):
        journal.read(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"[" * 100_000, b"{}" + b" " * (64 << 10)])
def test_what_is_no_journal_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "transaction.json"
    path.write_bytes(raw)
    with pytest.raises(JournalError):
        journal.read(path)
