"""The EROFS image of the only image in a repository, made again and not stored.  usage: image_once.py ROOT"""

from __future__ import annotations

import sys
from pathlib import Path

from hostimaged.composefs import fsverity
from hostimaged.composefs.erofs import build
from hostimaged.composefs.repository import Repository
from hostimaged.oci.filesystem import build_tree
from hostimaged.oci.images import open_image, tags
from hostimaged.system.paths import HostPaths

with Repository.open(HostPaths.scratch(Path(sys.argv[1])).repository) as repository:
    (digest,) = set(tags(repository).values())
    image = open_image(repository, digest)
    layers = [image.layers[str(diff_id)] for diff_id in image.config.diff_ids]
    tree = build_tree(repository, layers)
    data = build(tree, repository.formats.default, repository.algorithm)
    print(fsverity.digest(repository.algorithm, data).hex())
