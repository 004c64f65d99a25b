"""One pull in a process of its own.  usage: pull_once.py ROOT REFERENCE"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hostimaged.composefs.repository import Verity
from hostimaged.oci.pull import pull_image
from hostimaged.oci.reference import ImageReference
from hostimaged.progress import Silent
from hostimaged.system.paths import HostPaths

root, image = sys.argv[1:]
result = pull_image(
    HostPaths.scratch(Path(root)),
    ImageReference.parse(image),
    expect_digest=None,
    verity=Verity.OPPORTUNISTIC,
    lock_timeout=60.0,
    reporter=Silent(),
)
print(result.tag, flush=True)
# As a worker ends.
os._exit(0)
