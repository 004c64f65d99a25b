"""Random trees survive the way into an image, or a dump file, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostimage_testing.trees import canonical, trees
from hostimaged.composefs.dumpfile import parse, write
from hostimaged.composefs.erofs import Format, Image, build, possible_objects
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.tree import Directory, External, ExternalNoVerity, Leaf, walk

CASES = [(algorithm, image_format) for algorithm in Algorithm for image_format in Format]


@pytest.mark.parametrize(("algorithm", "image_format"), CASES, ids=[f"{a.label}-{f.label}" for a, f in CASES])
@given(data=st.data())
@settings(max_examples=30)
def test_tree_to_image_and_back(algorithm: Algorithm, image_format: Format, data: st.DataObject) -> None:
    # V2 keeps no nanoseconds.
    root = data.draw(trees(algorithm, nanoseconds=image_format is not Format.V2))
    image = build(root, image_format, algorithm)
    assert len(image) % 4096 == 0
    opened = Image(image, algorithm)
    assert opened.format is image_format
    assert canonical(opened.tree()) == canonical(root)
    opened.check()
    assert opened.objects() == objects_of(root)
    assert set(possible_objects(bytes(image), algorithm)) >= objects_of(root)
    # The tree that came back is as good as the one that went in.
    assert build(opened.tree(), image_format, algorithm) == image


def objects_of(root: Directory) -> set[bytes]:
    return {
        node.content.id
        for _, node in walk(root)
        if isinstance(node, Leaf) and isinstance(node.content, External | ExternalNoVerity)
    }


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda a: a.label)
@given(data=st.data())
@settings(max_examples=60)
def test_tree_to_dump_and_back(algorithm: Algorithm, data: st.DataObject) -> None:
    # A file without verity is written as one with verity.
    root = data.draw(trees(algorithm, no_verity=False))
    text = b"".join(write(root))
    back = parse(text, algorithm)
    assert canonical(back) == canonical(root)
    assert b"".join(write(back)) == text
    assert text.isascii()
