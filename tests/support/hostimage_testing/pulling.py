"""Pulling without a daemon, and what a pull that failed may leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import FormatSet, Repository, Verity
from hostimaged.oci import images, pulls
from hostimaged.oci.pull import PullResult, pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

_LAYER = "oci-layer-"


def pull(host: HostPaths, reference: str, **options: Any) -> PullResult:
    """Pull into the repository of ``host``; ``options`` are those of ``pull_image``."""
    wanted: dict[str, Any] = {
        "expect_digest": None,
        "verity": Verity.OPPORTUNISTIC,
        "lock_timeout": 5,
        "reporter": Silent(),
    }
    return pull_image(host, ImageReference.parse(reference), **(wanted | options))


def with_formats(host: HostPaths, formats: FormatSet) -> None:
    """Make the repository of ``host``, which nobody pulled into yet, with these formats."""
    Repository.init(
        host.repository, algorithm=Algorithm.SHA512, formats=formats, verity=Verity.OPPORTUNISTIC
    )[0].close()


@contextmanager
def opened(host: HostPaths) -> Iterator[Repository]:
    """The repository of ``host`` under its shared lock."""
    with Repository.open(host.repository, lock_timeout=1) as repository:
        yield repository


def check_whole(repository: Repository) -> None:
    """Every name leads to something whole: all objects are there, and all that is tagged."""
    for name in repository.streams():
        with repository.open_stream(name) as stream:
            assert all(map(repository.has_object, stream.object_refs)), name
    for image in repository.images():
        os.close(repository.open_image(image))
    for digest in images.tags(repository).values():
        found = images.open_image(repository, digest)
        for image_id in found.image_ids.values():
            os.close(repository.open_image(image_id.hex()))


def check_nothing_named(host: HostPaths, *layers: str) -> None:
    """No tag, manifest, configuration, image or row; at most the ``layers`` (diff_ids) have their names, all
    whole; and no temporary file is left."""
    with Repository.open(host.repository, lock_timeout=0) as repository:
        check_whole(repository)
        assert images.tags(repository) == {}
        assert repository.images() == []
        streams = repository.streams()
        assert all(name.startswith(_LAYER) for name in streams), streams
        assert {name.removeprefix(_LAYER) for name in streams} <= set(layers)
    assert pulls.load(host.pulls) == []
    assert not host.temporary.exists() or list(host.temporary.iterdir()) == []
