"""Damaged objects: distrusted, taken for missing, replaced when they are stored again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostimaged.composefs import fsck
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import ObjectMissing, Repository, Verity
from hostimaged.composefs.repository.repair import harm_of, protect_again, restored
from hostimaged.errors import VerityMismatch
from hostimaged.ids import ObjectId

CONTENT = b"content " * 1000


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    path = tmp_path / "repository"
    with Repository.init(path, algorithm=Algorithm.SHA256, verity=Verity.OPPORTUNISTIC)[0] as repository:
        yield repository


def file_of(repository: Repository, id_: ObjectId) -> Path:
    return repository.path / "objects" / id_.pathname


def damaged(repository: Repository, content: bytes = CONTENT) -> ObjectId:
    """An object of the right length with one wrong byte, which nothing notices by itself."""
    id_ = repository.store_object(content).id
    file_of(repository, id_).write_bytes(b"X" + content[1:])
    assert not repository.store_object(content).is_new, "which is why it must be told"
    return id_


@pytest.mark.parametrize("streamed", [False, True])
def test_a_distrusted_object_is_replaced(repository: Repository, streamed: bool) -> None:
    id_ = damaged(repository)
    repository.distrust([id_])
    assert not repository.has_object(id_)
    with pytest.raises(VerityMismatch, match="is damaged"):
        repository.open_object(id_)
    with pytest.raises(ObjectMissing):
        repository.object_size(id_)
    with open(file_of(repository, id_), "rb") as reader:
        if streamed:
            with repository.object_writer() as writer:
                writer.write(CONTENT)
                stored = writer.commit()
        else:
            stored = repository.store_object(CONTENT)
        assert stored.is_new
        assert reader.read(1) == b"X", "who has it open keeps what it has"
    assert stored.id == id_
    assert repository.read_object(id_, 1 << 20) == CONTENT
    assert not repository.distrusted
    assert not repository.store_object(CONTENT).is_new


def test_an_object_that_is_gone_may_be_distrusted(repository: Repository) -> None:
    id_ = damaged(repository)
    file_of(repository, id_).unlink()
    repository.distrust([id_])
    assert repository.store_object(CONTENT).is_new
    assert restored(repository, id_)


def test_distrusted_streams_and_images_are_not_opened(repository: Repository) -> None:
    with repository.new_stream(5) as writer:
        writer.inline(b"inline")
        stream = repository.write_stream("name", writer)
    image = repository.write_image(b"any bytes")
    repository.distrust([stream, image])
    with pytest.raises(VerityMismatch):
        repository.open_stream("name")
    with pytest.raises(VerityMismatch):
        repository.open_stream("", stream)
    with pytest.raises(VerityMismatch):
        repository.open_image(image.hex())
    repository.write_image(b"any bytes")
    os.close(repository.open_image(image.hex()))


def test_only_right_content_is_protected_again(repository: Repository) -> None:
    right, wrong = repository.store_object(b"right" * 100).id, damaged(repository)
    gone = ObjectId(b"\1" * 32)
    repository.distrust([right, wrong, gone])
    before = file_of(repository, right).stat().st_ino
    assert protect_again(repository, right)
    assert file_of(repository, right).stat().st_ino != before
    assert not protect_again(repository, wrong)
    assert not protect_again(repository, gone)
    assert repository.distrusted == {wrong, gone}
    assert len(list(repository.path.glob("objects/??/*"))) == 2


def test_what_a_check_found(repository: Repository) -> None:
    lost = repository.store_object(b"lost" * 100).id
    wrong = damaged(repository)
    with repository.new_stream(5) as writer:
        writer.external(lost, 400)
        writer.external(wrong, len(CONTENT))
        writer.named_ref("other", ObjectId(b"\2" * 32))
        repository.write_stream("stream", writer)
    with repository.new_stream(5) as writer:
        writer.inline(b"inline")
        cut = repository.write_stream("cut", writer)
    gone = repository.write_image(b"no image")
    file_of(repository, lost).unlink()
    file_of(repository, gone).unlink()
    file_of(repository, cut).write_bytes(b"")
    (repository.path / "streams/file").touch()
    harm = harm_of(repository, fsck.check(repository))
    assert harm.damaged == {wrong, cut}
    assert harm.missing == {lost, ObjectId(b"\2" * 32), gone}
    assert [finding.path for finding in harm.others] == ["streams/file"]
    assert not harm.truncated


def test_what_a_damaged_table_says_is_missing_is_not_believed(repository: Repository) -> None:
    with repository.new_stream(5) as writer:
        writer.named_ref("name", repository.store_object(CONTENT).id)
        id_ = repository.write_stream("stream", writer)
    raw = bytearray(file_of(repository, id_).read_bytes())
    raw[112] ^= 1  # the first digest of the table
    file_of(repository, id_).write_bytes(raw)
    harm = harm_of(repository, fsck.check(repository))
    assert (harm.damaged, harm.missing) == ({id_}, set())


def test_what_was_missing_is_read_before_it_counts(repository: Repository) -> None:
    assert not restored(repository, damaged(repository))
    assert restored(repository, repository.store_object(b"good" * 100).id)
