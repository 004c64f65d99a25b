"""For code that makes very many objects at once."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def no_gc() -> Iterator[None]:
    """No cyclic garbage collection inside the block.

    Making a few hundred thousand live objects sets off collections that find nothing and take longer than the
    work: for a tree of 100,000 inodes 2.2 of 3.7 seconds. Reference counting goes on. If several threads use
    this, the first to leave ends the pause.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
