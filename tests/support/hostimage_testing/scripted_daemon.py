"""The daemon with scripted workers (``scripted_worker.py``) and short delays: for tests only."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from hostimaged import __main__
from hostimaged.jobs import process

process.WorkerSettings = partial(  # type: ignore[misc,assignment]
    process.WorkerSettings,
    command=(sys.executable, "-P", str(Path(__file__).with_name("scripted_worker.py"))),
    cooperative=0.5,
    termination=0.5,
)
sys.exit(__main__.main())
